"""Importance of prune units: scores of weights, added up over what a unit takes out.

An attention head takes out its rows of query, key and value and its columns of the output; a
group of neurons its rows and columns of the feed-forward; a sublayer or layer all of its matrices.
Beside the scores of `searchpet.scores` that a few batches can measure there are

- low_rank: of LoRA's factors instead of the weights' own gradients; matrices without LoRA count 0;
- gate: |dL/dz| of the unit's gate, per batch, Taylor expansion of Michel et al. 2019,
  arXiv:1905.10650, eq. 2;
- energy: the squared singular values of a group of directions (ranks alone);
- contribution: 1 - cos of what goes into a layer and comes out of it (layers alone);
- top, bottom, alternate, symmetric: by depth, after Sajjad et al. 2020, arXiv:2004.03844: which
  layers go first (the last ones, the first ones, every other one, those in the middle).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from searchpet import catalog
from searchpet.errors import InputError, unknown
from searchpet.factors import rows_of
from searchpet.hosts import NOTHING, Hosts
from searchpet.limits import masks_of
from searchpet.scores import LowRank, Score, Stats, needs_of
from searchpet.site import Site
from searchpet.space import Space
from searchpet.stats import (
    WANTS,
    collect,
    collect_contributions,
    collect_parameters,
    evaluating,
)
from searchpet.supernet import Supernet

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]

POSITIONS: dict[str, Callable[[int, int], float]] = {  # layer, depth -> what stays longest
    "top": lambda i, n: -i,
    "bottom": lambda i, n: i,
    "alternate": lambda i, n: i % 2 * -n - i if n % 2 else (i + 1) % 2 * n - i,
    "symmetric": lambda i, n: abs(i - (n - 1) / 2),
}


def names() -> list[str]:
    """Scores that units can be given."""
    scores = [n for n in catalog.names("scores")
              if set(needs_of(catalog.get("scores", n))) <= {*WANTS, "generator", "low_rank"}]
    return sorted([*scores, "contribution", "energy", "gate", *POSITIONS])


def importance(name: str, net: Supernet, batches: Sequence[Batch], loss: Loss,
               generator: torch.Generator) -> Tensor:
    """Score of every prune unit (units,) float64, higher = keep; 0 for PET units.

    Sums over a unit's weights, so a larger unit counts more: divide by its cost to compare.
    Raises InputError for a score that needs a training of the weights or fits no unit here.
    """
    space = net.space
    if name not in names():
        raise unknown("score of prune units", name, names())
    if name == "random":
        found = torch.rand(len(space), generator=generator, dtype=torch.float64)
    elif name == "gate":
        found = _gates(net, batches, loss)
    elif name == "energy":
        found = _energies(net)
    elif name in POSITIONS or name == "contribution":
        found = _layers(name, net, batches, loss)
    else:
        found = _weights(name, net, batches, loss, generator)
    return torch.where(space.prunes, found.cpu(), 0.0)


def _gates(net: Supernet, batches: Sequence[Batch], loss: Loss) -> Tensor:
    """Mean over the batches of |dL/dz|; the gates are what they were afterwards."""
    before = net.z
    total = torch.zeros(len(net.space), dtype=torch.float64)
    for batch in batches:
        z = before.detach().clone().requires_grad_()
        net.z = z
        (slope,) = torch.autograd.grad(loss(batch), z)
        total += slope.abs().cpu().double() / len(batches)
    net.z = before
    return total


def _energies(net: Supernet) -> Tensor:
    """Squared singular values, added up over a unit's directions."""
    space, total = net.space, torch.zeros(len(net.space), dtype=torch.float64)
    for p, graft in zip(space.placements, net.grafts.grafts, strict=True):
        if p.neutral == 1:
            measure: Any = getattr(graft.delta, "energies", None)
            if measure is None:
                raise InputError(f"score energy is of ranks, but there are masks of {p.kind}; "
                                 "take gate, or --masks prune/ranks")
            total.index_add_(0, space.unit[p.start : p.start + p.width], measure())
    return total


