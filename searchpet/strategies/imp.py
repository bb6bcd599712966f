"""Iterative magnitude pruning: prune a little, rewind what learns, again; then PET by salience.

Frankle and Carbin 2019, arXiv:1803.03635, with the structures of Chen et al. 2022,
arXiv:2202.04736.  In each round the deltas and the head learn under the present masks; of the
weights that are left the share `each` with the smallest |W + dW| goes for good; the deltas and the
head go back to where they were early on.  The last round meets the limit.  `shape` is what becomes
of the masks then:

- weights: they stay as they are;
- regroup: dense blocks of rows that share columns, of no larger area than each matrix has weights;
- refill: whole attention heads and groups of neurons, as many in each layer as its kept weights
  fill, those with most of them, moved alike in all layers until the limit is met.

Under what is left then the deltas learn once more, and PET units stay by |z dL/dz| per parameter.

Differences from the papers: the backbone is frozen, so that what trains and is rewound are the
deltas and the head, and a weight's magnitude moves with its delta alone; all rounds together take
the share `end` of one search's steps, and batches go on instead of starting over; for `refill`
single weights are pruned to the share that the limit on inference leaves, and their masks are gone
at its end; rows are grouped by k-means, not by a hypergraph partition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from searchpet.allocate import rounds
from searchpet.errors import InputError, unknown
from searchpet.masks import from_blocks, regroup
from searchpet.settle import settle
from searchpet.strategies import Masks, Problem, Ranking, SettleWeights, law
from searchpet.tickets import Learner, magnitudes, refilled, stand_in

TRAINS = True
WEIGHTS = True  # chooses masks of single weights, if there are any
PRUNES = True  # needs masks and a limit on what they leave
SHAPES = ("weights", "regroup", "refill")


def search(
    problem: Problem,
    *,
    shape: str = "",  # weights where the masks are of single weights, refill where of units
    each: float = 0.2,  # both papers': of what is left, in every round
    end: float = 0.5,  # share of the steps at which the last round prunes; PET needs the others
    rewind: float = 0.0,  # share of the first round's steps; deltas start silent, so init is safe
    allocation: str = "global",  # both papers': one threshold for all matrices
    parts: int = 8,  # the paper's: groups of rows in a matrix, for regroup
    smooth: float = 0.85,  # of salience over steps, as in `apt`
) -> Ranking:
    """Prune in rounds to the limit on inference, then keep PET units within theirs.

    Raises InputError where there is nothing to prune, for an unknown shape or allocation, and for
    a hyperparameter out of its range.
    """
    law("imp.each", each, 0 < each < 1, "in (0, 1)")
    law("imp.end", end, 0 <= end < 1, "a share of the steps in [0, 1)")
    law("imp.rewind", rewind, 0 <= rewind <= 1, "a share of the first round's steps in [0, 1]")
    law("imp.parts", parts, parts >= 1, "at least 1")
    law("imp.smooth", smooth, 0 <= smooth < 1, "in [0, 1)")
    shape = _shape(problem, shape)
    learner = Learner(problem.net, problem.rates, problem.crowd, smooth)
    how = _How(shape, each, end, rewind, allocation, parts)
    if shape == "refill":
        assert problem.keep is not None  # `_shape` has seen to it
        own = stand_in(problem.net, problem.keep.limit / problem.keep.cost.dense, problem.loss,
                       problem.generator)
        try:
            _rounds(problem, learner, own.settle, how)
        finally:
            own.remove()
    else:
        assert problem.settle_weights is not None
        _rounds(problem, learner, problem.settle_weights, how)
    limits = replace(problem, settled=learner.keep.cpu() > 0.5).limits
    score = learner.salience.cpu()
    return Ranking(score, limits.fill(score, density=True))


@dataclass(frozen=True)
class _How:
    """The hyperparameters that rounds need."""

    shape: str
    each: float
    end: float
    rewind: float
    allocation: str
    parts: int


def _shape(problem: Problem, shape: str) -> str:
    """The shape asked for, or the one that suits the masks."""
    if shape and shape not in SHAPES:
        raise unknown("imp.shape", shape, SHAPES)
    if problem.keep is None and problem.settle_weights is None:
        raise InputError("imp prunes, but no limit on inference is given; add --keep-flops 60%, "
                         "or --keep-weights 50% --masks prune/weights")
    shape = shape or ("refill" if problem.settle_weights is None else "weights")
    if shape == "refill" and problem.keep is None:
        raise InputError("imp.shape refill keeps attention heads and neurons, but the masks are "
                         "of single weights; take --masks prune/structured")
    kinds = {place.kind for place in problem.space.bulk}
    if (shape == "weights" and not kinds) or (shape == "regroup" and kinds != {"weights"}):
        raise InputError(f"imp.shape {shape} keeps single weights, but the masks are of other "
                         "things; take --keep-weights 50% --masks prune/weights")
    return shape


def _rounds(problem: Problem, learner: Learner, prune: SettleWeights, how: _How) -> None:
    """Learn, prune, rewind; then learn under what is left."""
    net = problem.net
    masks = prune(magnitudes(net), how.allocation, (), ease=1.0)
    shares = rounds(masks.share, how.each)
    stop = min(round(how.end * problem.steps), problem.steps - 1)
    cuts = {(i + 1) * stop // len(shares): s for i, s in enumerate(shares)}  # step -> what is left
    loop = problem.loop(problem.steps, gates=list(masks.gates.values()), **learner.state())
    for step in loop:
        if step == round(how.rewind * min(cuts)):
            learner.mark()
        if step in cuts:
            found, share = magnitudes(net), cuts[step]
            prune(found, how.allocation, (), ease=(share - masks.share) / (1 - masks.share))
            if step == max(cuts):
                _reshape(problem, learner, masks, found, how)
            learner.rewind()
        left = min((s for cut, s in cuts.items() if cut <= step), default=1.0)
        loop.report(loss=learner.step(problem.spread, problem.train[step]), left=left)


def _reshape(problem: Problem, learner: Learner, masks: Masks, found: dict[str, Tensor],
             how: _How) -> None:
    """Turn the masks of single weights into what the shape asks for; found: |W + dW| by path."""
    if how.shape == "regroup":
        for gate in masks.gates.values():
            blocks = regroup(gate.bool(), how.parts).blocks
            gate.copy_(from_blocks(blocks, (gate.shape[0], gate.shape[1])))
    elif how.shape == "refill":
        score = refilled(problem.space, masks.kept(found), found)
        learner.keep[problem.space.prunes] = settle(
            problem.limits, score, "global")[problem.space.prunes].to(learner.keep)
        for gate in masks.gates.values():
            gate.fill_(1)
