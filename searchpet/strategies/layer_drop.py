"""Layer drop: whole layers go by their place or contribution, PET is searched on the rest.

Sajjad et al. 2020, arXiv:2004.03844; contribution as in ShortGPT, Men et al. 2024,
arXiv:2403.03853.  `layer_drop:VARIANT` with top (the last go first), bottom, alternate, symmetric
(the middle goes first) or contribution (what changes its input least goes first).
"""

from __future__ import annotations

from searchpet import catalog
from searchpet.errors import unknown
from searchpet.strategies import Problem, Ranking

TRAINS = True
PRUNES = True  # needs masks and a limit on what they leave
MASKS = "prune/layers"  # what it prunes by, unless --masks says otherwise
VARIANTS = ("alternate", "bottom", "contribution", "symmetric", "top")


def search(
    problem: Problem,
    *,
    variant: str = "contribution",
    pet: str = "bilevel",  # the strategy that searches PET on what is left
) -> Ranking:
    """Drop layers within the limit on inference, then search PET units within theirs."""
    if variant not in VARIANTS:
        raise unknown("variant of layer_drop", variant, VARIANTS)
    found: Ranking = catalog.get("strategies", "prune_first")(
        problem, score=variant, allocation="global", pet=pet)
    return found
