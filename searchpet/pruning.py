"""What a search may leave of the backbone: from `--keep-flops 60%` to masks and a limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn

from searchpet import catalog
from searchpet.errors import InputError, unknown
from searchpet.flops import flops as count_flops
from searchpet.hosts import Hosts
from searchpet.inference import Cost, flops, weights
from searchpet.latency import Table
from searchpet.latency import cost_of as priced
from searchpet.latency import measure as time_of
from searchpet.limits import Keep, Limits, masks_of
from searchpet.probe import positions
from searchpet.site import Site
from searchpet.space import Space
from searchpet.spacefile import SpaceFile, read_space
from searchpet.spec import KeepUse

MEASURES = ("flops", "weights", "latency")
MASKS = "prune/structured"
TOKENS = 128
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%")


@dataclass(frozen=True)
class Prune:
    """Keep `text` of the measure, by the masks of a space file.

    Raises InputError for an unknown measure, or a share outside (0 %, 100 %).
    """

    measure: str
    text: str
    masks: str = MASKS

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise unknown("measure", self.measure, MEASURES)
        match = _SHARE.fullmatch(self.text.strip())
        if not match or not 0 < Fraction(match[1]) < 100:
            raise InputError(f"--keep-{self.measure} must be a share in (0%, 100%) such as 60%, "
                             f"but got {self.text!r}")

    @property
    def share(self) -> Fraction:
        """In (0, 1)."""
        match = _SHARE.fullmatch(self.text.strip())
        assert match  # checked at the start
        return Fraction(match[1]) / 100


def asked(keep_flops: str | None, keep_weights: str | None, keep_latency: str | None,
          masks: str | None, strategy: str = "bilevel") -> Prune | None:
    """What the options ask for together; a strategy may have masks of its own.

    Raises InputError where the options contradict each other, or the strategy.
    """
    texts = (keep_flops, keep_weights, keep_latency)
    given = {m: t for m, t in zip(MEASURES, texts, strict=True) if t}
    if len(given) > 1:
        raise InputError("one limit on inference at a time must be given, but got "
                         + " and ".join(f"--keep-{m} {t}" for m, t in given.items()))
    if masks and not given:
        raise InputError(f"--masks needs a limit to prune to, but got --masks {masks} alone; add "
                         "--keep-flops 60%")
    name = strategy.partition(":")[0]
    own = catalog.about("strategies", name, "MASKS", MASKS)
    return suited(name, next((Prune(m, text, masks or own) for m, text in given.items()), None))


def suited(strategy: str, prune: Prune | None) -> Prune | None:
    """What is pruned, where the strategy can do so: asked before anything is loaded.

    Raises InputError for a strategy that prunes without a limit, or takes none.
    """
    if prune is None and catalog.about("strategies", strategy, "PRUNES", False):
        raise InputError(f"{strategy} prunes, but no limit on inference is given; add "
                         "--keep-flops 60%")
    if prune is not None and catalog.about("strategies", strategy, "PET_ALONE", False):
        raise InputError(f"{strategy} searches PET alone, but the search is to keep {prune.text} "
                         f"of the {prune.measure}; take --strategy bilevel to search both")
    return prune


def with_masks(file: SpaceFile, prune: Prune | None) -> SpaceFile:
    """The space's rules and those of the masks."""
    if prune is None:
        return file
    return file.model_copy(update={"rule": (*file.rule, *read_space(prune.masks).rule)})


def keep_of(prune: Prune, model: nn.Module, space: Space, table: Table | None = None) -> Keep:
    """The limit on a model; table: of latencies, else they are measured now.

    Raises InputError where the masks cannot reach it.
    """
    hosts = Hosts(space.sites, masks_of(space))
    cost = cost_of(prune.measure, model, space.sites, hosts, len(space), table)
    if not cost.dense > 0:  # times of a tiny model are lost in noise
        raise InputError(f"--keep-{prune.measure} needs blocks that cost something, but this "
                         f"model's cost is {cost.dense:g}; take --keep-flops")
    limit = float(int(prune.share * Fraction(cost.dense)))
    floor = _floor(space, cost)
    if limit <= floor:
        raise InputError(f"--keep-{prune.measure} must leave what the masks of {prune.masks} "
                         f"cannot remove, {100 * floor / cost.dense:.3g}% here, but got "
                         f"{prune.text}")
    return Keep(prune.measure, prune.text, limit, cost)


def _floor(space: Space, cost: Cost) -> float:
    """The cost of no more than a layer's lifeline in each stack, wherever it is dearest."""
    limits = Limits(space, 1, Keep("", "", cost.dense, cost))
    depths = {(p.site.part, p.site.layer) for p in space.placements if p.neutral == 1}
    layer = torch.tensor([p.site.layer for p in space.placements])[space.owner]
    dearest = cost.floor
    for depth in {depth for _, depth in depths}:
        z = (~space.prunes).double()
        z[limits.lifeline((layer == depth).double())] = 1
        dearest = max(dearest, float(cost.at(z)))
    return dearest


def used(keep: Keep, left: float) -> KeepUse:
    """What the spec says of it; left: the cost of the structure."""
    return KeepUse(measure=keep.measure, text=keep.text, limit=keep.limit, used=left,
                   dense=keep.cost.dense)


def cost_of(measure: str, model: nn.Module, sites: Sequence[Site], hosts: Hosts, units: int,
            table: Table | None = None) -> Cost:
    """A measure of inference as a function of the prune units' gates.

    table: of latencies, else they are measured now.
    """
    if measure == "weights":
        return weights(sites, hosts, units)
    if measure == "latency":
        return priced(table or time_of(model, sites), sites, hosts, units)
    tokens = min(TOKENS, positions(model)) if takes_text(model) else None
    layers = {site.path: (site.part, site.layer) for site in sites if site.form == "layer"}
    counted = {layers[path]: float(n) for path, n in count_flops(model).items() if path in layers}
    return flops(sites, hosts, units, counted, tokens)


def takes_text(model: nn.Module) -> bool:
    """Whether the model's input is token ids."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids"
