"""First-order bi-level search: deltas on one half of the training data, gates on the other.

Min over alpha of L_valid(theta(alpha), alpha) with theta near its minimum on L_train, as S3PET (Hu
et al. 2022, arXiv:2206.07382), but with two passes a step instead of five, one copy of
everything, and the exact implicit gradient of the shift.  Differences, with reasons:

- The deltas are warmed up, all gates open, before alpha moves: at a silent init the gradient of
  every gate is exactly zero, so first-order steps would follow noise. Rates are calibrated for a
  structure of `limit` parameters; n independent changes add up like sqrt(n), so with everything
  open they are lowered by sqrt(limit / total) (at full rates, MiniLM on TREC-6 stays at chance).
- Units are ranked by p per parameter, so that one large module does not crowd out many small
  ones, and the slack is filled.
- The temperature falls from 1 to `cold`, so that the gates the deltas learn with come close to
  the open-or-closed ones of the final structure.
"""

from __future__ import annotations

import torch

from searchpet.budget import fill, shift
from searchpet.gates import concrete, decided, entropy
from searchpet.strategies import Problem, Ranking, descend

TRAINS = True


def search(
    problem: Problem,
    *,
    alpha_lr: float = 0.1,  # S3PET's; Adam moves a logit by about this much a step
    warmup: float = 0.3,  # share of the steps in which only the deltas learn
    cold: float = 0.3,  # final temperature; lower ones make alpha's gradient vanish
) -> Ranking:
    """Learn alpha (units,), then keep units by p per parameter within the limit."""
    net, space, device = problem.net, problem.space, problem.net.home
    price = space.cost.to(device).double()
    alpha = torch.zeros(len(space), device=device, requires_grad=True)
    weights = [p for group in net.groups(problem.rates) for p in group["params"]]
    learn = torch.optim.AdamW(net.groups(problem.rates), weight_decay=0.0)
    choose = torch.optim.Adam([alpha], lr=alpha_lr)
    rates = [group["lr"] for group in learn.param_groups]
    crowd = min(1.0, problem.limit / space.total) ** 0.5
    warm = round(warmup * problem.steps)
    loop = problem.loop(
        problem.steps, alpha=alpha, weights=weights, learn=learn, choose=choose)
    for step in loop:
        for group, rate in zip(learn.param_groups, rates, strict=True):
            group["lr"] = rate * (crowd if step < warm and group["kind"] != "head" else 1.0)
        p = shift(alpha, price, problem.limit)
        if step < warm:
            net.z = torch.ones(len(space), device=device)
        else:
            progress = (step - warm) / max(1, problem.steps - warm)
            temperature = cold**progress
            net.z = concrete(p, temperature, problem.generator)
            (alpha.grad,) = torch.autograd.grad(problem.loss(problem.valid[step]), alpha)
            choose.step()
            with torch.no_grad():
                net.z = concrete(shift(alpha, price, problem.limit), temperature,
                                 problem.generator)
        loss = descend(problem, learn, problem.train[step])
        loop.report(loss=loss, expected=(p * price).sum(), hard=decided(p, price),
                    entropy=entropy(p))
    score = shift(alpha.detach(), price, problem.limit).cpu() / space.cost
    return Ranking(score, fill(score, space.cost, problem.limit))
