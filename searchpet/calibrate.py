"""Learning rate per kind from one probe: lr_kind = tau / probe_kind.

One Adam step at the same learning rate moves the output of one kind hundreds of times more than
that of another (a rank-8 LoRA against a rank-1 one, say), so a shared rate makes a search choose
the kind that the rate happens to suit.  The probe is the relative change of a site's output in
the first Adam step, per unit of learning rate, over the channels that the delta reaches; the
median over a kind's sites is taken.  tau is then the one knob: the relative change per step.

Many deltas that each obey tau still add up: a structure of 1 % of MiniLM would move what enters
the head by four times its size in the first step, and training never leaves chance.  So rates are
lowered together where that change, measured as well, would exceed `CROWD` times tau.

The first step cannot see what comes second: while one factor of a product is zero, the other has
no gradient.  A parameter that is not zero at init therefore moves by at most tau of its own size
in a step: a rate that suits the zero factor can be many times the size of the drawn one.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from searchpet.processes import from_first

HEAD, HEAD_LR = "head", 5e-3  # the output layer, and its rate, whatever the method
DRAWN = "drawn"  # the relative rate of parameters that are not zero at init
CROWD = 4.5  # at tau 0.1 a change of 0.45: on TREC-6 at 1 % that learns, 0.6 may stay at chance
SMALL = 1e-2  # of the rates when the joint change is measured: far inside what is linear
STEP = 1e-3  # of the probe; the first step is linear in it for every kind that is silent at init


class Part(Protocol):
    """A module that adds to a site's output; delta(x, y, z) is what it adds."""

    @property
    def kind(self) -> str: ...
    @property
    def delta(self) -> nn.Module: ...


class Parts(Protocol):
    """What is hooked in: `searchpet.grafts.Grafts`, or another library's.

    watch, if set, is called with (number of the part, x, y) when it runs;  z: gates of each.
    """

    z: list[Tensor]
    watch: Callable[[int, Tensor | None, Tensor], None] | None

    @property
    def grafts(self) -> Sequence[Part]: ...


@dataclass(frozen=True)
class Calibration:
    """Learning rates of what is grafted on a model, by one small batch; alike in all processes.

    loss() runs the model on the batch; head: names of its parameters; lr: of every kind, where it
    is given by hand.
    """

    model: nn.Module
    grafts: Parts
    loss: Callable[[], Tensor]
    head: Collection[str]
    lr: float | None = None

    def rates(self, tau: float) -> dict[str, float]:
        """Learning rate of each kind and of the head; `DRAWN`, where none is given by hand."""
        probes = from_first(lambda: probe(self.grafts, self.loss))
        if self.lr is not None:
            return {**dict.fromkeys(probes, self.lr), HEAD: HEAD_LR}
        return rates(probes, tau, {HEAD: HEAD_LR, DRAWN: tau})

    def room(self, rates: Mapping[str, float], tau: float) -> float:
        """A factor <= 1 on the rates, at which all deltas together move what enters the head by
        no more than CROWD tau in a step, gates as they are; 1 where rates are given by hand.
        """
        if self.lr is not None:
            return 1.0
        owners = {name.rpartition(".")[0]: None for name in sorted(self.head)}
        entrance = [self.model.get_submodule(name) for name in owners if name]
        change = from_first(lambda: together(self.grafts, self.loss, entrance, rates))
        return min(1.0, CROWD * tau / change) if change > 0 else 1.0


