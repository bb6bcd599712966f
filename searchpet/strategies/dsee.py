"""DSEE: LoRA plus a sparse update on a fixed support, attention heads and neurons pruned evenly.

Chen et al. 2023, arXiv:2111.00160.  Every matrix delta of the space keeps `entries` numbers, where
the pretrained weight differs most from its own low-rank part.  They start at zero, as LoRA does.
Under a limit on inference all of it is trained once; then the same share of attention heads goes
in every layer, the lowest by what was learned, and one share of the neurons in every layer, as few
as the limit allows.  With masks of single weights the smallest |W + dW| go instead.

What is saved on BERT-base with 128 tokens: 25 % of the heads alone save 8.8 % of the FLOPs (8.3 %
of those of the linears), so the paper's figures need neurons too.  25 % of the heads and 25 % of
the neurons save 25 % (`--keep-flops 75%`), 25 % and 40.6 % save 35 % (`--keep-flops 65%`).

Differences from the paper and its code, with reasons:

- The support.  The code thresholds |W - U V| at 0.01 while the rank grows, and takes the largest
  entries afterwards; in planted matrices the sparse part then takes in what the low-rank part
  should explain, and few planted entries are found.  Here it has `entries` numbers in each round.
- If heads go, the support is the same ranking on the rows that stay: exactly `entries` a matrix.
- Neurons go by the mean |dL/dz| of their gates over the training, not by learned coefficients
  under an l1 penalty, which a hard limit makes needless.
- The structure is trained anew, as every one here; so without a limit there is nothing to learn.

A budget below all of LoRA and all entries is refused: fewer entries are another structure.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from searchpet import catalog
from searchpet.allocate import top
from searchpet.errors import InputError, unknown
from searchpet.grafts import Graft
from searchpet.hosts import NOTHING, Live
from searchpet.limits import Limits
from searchpet.scores import Stats
from searchpet.strategies import Problem, Ranking, law
from searchpet.tickets import magnitudes
from searchpet.updates import low_rank_sparse, matrix_of, updates

TRAINS = True
CHOOSES = True  # parameters of PET, not units: its scores fill no other limit
WEIGHTS = True  # chooses masks of single weights, if there are any
SPARSE = True  # keeps single parameters: what a law says of whole units does not hold
SPACE = "dsee"  # what it chooses from, unless --space says otherwise
MASKS = "prune/heads_neurons"  # what it prunes by, unless --masks says otherwise
KIND = "matrix"
SCORES = ("abs", "random", "wabs")


def search(
    problem: Problem,
    *,
    entries: int = 128,  # the authors' default, of each matrix
    rank: int = 4,  # of what the support need not explain: the rank of LoRA in spaces/dsee.toml
    score: str = "wabs",  # the authors' default: sum |dW| + sum |W|; `abs` is sum |dW| alone
    heads: float = 0.25,  # share that goes in every layer; the authors' 3 of 12
) -> Ranking:
    """All of PET, of each matrix `entries` numbers; prune units as the limit on inference says.

    Ranking.masks holds the supports.
    Raises InputError where the space has no matrices, for a budget below all that is kept, a limit
    that heads and neurons cannot reach, and hyperparameters out of their range.
    """
    law("dsee.entries", entries, entries >= 1, "at least 1")
    law("dsee.heads", heads, 0 <= heads < 1, "a share of the heads in [0, 1)")
    if score not in SCORES:
        raise unknown("dsee.score", score, SCORES)
    limits = problem.limits
    draw = torch.rand(len(problem.space), generator=problem.generator, dtype=torch.float64)
    matrices = {g.key: g for g in problem.net.grafts.grafts if g.kind == KIND}
    if not matrices:
        raise InputError(f"dsee needs units of kind {KIND} to thin, but space "
                         f"{problem.space.name} has none; add --space dsee")
    _afford(problem, matrices, _even(limits, draw, heads), entries)  # any choice costs as much
    rests = {key: _unexplained(matrix_of(problem.net.model, g.site), rank, entries)
             for key, g in matrices.items()}
    importance = draw
    if problem.keep is not None or problem.settle_weights is not None:
        slopes = _train(problem, {key: top(rest, entries) for key, rest in rests.items()})
        worth = draw if score == "random" else _heads(problem, score == "wabs")
        importance = torch.where(_of_kind(limits, "heads"), worth, slopes)
    if problem.settle_weights is not None:
        problem.settle_weights(magnitudes(problem.net), "global", [])
    keep = _even(limits, importance, heads)
    masks = {key: top(_left(rest, _live(limits, matrices[key], keep)), entries).reshape(-1)
             for key, rest in rests.items()}
    return Ranking(keep.double(), keep, masks)


def _unexplained(weight: Tensor, rank: int, entries: int) -> Tensor:
    """|W - its low-rank part|, (d_out, d_in) float64."""
    most = min(weight.shape) - 1
    law("dsee.rank", rank, 1 <= rank <= most, f"in [1, {most}]")
    return (weight.cpu() - low_rank_sparse(weight, rank, entries).low).abs()


def _live(limits: Limits, graft: Graft, keep: Tensor) -> Live:
    """What `keep` leaves of a delta's site."""
    whole = Live(graft.site, None, None)
    live = limits.hosts.live(graft.site, keep) if limits.hosts else whole
    assert live is not None  # in every layer a head and a group of neurons stay
    return live


