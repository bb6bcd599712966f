"""Robust tickets: prune gates are learned on the loss under an adversary, then drawn exactly.

Zheng et al. 2022 (Robust Lottery Tickets for Pre-trained Language Models, ACL): the pretrained
weights stay frozen, hard concrete masks (Louizos et al. 2018, arXiv:1712.01312) are learned on
max_delta L(E + delta), delta a small perturbation of the input embeddings, and the highest scores
within the limit are drawn.  PET and head learn in the same loop, on plain batches of the other
half of the data, as in `bilevel`; PET units are chosen under the same adversary.

What differs from the paper, and why:

- no L0 penalty and its schedule: the two shifts of the budgets make the expected L0 exact at
  every step.  A prune gate is above 0 with the probability that they give; the limit comes down
  from the whole model over `ramp` of the steps;
- units are attention heads, neurons, sublayers, layers, which can be removed, not single weights;
- sizes of the adversary are shares of a text's embedding norm (see searchpet.adversary), and two
  steps, which reach 2.5 % of it, are the default; the paper takes five of 0.03 from 0.05;
- PET gates are not stretched: most of them are nearly always closed, and a gate that is clamped
  to 0 has no gradient.

For models that read text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from searchpet.adversary import adversarial, check, tables
from searchpet.errors import InputError
from searchpet.gates import concrete, hard_concrete, location
from searchpet.processes import average
from searchpet.strategies import Learner, Phases, Problem, Ranking, descend, law

TRAINS = True
PRUNES = True  # needs masks and a limit on what they leave


def search(
    problem: Problem,
    *,
    steps: int = 2,  # of the adversary; each costs a pass, and the first ones gain most
    size: float = 0.01,  # of such a step, a share of a text's embedding norm
    start: float = 0.005,  # of the random start
    alpha_lr: float = 0.1,  # the paper's for masks, and S3PET's
    warmup: float = 0.3,  # share of the steps in which only the deltas learn
    ramp: float = 0.3,  # share of the steps in which pruning sets in, after the warm-up
    cold: float = 0.3,  # final temperature of PET gates
) -> Ranking:
    """Learn alpha (units,) under the adversary; keep units by probability within the limits.

    Raises InputError for a hyperparameter out of its range, where there is nothing to prune, and
    for a model that does not read text.
    """
    check(steps, size, start)
    law("robust.alpha_lr", alpha_lr, alpha_lr > 0, "above 0")
    for name, share in (("warmup", warmup), ("ramp", ramp)):
        law(f"robust.{name}", share, 0 <= share <= 1, "a share of the steps in [0, 1]")
    law("robust.cold", cold, 0 < cold <= 1, "in (0, 1]")
    if problem.keep is None:
        raise InputError("robust prunes, but no limit on inference is given; add "
                         "--keep-flops 60%")
    tables(problem.net.model)  # refuse before the first step, not in the middle

    def worst(step: int) -> Tensor:
        return adversarial(problem.net.model, problem.loss, problem.valid[step], steps=steps,
                           size=size, start=start, generator=problem.generator)

    alpha = torch.zeros(len(problem.space), device=problem.net.home, requires_grad=True)
    phases = Phases(problem.steps, warmup, cold, ramp)
    _learn(problem, alpha, torch.optim.Adam([alpha], lr=alpha_lr), phases, worst)
    score = problem.limits.shift(alpha.detach()).cpu()
    return Ranking(score, problem.limits.fill(score, density=True))


def _learn(problem: Problem, alpha: Tensor, choose: torch.optim.Optimizer, phases: Phases,
           worst: Callable[[int], Tensor]) -> None:
    """Deltas on the one half; after the warm-up alpha (units,), in place, by worst(step)."""
    net, limits, prunes = problem.net, problem.limits, problem.space.prunes.to(alpha.device)
    learn = Learner(problem)

    def gates(p: Tensor, step: int) -> Tensor:
        hard = hard_concrete(location(p), problem.generator)
        soft = concrete(p, phases.temperature(step), problem.generator)
        return torch.where(prunes, hard, soft)

    loop = problem.loop(
        problem.steps, alpha=alpha, weights=learn.weights, learn=learn, choose=choose)
    for step in loop:
        warm = phases.warm(step)
        learn.crowd(problem.crowd if warm else 1.0)
        figures = {}
        net.z = torch.ones(len(alpha), device=alpha.device)
        if not warm:
            net.z = gates(limits.shift(alpha, ease=phases.ease(step)), step)
            found = worst(step)
            (slope,) = torch.autograd.grad(found, alpha)
            alpha.grad = average(slope)  # each process met an adversary of the whole batch
            choose.step()
            figures["worst"] = found.detach()
        with torch.no_grad():
            p = limits.shift(alpha, ease=phases.ease(step))
            if not warm:
                net.z = gates(p, step)
        loss = descend(problem, problem.train[step], learn)
        loop.report(loss=loss, **problem.gauge(step, p, limits.price(p)), **figures)