def probe(grafts: Parts, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Relative output change per unit of learning rate, by kind.

    loss() runs the backbone on a small batch, gates as they are.  Parameters are left as they
    were; gradients of the deltas are not touched.  A kind that the batch does not reach counts as
    1, as a scale does.
    """
    seen: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def remember(i: int, x: Tensor | None, y: Tensor) -> None:
        seen[i] = (x if x is None else x.detach(), y.detach(), grafts.z[i])

    grafts.watch = remember
    try:
        value = loss()
    finally:
        grafts.watch = None
    parameters = [p for graft in grafts.grafts for p in graft.delta.parameters()]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    sign = {id(p): g.sign() for p, g in zip(parameters, gradients, strict=True) if g is not None}
    ratios: dict[str, list[float]] = defaultdict(list)
    for i, graft in enumerate(grafts.grafts):
        if i in seen:
            ratio = _moved(graft.delta, seen[i], sign)
            if ratio > 0:
                ratios[graft.kind].append(ratio)
    kinds = {graft.kind for graft in grafts.grafts}
    return {kind: statistics.median(ratios[kind] or [1.0]) for kind in sorted(kinds)}


def rates(probes: dict[str, float], tau: float, fixed: dict[str, float]) -> dict[str, float]:
    """Learning rates: tau / probe for each kind; `fixed` overrides and adds (the head's)."""
    return {**{kind: tau / value for kind, value in probes.items()}, **fixed}


def lowered(rates: Mapping[str, float], factor: float) -> dict[str, float]:
    """Rates of the kinds times a factor."""
    return {kind: rate if kind in (HEAD, DRAWN) else factor * rate
            for kind, rate in rates.items()}


def groups(grafts: Iterable[Part], head: Sequence[nn.Parameter], rates: Mapping[str, float],
           ) -> list[dict[str, Any]]:
    """Parameter groups `{params, kind, lr}` of deltas at their init, and of the head.

    A kind has one group for what is zero, and one for what is drawn, if the rate of that is lower.
    rates: of each kind and of `head`; with `DRAWN`, drawn parameters move by at most that share of
    their root mean square in a step.
    """
    kinds: dict[str, list[nn.Parameter]] = defaultdict(list)
    for graft in grafts:
        kinds[graft.kind].extend(graft.delta.parameters())
    found = []
    for kind, parameters in kinds.items():
        drawn = [p for p in parameters if bool((p != 0).any())]
        most = rates.get(DRAWN, float("inf")) * _size(drawn)
        if most < rates[kind]:
            zero = [p for p in parameters if not bool((p != 0).any())]
            found += [(kind, zero, rates[kind]), (kind, drawn, most)]
        else:
            found.append((kind, parameters, rates[kind]))
    found.append((HEAD, list(head), rates[HEAD]))
    return [{"params": p, "kind": kind, "lr": lr} for kind, p, lr in found if p]


@torch.no_grad()
def _size(parameters: Sequence[Tensor]) -> float:
    """Root mean square of what is not 0; infinity where nothing is."""
    count = sum(int((p != 0).sum()) for p in parameters)
    total = sum(float(p.double().square().sum()) for p in parameters)
    return float((total / count) ** 0.5) if count else float("inf")


def together(grafts: Parts, loss: Callable[[], Tensor], entrance: Sequence[nn.Module],
             rates: Mapping[str, float]) -> float:
    """Relative change of what enters the head when every delta takes its first Adam step.

    entrance: modules of the head; the first that is called counts.  rates: of each kind.
    Extrapolated from a step of SMALL times the rates.  Parameters are left as they were.
    Where none of the modules is called with a tensor, 0.
    """
    seen: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.append(args[0].detach().float())

    steps = [(p, rates[g.kind]) for g in grafts.grafts for p in g.delta.parameters()]
    hooks = [module.register_forward_pre_hook(remember) for module in entrance]
    try:
        gradients = torch.autograd.grad(loss(), [p for p, _ in steps], allow_unused=True)
        if not seen:
            return 0.0
        before, kept = seen[0], [p.detach().clone() for p, _ in steps]
        seen.clear()
        with torch.no_grad():
            for (p, rate), g in zip(steps, gradients, strict=True):
                if g is not None:
                    p.sub_(SMALL * rate * g.sign())
            loss()
            for (p, _), old in zip(steps, kept, strict=True):
                p.copy_(old)
    finally:
        for hook in hooks:
            hook.remove()
    return float((seen[0] - before).norm() / before.norm() / SMALL)


@torch.no_grad()
def _moved(delta: torch.nn.Module, args: tuple[Any, Tensor, Tensor],
           sign: dict[int, Tensor]) -> float:
    """|delta(theta - STEP sign(g)) - delta(theta)| / |y| / STEP on the channels it reaches."""
    y = args[1].float()
    before = delta(*args).float().expand_as(y)
    kept = [p.detach().clone() for p in delta.parameters()]
    for p in delta.parameters():
        if id(p) in sign:
            p.sub_(STEP * sign[id(p)])
    change = delta(*args).float().expand_as(y) - before
    for p, old in zip(delta.parameters(), kept, strict=True):
        p.copy_(old)
    reached = change.flatten(0, -2).abs().amax(0) > 0
    size = y[..., reached].norm()
    return float(change.norm() / size / STEP) if size > 0 else 0.0
