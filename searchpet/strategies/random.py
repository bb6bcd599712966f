"""Random structures: whole modules and rank atoms, or the space's own units.

`random` groups channels into whole vectors, as published random baselines do; `random:unit` draws
the units of the space.  At 0.01 % single channels drawn all over the backbone are far stronger
than whole modules, so a search has to be shown beside both.  Prune masks are drawn by unit.
"""

from __future__ import annotations

import torch

from searchpet.errors import unknown
from searchpet.strategies import Problem, Ranking

TRAINS = False
LOOKS = False
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
        alone = space.prunes | torch.tensor([p.atoms for p in space.placements])[space.owner]
        label = torch.where(alone, len(space.placements) + units, space.owner)
        _, group = torch.unique(label, return_inverse=True)
    else:
        group = units
    draws = torch.rand(int(group.max()) + 1, generator=problem.generator, dtype=torch.float64)
    score = draws[group]
    return Ranking(score, problem.limits.fill(score, group=group))
