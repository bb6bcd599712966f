"""S3PET as published: second-order bi-level search.  Hu et al. 2022, arXiv:2206.07382, sec. 3.

A step, five passes: virtual step theta' = theta - xi g_train; dL_valid(theta')/dalpha; minus xi
times the mixed second derivative by finite differences at theta +- eps v (Liu et al. 2019,
arXiv:1806.09055, eq. 8); then the deltas' own step.  Shifted global sigmoid with beta = 1, gates
soft throughout, zeta detached and the gradient taken through p / sum p as the authors do, and
units kept greedily by p, skipping what does not fit.

Differences: the authors copy the whole model for the virtual step, here only the trainable
parameters are copied; the two finite-difference passes share their noise (gates and dropout),
which would otherwise drown the difference; learning rates are calibrated per kind, as for every
method here (`lr` > 0 restores one rate for all; the authors' is 3e-4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from searchpet.budget import fill, shift
from searchpet.calibrate import DRAWN
from searchpet.errors import InputError
from searchpet.gates import concrete
from searchpet.strategies import Problem, Ranking, descend, law

PET_ALONE = True  # as published: no masks, no limit on inference


def search(
    problem: Problem,
    *,
    alpha_lr: float = 0.1,  # the authors'
    lr: float = 0.0,  # 0: calibrated per kind
    radius: float = 0.01,  # DARTS': eps = radius / |v|
) -> Ranking:
    """Learn alpha (units,), then keep units by p within the limit.

    Raises InputError for a space with prune masks.
    """
    law("s3pet.alpha_lr", alpha_lr, alpha_lr > 0, "above 0")
    law("s3pet.lr", lr, lr >= 0, "at least 0")
    law("s3pet.radius", radius, radius > 0, "above 0")
    if problem.keep is not None:
        raise InputError("s3pet searches PET alone, as published, but the search is to keep "
                         f"{problem.keep.text} of the {problem.keep.measure}; take --strategy "
                         "bilevel to search both")
    net, space, device = problem.net, problem.space, problem.net.home
    price = space.cost.to(device).double()
    alpha = torch.zeros(len(space), device=device, requires_grad=True)
    rates = problem.rates if lr == 0 else {k: lr for k in problem.rates if k != DRAWN}
    groups = net.groups(rates)
    weights = [p for group in groups for p in group["params"]]
    speeds = [group["lr"] for group in groups for _ in group["params"]]
    learn = torch.optim.AdamW(groups, weight_decay=0.0)
    choose = torch.optim.Adam([alpha], lr=alpha_lr)

    def gate() -> Tensor:
        """Gate values at the present alpha, differentiable in it."""
        return concrete(authors_shift(alpha, price, problem.limit), 1.0, problem.generator)

    def at(batch: dict[str, Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the loss under freshly drawn gates."""
        net.z = gate()
        loss = problem.spread(batch)
        return list(torch.autograd.grad(loss, wanted, materialize_grads=True))

    loop = problem.loop(problem.steps, alpha=alpha, weights=weights, learn=learn, choose=choose)
    for step in loop:
        train, valid = problem.train[step], problem.valid[step]
        noise = problem.generator.get_state()
        before = [w.detach().clone() for w in weights]
        move(weights, at(train, weights), [-s for s in speeds])
        direct, *slope = at(valid, [alpha, *weights])
        put(weights, before)
        mixed = mixed_derivative(
            weights, [s * g for s, g in zip(speeds, slope, strict=True)], radius,
            partial(_again, problem, noise, partial(at, train, [alpha]), alpha.is_cuda))
        alpha.grad = direct - mixed
        choose.step()
        with torch.no_grad():
            net.z = gate()
        loss = descend(problem, train, learn)
        p = shift(alpha.detach(), price, problem.limit)
        loop.report(loss=loss, **problem.gauge(step, p, price))
    score = shift(alpha.detach(), price, problem.limit).cpu()
    return Ranking(score, fill(score, space.cost, problem.limit))


def authors_shift(alpha: Tensor, price: Tensor, limit: float) -> Tensor:
    """The shifted sigmoid with the authors' gradient: zeta constant, p / sum p renormalised."""
    if limit >= float(price.sum()):
        return shift(alpha, price, limit)
    # the solved shift as a constant: sigmoid(alpha - zeta) has the solved value
    solved = shift(alpha.detach(), price, limit)
    zeta = alpha.detach().double() - torch.logit(solved, eps=1e-15)
    p = torch.sigmoid(alpha.double() - zeta)
    return p / p.sum() * p.sum().detach()


def mixed_derivative(weights: Sequence[Tensor], direction: Sequence[Tensor], radius: float,
                     slope: Callable[[], Tensor]) -> Tensor:
    """d/dalpha of <grad_theta L, direction> by central differences; weights end as they began.

    slope() is dL/dalpha (units,) at the present weights, with the same noise at each call.
    """
    size = torch.sqrt(sum((d**2).sum() for d in direction)).item()  # type: ignore[arg-type]
    if size == 0.0:
        return torch.zeros_like(slope())
    eps = radius / size
    kept = [w.detach().clone() for w in weights]
    move(weights, direction, [eps] * len(weights))
    above = slope()
    move(weights, direction, [-2 * eps] * len(weights))
    below = slope()
    put(weights, kept)
    return (above - below) / (2 * eps)


@torch.no_grad()
def move(weights: Sequence[Tensor], direction: Sequence[Tensor], steps: Sequence[float]) -> None:
    """weights += steps * direction, in place."""
    for w, d, s in zip(weights, direction, steps, strict=True):
        w.add_(d, alpha=s)


@torch.no_grad()
def put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """weights = values, in place."""
    for w, v in zip(weights, values, strict=True):
        w.copy_(v)


def _again(problem: Problem, noise: Tensor, slope: Callable[[], list[Tensor]], cuda: bool,
           ) -> Tensor:
    """dL/dalpha with the same gate noise and the same dropout at every call of a step."""
    problem.generator.set_state(noise)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        return slope()[0]
