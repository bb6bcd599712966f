"""Hard concrete gates under a Lagrangian: gates and deltas learn together, one pass a step.

min over theta, s  max over lambda of  L(theta, z) + lambda_1 g + lambda_2 g^2, where z are hard
concrete gates (Louizos et al. 2018, arXiv:1712.01312, eq. 10 to 12), exactly 0 or 1 with positive
probability, g = log(E / T), E = sum_i c_i P(z_i > 0) their expected parameters and T the budget;
the two multipliers climb by g and g^2 (CoFi: Xia et al. 2022, arXiv:2204.00408, sec. 3.2).

Single level: the same batch teaches deltas and gates, as in both papers, and batches come from the
two halves of the data in turn, so nothing is held out.  A step costs one pass, not two.  With
prune masks in the space a second pair of multipliers holds the limit on inference.

What differs from CoFi, and why:

- the constraint is on the logarithm, and T falls geometrically: a supernet has up to a thousand
  times the budget, and a gap in shares would not be felt once it is small;
- the deltas are warmed up with all gates open: at a silent init a gate has no gradient;
- their rates are lowered by sqrt(T / E) of what is open, as `bilevel` lowers them at the start;
- at the end units are kept by P(z > 0) per parameter, exactly within the limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from searchpet.gates import hard_concrete, opening
from searchpet.strategies import Learner, Phases, Problem, Ranking, law

TRAINS = True


def search(
    problem: Problem,
    *,
    alpha_lr: float = 0.1,  # S3PET's; Adam moves a location by about this much a step
    dual_lr: float = 0.1,  # of both multipliers; of nine planted modules 8 are found, 6 at 0.02
    warmup: float = 0.3,  # share of the steps in which only the deltas learn
    ramp: float = 0.4,  # share of the steps, after the warm-up, in which the budget comes down
    start: float = 1.0,  # location of every gate: open with 0.93; gates far above have no gradient
) -> Ranking:
    """Learn locations s (units,), then keep units by P(z > 0) per parameter within the limits.

    Raises InputError for a hyperparameter out of its range.
    """
    law("lagrangian.alpha_lr", alpha_lr, alpha_lr > 0, "above 0")
    law("lagrangian.dual_lr", dual_lr, dual_lr > 0, "above 0")
    for name, share in (("warmup", warmup), ("ramp", ramp)):
        law(f"lagrangian.{name}", share, 0 <= share <= 1, "a share of the steps in [0, 1]")
    net, limits = problem.net, problem.limits
    s = torch.full((len(problem.space),), start, device=net.home, requires_grad=True)
    learn = Learner(problem)
    choose = torch.optim.Adam([s], lr=alpha_lr)
    rule = Rule(problem, torch.zeros(2, 2, dtype=torch.float64, device=net.home))
    phases = Phases(problem.steps, warmup, 1.0, ramp)
    loop = problem.loop(
        problem.steps, s=s, weights=learn.weights, learn=learn, choose=choose, dual=rule.dual)
    for step in loop:
        warm = phases.warm(step)
        p = rule.open(s)
        gaps = rule.gaps(p, phases.ease(step))
        learn.crowd(rule.crowd(p, warm))
        net.z = torch.ones(len(s)) if warm else rule.hold(hard_concrete(s, problem.generator))
        loss = problem.spread((problem.train, problem.valid)[step % 2][step // 2])
        found = torch.autograd.grad(
            loss if warm else loss + rule.penalty(gaps),
            [*learn.weights, *([] if warm else [s])], materialize_grads=True)
        learn.follow(found[: len(learn.weights)])
        if not warm:
            s.grad = found[-1]
            choose.step()
            rule.climb(gaps.detach(), dual_lr)
        shown = rule.open(s.detach())
        loop.report(loss=loss.detach(), gap=gaps[0].detach(),
                    **problem.gauge(step, shown, limits.price(shown)))
    score = rule.open(s.detach()).cpu()
    return Ranking(score, limits.fill(score, density=True))


@dataclass(frozen=True)
class Rule:
    """The budgets of a problem as gaps, and what they cost.

    dual: (2, 2) float64, the multipliers of gap and squared gap, on parameters and on inference.
    """

    problem: Problem
    dual: Tensor

    def open(self, s: Tensor) -> Tensor:
        """P(z > 0), (units,) float64; 0 or 1 where what stays is settled."""
        return self.hold(opening(s.double()))

    def hold(self, z: Tensor) -> Tensor:
        """Gates (units,) with those that are settled as they are."""
        settled, prunes = self.problem.settled, self.problem.space.prunes.to(z.device)
        return z if settled is None else torch.where(prunes, settled.to(z), z)

    def gaps(self, p: Tensor, ease: float) -> Tensor:
        """log of expected over allowed, (2,): parameters, inference (0 without such a limit).

        ease in [0, 1]: how far both limits are still relaxed towards everything.
        """
        problem, limits = self.problem, self.problem.limits
        pet = ~problem.space.prunes.to(p.device)
        spent = (limits.price(p) * p)[pet].sum()
        everything = float(problem.space.total)
        final = min(1.0, problem.limit / everything)
        found = [(spent / (everything * final ** (1 - ease))).log()]
        if problem.keep is not None and problem.settled is None:
            keep = problem.keep
            allowed = keep.limit + ease * (keep.cost.dense - keep.limit)
            z = torch.where(pet, torch.ones_like(p), p)
            found.append((keep.cost.at(z) / allowed).log())
        return torch.stack([*found, torch.zeros_like(found[0])][:2])

    def penalty(self, gaps: Tensor) -> Tensor:
        """What the gaps cost."""
        return (self.dual[0] * gaps + self.dual[1] * gaps.square()).sum().float()

    def climb(self, gaps: Tensor, rate: float) -> None:
        """Raise the multipliers where a limit is not met; the first may turn negative."""
        self.dual.add_(torch.stack([gaps, gaps.square()]), alpha=rate)

    def crowd(self, p: Tensor, warm: bool) -> float:
        """Factor on the deltas' rates: n independent changes add up like sqrt(n)."""
        if warm:
            return self.problem.crowd
        gap = float(self.gaps(p.detach(), 0.0)[0])
        return max(self.problem.crowd, min(1.0, math.exp(-gap / 2)))
