"""First-order bi-level search: deltas on one half of the training data, gates on the other.

Min over alpha of L_valid(theta(alpha), alpha) with theta near its minimum on L_train, as S3PET (Hu
et al. 2022, arXiv:2206.07382), but with one pass a step instead of five, one copy of everything,
and the exact implicit gradient of the shift.  Differences, with reasons:

- One pass teaches both, on the two halves in turn (`levels = 1`), and every example has a gate
  sample of its own (`rows`), so that alpha's gradient is less noisy.  Half the time of two passes
  with one sample, and no worse: 0.83 instead of 0.77 and 0.90 instead of 0.70 of planted deltas
  found (experiments/planted, five seeds).
- What the search has trained is where the training of the structure begins, at no cost: on
  agreement at 0.01 % 0.904 instead of 0.873 with untrained deltas, on trec6 0.942 instead of
  0.948.  S3PET reaches 0.706 and 0.937, at three times the cost (experiments/equal_budget, three
  searches each).
- The deltas are warmed up, all gates open, before alpha moves: at a silent init the gradient of
  every gate is exactly zero, so first-order steps would follow noise. Rates are calibrated for a
  structure of `limit` parameters, so with everything open they are lowered by `problem.crowd` (at
  full rates, MiniLM on TREC-6 stays at chance).
- Units are ranked by p per parameter, so that one large module does not crowd out many small
  ones, and the slack is filled.
- The temperature falls from 1 to `cold`, so that the gates the deltas learn with come close to
  the open-or-closed ones of the final structure.

With prune masks in the space both are searched together, by default with two passes and one gate
sample a step, as experiments/prune has measured it. The limit on inference comes down from the
whole model over `ramp` of the steps, so that PET units learn beside what will be left, and prune
gates are hard, with straight-through gradients, in the last `hard` of them. Prune units start
from |dL/dz| per cost on the warmed-up supernet, and move at a slower pace: a random half of a
pretrained model computes nothing to learn beside, and single batches know less than that score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from searchpet import processes
from searchpet.gates import concrete, straight_through
from searchpet.settle import compare
from searchpet.strategies import Batch, Learner, Phases, Problem, Ranking, descend, law

TRAINS = True
INHERITS = True
BATCHES = 8  # for the scores that prune units start from


def search(
    problem: Problem,
    *,
    alpha_lr: float = 0.1,  # S3PET's; Adam moves a logit by about this much a step
    warmup: float = 0.3,  # share of the steps in which only the deltas learn
    cold: float = 0.3,  # final temperature; lower ones make alpha's gradient vanish
    ramp: float = 0.3,  # share of the steps in which pruning sets in, after the warm-up
    hard: float = 0.2,  # share of the steps, at the end, in which prune gates are open or closed
    prior: float = 2.0,  # spread of the logits that prune units start from; 0: all alike
    pace: float = 0.3,  # of alpha_lr, for prune units: one seed, TREC-6: 0.926 against 0.925 at 1
    levels: int = 0,  # passes a step, 1 or 2; 0: 1, or 2 where masks are searched as well
    rows: bool = True,  # a gate sample for every example; never where masks are searched
) -> Ranking:
    """Learn alpha (units,), then keep units by p per parameter within the limits.

    Raises InputError for a hyperparameter out of its range.
    """
    law("bilevel.alpha_lr", alpha_lr, alpha_lr > 0, "above 0")
    for name, share in (("warmup", warmup), ("ramp", ramp), ("hard", hard)):
        law(f"bilevel.{name}", share, 0 <= share <= 1, "a share of the steps in [0, 1]")
    law("bilevel.cold", cold, 0 < cold <= 1, "in (0, 1]")
    law("bilevel.prior", prior, prior >= 0, "at least 0")
    law("bilevel.pace", pace, 0 <= pace <= 1, "in [0, 1]")
    law("bilevel.levels", levels, levels in (0, 1, 2), "0, 1 or 2")
    levels = levels or (2 if bool(problem.space.prunes.any()) else 1)
    phases = Phases(problem.steps, warmup, cold, ramp, hard)
    gates = _Gates(problem, phases, alpha_lr, pace, rows)
    learn = Learner(problem)
    loop = problem.loop(
        problem.steps, alpha=gates.alpha, weights=learn.weights, learn=learn, choose=gates.learn)
    for step in loop:
        warm = phases.warm(step)
        learn.crowd(problem.crowd if warm else 1.0)
        if phases.starts(step):
            gates.alpha.data += prior * _start(problem).to(gates.alpha.device)
        p = gates.open(step)
        if warm:
            problem.net.z = torch.ones_like(gates.alpha)
            loss = descend(problem, problem.train[step], learn)
        elif levels == 1:
            loss = gates.choose(step, p, (problem.train, problem.valid)[step % 2][step], learn)
        else:
            gates.choose(step, p, problem.valid[step])
            train = problem.train[step]
            with torch.no_grad():
                problem.net.z = gates.sample(step, gates.open(step), train)
            loss = descend(problem, train, learn)
        loop.report(loss=loss, **problem.gauge(step, p, problem.limits.price(p.detach())))
    score = problem.limits.shift(gates.alpha.detach()).cpu()
    return Ranking(score, problem.limits.fill(score, density=True))


class _Gates:
    """The gates of a search: alpha (units,), what they are sampled from, and how it learns."""

    def __init__(self, problem: Problem, phases: Phases, rate: float, pace: float, rows: bool,
                 ) -> None:
        self.problem, self.phases, self.pace = problem, phases, pace
        device = problem.net.home
        self.alpha = torch.zeros(len(problem.space), device=device, requires_grad=True)
        self.learn = torch.optim.Adam([self.alpha], lr=rate)
        self.prunes = problem.space.prunes.to(device)
        self.apart = rows and not bool(self.prunes.any())

    def open(self, step: int) -> Tensor:
        """p (units,) at a step, within the limits of that step; differentiable in alpha."""
        return self.problem.limits.shift(self.alpha, ease=self.phases.ease(step))

    def sample(self, step: int, p: Tensor, batch: Batch) -> Tensor:
        """A sample (units,), or one for every row of the batch; differentiable in alpha."""
        z = concrete(p, self.phases.temperature(step), self.problem.generator,
                     rows=processes.rows(batch) if self.apart else 0)
        return straight_through(z, self.prunes) if self.phases.hard(step) else z

    def choose(self, step: int, p: Tensor, batch: Batch, *others: torch.optim.Optimizer) -> Tensor:
        """A step of alpha, and of others, on a batch with gates from p; its loss."""
        self.problem.net.z = self.sample(step, p, batch)
        before = self.alpha.detach().clone()
        loss = descend(self.problem, batch, self.learn, *others)
        with torch.no_grad():
            slow = before.lerp(self.alpha, self.pace)
            self.alpha.copy_(torch.where(self.prunes, slow, self.alpha))
        return loss


def _start(problem: Problem) -> Tensor:
    """Where prune units start, (units,) float32: normal quantiles of |dL/dz| per cost; else 0."""
    prunes = problem.space.prunes
    found = torch.zeros(len(prunes))
    if problem.settled is None and bool(prunes.any()):
        score = problem.importance("gate", [problem.train[i] for i in range(BATCHES)])
        place = compare(problem.limits, score, "per_cost")[prunes].argsort(stable=True).argsort()
        found[prunes] = torch.special.ndtri((place.float() + 0.5) / len(place))
    return found
