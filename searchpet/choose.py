"""The final choice, taken once more: the scores of a search, other limits and wishes.

A strategy ends with scores and a choice under its own limit.  How it has chosen is read from
that: by summed value (the knapsack) or unit by unit, whichever gives its choice again.  Then the
same scores fill other limits, from the smallest on, and each choice contains the one before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from searchpet.errors import InputError
from searchpet.limits import Limits
from searchpet.strategies import Ranking


def density_of(limits: Limits, ranking: Ranking) -> bool | None:
    """Whether PET units were chosen by summed value; None where scores do not say the choice."""
    if ranking.masks or not bool(ranking.score.isfinite().all()):
        return None
    for must in (limits.must, None):
        own = _limits(limits, ranking, limits.limit, must)
        for density in (True, False):
            if torch.equal(own.fill(ranking.score, density=density), ranking.keep.cpu()):
                return density
    return None


def nested(limits: Limits, ranking: Ranking, parameters: Sequence[int], strategy: str,
           ) -> list[tuple[Limits, Tensor]]:
    """For each limit, rising: the limits and keep (units,) bool, which contains the one before.

    limits: those of the search;  parameters: of PET; a single one is that of `limits`.
    Raises InputError where several choices, or what must be kept, cannot be had.
    """
    must = limits.must
    if len(parameters) == 1 and bool((ranking.keep.cpu() | ~must).all()):
        return [(limits, ranking.keep)]
    density = density_of(limits, ranking)
    if density is None:
        what = "--must" if len(parameters) == 1 else "several budgets"
        raise InputError(f"{what} must be filled from scores of units, but strategy {strategy} "
                         "keeps groups, masks or a choice of its own; take --strategy bilevel")
    found: list[tuple[Limits, Tensor]] = []
    for limit in parameters:
        own = _limits(limits, ranking, limit, must)
        keep = own.fill(ranking.score, density=density)
        if bool((must & ~keep).any()):
            raise InputError("--must must be kept, but pruning takes what some of it sits on; "
                             "ask for less, or drop --keep-flops and the like")
        found.append((own, keep))
        must = keep & ~limits.space.prunes
    return found


def _limits(limits: Limits, ranking: Ranking, parameters: int, must: Tensor | None) -> Limits:
    """Another limit on PET, and what the search has pruned."""
    settled = ranking.keep.cpu() if limits.keep is not None else None
    return Limits(limits.space, parameters, limits.keep, settled, must)


def affordable(cost: Tensor, must: Tensor | None, parameters: int, text: str) -> None:
    """Raise InputError unless what must be kept fits in a budget."""
    if must is None:
        return
    needed = int(cost[must].sum())
    if needed > parameters:
        raise InputError(f"--must must fit in the budget: its {int(must.sum()):,} units cost "
                         f"{needed:,} parameters, but {text} leaves {parameters:,}; ask for less, "
                         "or raise --budget")
