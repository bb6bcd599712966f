"""The head's start: a linear classifier on what the untuned backbone makes of the training data.

A freshly drawn head learns the class frequencies first.  Meanwhile its gradients push what all
examples have in common, and deltas follow at full rate: in the first 11 steps of a training on
TREC-6 the examples' spread around their mean fell from 0.66 of their size to 0.12, and with large
rates it may never come back.  With the output layer fitted before anything else trains, the first
gradients already tell examples apart.  Linear probing, then fine-tuning: Kumar et al. 2022,
arXiv:2202.10054.  See experiments/training/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchpet.errors import InputError

Batch = dict[str, Tensor]
ROWS = 1024  # rows that the head is fitted to: the work of about ten steps of training
SHRINK = (1e-2, 1e-1, 1.0, 10.0)  # ridge penalties on the weights of standardised features
HELD = 4  # every fourth row tells which of them to take
FLOOR = 0.1  # of a feature's size: what differs less than that is no ground to build on
TURNS = 200  # at most, of L-BFGS


def fit_output(model: nn.Module, head: Iterable[str], batches: Sequence[Batch],
               run: Callable[[Batch], Tensor]) -> bool:
    """Fit the last linear layer of the head to the batches; the rest of the head stays drawn.

    head: names of the head's parameters; batches: with labels (b,); run(batch) -> logits (b, k),
    the model in evaluation mode.
    Classes if labels are integers (cross-entropy), numbers otherwise (squared error).
    False, and nothing changes, where the logits are not rows of a linear layer's output.
    """
    found = [_features(model, head, batch, run) for batch in batches]
    if not found or any(f is None for f in found):
        return False
    layer = found[0][0]  # type: ignore[index]
    x = torch.cat([f[1] for f in found if f is not None]).double()
    y = torch.cat([batch["labels"] for batch in batches]).to(x.device)
    mean, spread = x.mean(0), x.std(0)
    spread = spread.clamp_min(FLOOR * float(x.square().mean().sqrt()) or 1.0)
    if layer.bias is None:  # nothing that could make up for what is taken off
        mean = torch.zeros_like(mean)
    problem = Problem(layer.out_features, layer.bias is not None)
    weight, bias = problem.solve((x - mean) / spread, y)
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise InputError("a head must be fitted to finite features, but the backbone gives some "
                         "that are not; check the checkpoint, or take --precision fp32")
    with torch.no_grad():
        layer.weight.copy_(weight / spread)
        if layer.bias is not None:
            layer.bias.copy_(bias - (weight / spread) @ mean)
    return True


def _features(model: nn.Module, head: Iterable[str], batch: Batch, run: Callable[[Batch], Tensor],
              ) -> tuple[nn.Linear, Tensor] | None:
    """The head's last linear layer and what enters it, (b, d), where the logits come from it.

    A layer may answer at every position, of which the model picks one: the one with its logits.
    """
    seen: list[tuple[Any, Tensor, Tensor]] = []
    owners = [model.get_submodule(name) for name in
              dict.fromkeys(name.rpartition(".")[0] for name in sorted(head)) if name]
    hooks = [m.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
             for m in owners if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            logits = run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        return None
    layer, x, out = seen[-1]
    if out.dim() == 3:
        at = (out - logits.unsqueeze(1)).abs().sum(-1).argmin(1)
        rows = torch.arange(len(at), device=at.device)
        x, out = x[rows, at], out[rows, at]
    if out.shape != logits.shape or not torch.equal(out.float(), logits.float()):
        return None
    return layer, x


@dataclass(frozen=True)
class Problem:
    """A linear map of (n, d) standardised float64 features to k outputs; biased: with a bias."""

    outputs: int
    biased: bool

    def solve(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (k, d) and biases (k,); the penalty is chosen by rows held out."""
        held = torch.arange(len(x), device=x.device) % HELD == HELD - 1
        if not bool(held.any()):
            return self.least(x, y, SHRINK[-1])
        losses = [float(self.loss(*self.least(x[~held], y[~held], shrink), x[held], y[held]))
                  for shrink in SHRINK]
        return self.least(x, y, SHRINK[losses.index(min(losses))])

    def least(self, x: Tensor, y: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        """Weights and biases of least loss with a penalty."""
        weight = x.new_zeros(self.outputs, x.shape[1], requires_grad=True)
        bias = x.new_zeros(self.outputs, requires_grad=self.biased)
        solver = torch.optim.LBFGS([weight, bias] if self.biased else [weight], max_iter=TURNS,
                                   line_search_fn="strong_wolfe")

        def penalised() -> Tensor:
            solver.zero_grad()
            value = self.loss(weight, bias, x, y) + shrink * weight.square().sum()
            value.backward()
            return value

        solver.step(penalised)
        return weight.detach(), bias.detach()

    def loss(self, weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of classes, squared error of numbers."""
        out = x @ weight.T + bias
        if y.is_floating_point():
            return F.mse_loss(out, y.double().view_as(out))
        return F.cross_entropy(out, y)
