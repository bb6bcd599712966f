"""Random structures: whole modules and rank atoms, or the space's own units.

`random` groups channels into whole vectors, as published random baselines do; `random:unit` draws
the units of the space.  At 0.01 % single channels drawn all over the backbone are far stronger
than whole modules, so a search has to be shown beside both.
"""

from __future__ import annotations

import torch

from searchpet.budget import fill
from searchpet.errors import unknown
from searchpet.strategies import Problem, Ranking

TRAINS = False
VARIANTS = ("module", "unit")


def search(problem: Problem, *, variant: str = "module") -> Ranking:
    """Take groups of units in random order until the budget is full, skipping what does not fit.

    variant: `module` (rank atoms, and all channels of a kind at a site together) or `unit`.
    """
    if variant not in VARIANTS:
        raise unknown("variant of random", variant, VARIANTS)
    space = problem.space
    units = torch.arange(len(space))
    if variant == "module":
        atoms = torch.tensor([p.atoms for p in space.placements])[space.owner]
        label = torch.where(atoms, len(space.placements) + units, space.owner)
        _, group = torch.unique(label, return_inverse=True)
    else:
        group = units
    count = int(group.max()) + 1
    cost = torch.zeros(count, dtype=torch.int64).index_add_(0, group, space.cost)
    score = torch.rand(count, generator=problem.generator, dtype=torch.float64)
    keep = fill(score, cost, problem.limit)
    return Ranking(score[group], keep[group])
