"""Sparse PET: single weights of PET modules are kept, exactly as many as the budget has.

SparseAdapter, He et al. 2022, arXiv:2210.04284: weights of adapters are scored at init, the lowest
are set to 0 and never move.  With the same budget a larger module can be taken (the paper's
Large-Sparse): the space says how large, the budget how many of its weights stay.  A strategy may
also choose masks by itself, of some deltas alone; the others stay whole.

A mask covers a delta's parameters one after another, in their order, each row by row; it lies
beside the spec, and delta.safetensors holds the kept numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from searchpet import catalog
from searchpet.allocate import keep_masks
from searchpet.errors import InputError
from searchpet.grafts import hold_zeros
from searchpet.masks import fingerprint, packed
from searchpet.scores import Stats, needs_of
from searchpet.spec import Entry, MaskRef
from searchpet.stats import (
    GRADIENTS,
    Scored,
    add_movement,
    collect_or_warm,
    collect_parameters,
)
from searchpet.supernet import Supernet

Batch = dict[str, Tensor]


class Sparse:
    """The masks of a supernet's own parameters; `settle` chooses them, `take` is given them.

    warm(steps, see) trains the supernet for so many steps; see() looks at each one's gradients.
    """

    def __init__(self, net: Supernet, limit: int, loss: Callable[[Batch], Tensor],
                 warm: Callable[[int, Callable[[], None]], None],
                 generator: torch.Generator) -> None:
        self.net, self.limit, self.loss = net, limit, loss
        self.warm, self.generator = warm, generator
        self.keeps: dict[str, Tensor] = {}  # key of a graft -> bool, over what is left of it
        self.warmed = False

    def settle(self, score: str, allocation: str, batches: Sequence[Batch], steps: int) -> None:
        """Keep exactly `limit` parameters by a score of `searchpet.scores`.

        A score that is the same for all of a tensor, as SNIP's where a factor starts at zero, is
        taken again after a warm-up of so many steps; movement is what happens in these steps.
        Raises InputError for a score that parameters of PET have not, and for a budget beyond all
        there is.
        """
        member = catalog.get("scores", score)
        if not set(needs_of(member)) <= {*GRADIENTS, "generator", "moved"}:
            raise InputError(f"parameters of PET must have what a score needs, but {score} is of "
                             "weights of the backbone; take random, magnitude, snip, fisher, "
                             "grasp or movement")
        named = dict(_named(self.net))
        total = sum(p.numel() for p in named.values())
        if self.limit > total:
            raise InputError(f"sparse PET keeps some of a space's parameters, but the budget of "
                             f"{self.limit:,} is above all {total:,}; lower it or take a larger "
                             "space")
        want = set(needs_of(member)) & set(GRADIENTS)
        moved: dict[str, Tensor] = {}

        def warm() -> None:
            self.warm(steps, lambda: add_movement(moved, named))

        def measured() -> dict[str, Stats]:
            found = collect_parameters(named, batches, self.loss, want=want,
                                       generator=self.generator)
            return {name: replace(stats, moved=moved.get(name)) for name, stats in found.items()}

        if needs_training := "moved" in needs_of(member):
            warm()
        found: Scored = collect_or_warm(measured, warm, member)
        self.warmed = found.warmed or needs_training
        keeps = keep_masks(found.scores, self.limit / total, allocation)
        self.keeps = {
            graft.key: torch.cat([keeps[f"{graft.key}/{name}"].reshape(-1).bool().cpu()
                                  for name, _ in graft.delta.named_parameters()])
            for graft in self.net.grafts.grafts}

    def take(self, keeps: Mapping[str, Tensor]) -> None:
        """Masks that are chosen already: bool (parameters that pruning leaves,) by key."""
        self.keeps |= {key: keep.cpu() for key, keep in keeps.items()}

    @property
    def thinned(self) -> Tensor:
        """Units of the deltas that have a mask, bool (units,)."""
        masked = [graft.key in self.keeps for graft in self.net.grafts.grafts]
        return torch.tensor(masked)[self.net.space.owner]

    def entries(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """The entries with their masks; those of which nothing stays are left out."""
        found = []
        for entry in entries:
            if entry.key not in self.keeps:
                found.append(entry)
                continue
            digest, count = fingerprint(self.keeps[entry.key])
            if count:
                mask = MaskRef(shape=tuple(self.keeps[entry.key].shape), sha256=digest,
                               count=count)
                found.append(entry.model_copy(update={"mask": mask}))
        return tuple(found)

    def bits(self) -> dict[str, Tensor]:
        """What masks.safetensors holds."""
        return {key: packed(keep) for key, keep in self.keeps.items() if bool(keep.any())}


def _named(net: Supernet) -> Iterator[tuple[str, nn.Parameter]]:
    for graft in net.grafts.grafts:
        for name, parameter in graft.delta.named_parameters():
            yield f"{graft.key}/{name}", parameter


def masks_of(delta: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """The mask (n,) of a delta as masks of its parameters, by name.

    Raises InputError unless it has as many elements as the delta has parameters.
    """
    sizes = {name: p.shape for name, p in delta.named_parameters()}
    count = sum(shape.numel() for shape in sizes.values())
    if len(mask) != count:
        raise InputError(f"a mask must have the {count} parameters of its delta, but has "
                         f"{len(mask)}")
    parts = mask.split([shape.numel() for shape in sizes.values()])
    return {name: part.view(shape)
            for (name, shape), part in zip(sizes.items(), parts, strict=True)}


def freeze_zeros(delta: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what the masks leave out to 0; it gets no gradient any more."""
    with torch.no_grad():
        for name, parameter in delta.named_parameters():
            parameter.mul_(masks[name].to(parameter.device))
    hold_zeros(delta, masks)