def _layers(name: str, net: Supernet, batches: Sequence[Batch], loss: Loss) -> Tensor:
    """By a layer's place or contribution; what is inside a layer counts as the layer does."""
    space = net.space
    layers = [site for site in space.sites if site.form == "layer"]
    if not layers:
        raise InputError(f"score {name} needs layers, but discovery finds no whole ones here; "
                         "take another score")
    depth = {part: sum(s.part == part for s in layers) for part in {s.part for s in layers}}
    if name == "contribution":
        found = collect_contributions(net.model, layers, batches, loss)
        value = {(s.part, s.layer): found.get(s.path, 0.0) for s in layers}
    else:
        value = {(s.part, s.layer): POSITIONS[name](s.layer, depth[s.part]) for s in layers}
    return torch.tensor([value.get((p.site.part, p.site.layer), 0.0)
                         for p in space.placements], dtype=torch.float64)[space.owner]


def _weights(name: str, net: Supernet, batches: Sequence[Batch], loss: Loss,
             generator: torch.Generator) -> Tensor:
    """A score of `searchpet.scores`, added up."""
    if any(mask.atoms for mask in masks_of(net.space)):
        raise InputError(f"score {name} adds up weights, but ranks are none; take gate or energy")
    space, score = net.space, catalog.get("scores", name)
    linears = [site for site in space.sites if site.form == "linear"]
    want = set(needs_of(score)) & set(WANTS)
    stats = collect(net.model, {s.path for s in linears}, batches, loss, want=want,
                    generator=generator)
    if "low_rank" in needs_of(score):
        return add_up(_low_rank(score, net, stats, batches, loss), linears, space)
    return add_up({path: score(stat) for path, stat in stats.items()}, linears, space)


def _low_rank(score: Score, net: Supernet, stats: Mapping[str, Stats], batches: Sequence[Batch],
              loss: Loss) -> dict[str, Tensor]:
    """Scores of matrices by path (d_out, d_in) from the open atoms of the LoRA on them; 0 without.
    """
    loras: list[tuple[Any, Tensor]] = [
        (graft, z > 0.5) for graft, z in zip(net.grafts.grafts, net.grafts.z, strict=True)
        if graft.kind == "lora"]
    if not loras:
        raise InputError(f"score low_rank needs LoRA, but space {net.space.name} has none; take "
                         "--space wide, or score snip")
    factors = {f"{graft.key}/{name}": getattr(graft.delta, name)
               for graft, _ in loras for name in ("A", "B")}
    with evaluating(net.model):
        own = collect_parameters(factors, batches, loss, want={"grad"})
    found = {path: torch.zeros_like(stat.weight) for path, stat in stats.items()}
    for graft, open_ in loras:
        a, b = own[f"{graft.key}/A"], own[f"{graft.key}/B"]
        assert a.grad is not None and b.grad is not None  # what was wanted
        rows = rows_of(graft.site).to(a.weight.device)
        found[graft.site.path][rows] = score(Stats(
            stats[graft.site.path].weight[rows],
            low_rank=LowRank(a.weight[open_], b.weight[:, open_], a.grad[open_], b.grad[:, open_],
                             graft.delta.scaling)))
    return found


def add_up(scores: dict[str, Tensor], linears: Sequence[Site], space: Space) -> Tensor:
    """From scores of matrices by path (d_out, d_in) to units (units,) float64."""
    hosts = Hosts(space.sites, masks_of(space))
    total = torch.zeros(len(space), dtype=torch.float64)
    for site in linears:
        matrix = scores[site.path].detach().cpu().double()
        if site.index:
            matrix = matrix[torch.cat([torch.arange(a, b) for a, b in site.index])]
        ties = hosts.ties(site)
        for ids, along in ((ties.ins, matrix.sum(0)), (ties.outs, matrix.sum(1))):
            tied = ids != NOTHING
            total.index_add_(0, ids[tied], along[tied])
        for i in ties.above:
            total[i] += matrix.sum()
    return total
