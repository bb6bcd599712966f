"""Folklore at equal budget: a fixed form, filled from the last layer down.

`uniform:NAME` is this strategy on the space `spaces/uniform/NAME.toml`.  Rank atoms are given out
evenly: the first atom to every site from the last layer down, then the second, and so on.  Prune
masks keep the same share of every attention and feed-forward; whole sublayers stay.
"""

from __future__ import annotations

import torch

from searchpet.strategies import Problem, Ranking

TRAINS = False
LOOKS = False
SPACES = "uniform"  # the variant names a space of this folder


def search(problem: Problem, *, variant: str = "") -> Ranking:
    """Rank by atom, then by falling layer, then by the order of sites in a block."""
    del variant  # it has chosen the space already
    space = problem.space
    layer = torch.tensor([p.site.layer for p in space.placements])[space.owner]
    # decoders count as later than encoders
    layer = layer + 10_000 * torch.tensor(
        [p.site.part == "decoder" for p in space.placements])[space.owner]
    score = -(space.first.double() * 1e6) + layer.double()
    width = torch.tensor([float(p.width) for p in space.placements])[space.owner]
    even = torch.where(width > 1, -(space.first + 0.5) / width, torch.ones(()))
    score = torch.where(space.prunes, even.double(), score)
    return Ranking(score, problem.limits.fill(score))