def _left(matrix: Tensor, live: Live) -> Tensor:
    """The rows and columns that are left."""
    rows = matrix if live.outs is None else matrix[live.outs]
    return rows if live.ins is None else rows[:, live.ins]


def _afford(problem: Problem, matrices: Mapping[str, Graft], keep: Tensor,
            entries: int) -> None:
    """Raise InputError unless the budget pays for all of PET on what `keep` leaves."""
    limits = problem.limits
    left = [_live(limits, graft, keep).site for graft in matrices.values()]
    smallest = min(site.d_in * site.d_out for site in left)
    law("dsee.entries", entries, entries <= smallest,
        f"at most the {smallest:,} elements that are left of the smallest matrix")
    others = limits.parameters(keep & ~_of_kind(limits, KIND))
    needed = others + entries * len(matrices)
    if needed > problem.limit:
        raise InputError(f"dsee keeps all of its space, {others:,} parameters and {entries:,} of "
                         f"each of {len(matrices)} matrices, {needed:,} together, but the budget "
                         f"is {problem.limit:,}; raise it, or lower dsee.entries with --set")


def _of_kind(limits: Limits, kind: str) -> Tensor:
    """bool (units,)."""
    return torch.tensor([p.kind == kind for p in limits.space.placements])[limits.space.owner]


def _even(limits: Limits, score: Tensor, heads: float) -> Tensor:
    """keep (units,) bool: in every layer the best heads and, by one share, the best neurons.

    Raises InputError where no share of the neurons reaches the limit on inference.
    """
    keep = torch.ones(len(limits.space), dtype=torch.bool)
    if limits.keep is None:
        return keep
    neurons = []
    for p in limits.space.placements:
        units = limits.space.unit[p.start : p.start + p.width]
        ranked = units[score[units].argsort(descending=True, stable=True)]
        if p.kind == "heads":
            keep[ranked[max(1, p.width - round(heads * p.width)) :]] = False
        elif p.kind == "neurons":
            neurons.append(ranked)
    most = max((len(ranked) for ranked in neurons), default=1)
    for share in range(most, 0, -1):  # of `most` groups
        for ranked in neurons:
            keep[ranked[max(1, len(ranked) * share // most) :]] = False
        left = limits.kept(keep)
        if left <= limits.keep.limit:
            return keep
    raise InputError(
        f"dsee must reach --keep-{limits.keep.measure} {limits.keep.text} by a share of heads and "
        f"of neurons, but with dsee.heads={heads} at least {left / limits.keep.cost.dense:.1%} "
        "stays; raise the limit, or dsee.heads with --set")


def _train(problem: Problem, supports: Mapping[str, Tensor]) -> Tensor:
    """Train LoRA and the supports, everything open; mean |dL/dz| (units,) float64, on the CPU."""
    net, device = problem.net, problem.net.home
    sparse = [(graft.delta.get_parameter(KIND), supports[graft.key])
              for graft in net.grafts.grafts if graft.kind == KIND]
    masks = [(p, keep.to(p.device)) for p, keep in sparse]
    share = sum(int(m.sum()) for _, m in masks) / sum(m.numel() for _, m in masks)
    groups = net.groups(problem.rates)
    for group in groups:
        if group["kind"] != "head":
            group["lr"] *= problem.room
        if group["kind"] == KIND:  # rates are of all elements; n changes add up like sqrt(n)
            group["lr"] /= share**0.5
    weights = [p for group in groups for p in group["params"]]
    learn = torch.optim.AdamW(groups, weight_decay=0.0)
    slopes = torch.zeros(len(problem.space), dtype=torch.float64, device=device)
    loop = problem.loop(problem.steps, slopes=slopes, weights=weights, learn=learn)
    for step in loop:
        net.z = torch.ones(len(slopes), device=device).requires_grad_()
        loss = problem.spread(problem.train[step])
        slope, *found = torch.autograd.grad(loss, [net.z, *weights], materialize_grads=True)
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = gradient
        learn.step()
        with torch.no_grad():
            for p, keep in masks:
                p.mul_(keep)  # Adam works element by element: the others do not feel it
        slopes += slope.abs().double() / problem.steps
        loop.report(loss=loss.detach())
    return slopes.cpu()


def _heads(problem: Problem, whole: bool) -> Tensor:
    """Sum of |dW|, and of |W| if `whole`, over the rows of each unit (units,) float64.

    Of the matrices that PET adds to, which are query and value in spaces/dsee.toml.
    """
    found = torch.zeros(len(problem.space), dtype=torch.float64)
    hosts = problem.limits.hosts
    if hosts is None:
        return found
    names = ("update", "magnitude") if whole else ("update",)
    for site, update in updates(problem.net).items():
        stats = Stats(matrix_of(problem.net.model, site), update=update)
        rows = sum(catalog.get("scores", name)(stats).sum(1) for name in names)
        ids = hosts.ties(site).outs
        tied = ids != NOTHING
        found.index_add_(0, ids[tied], rows.cpu().double()[tied])
    return found
