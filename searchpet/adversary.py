"""Adversary: the loss at the worst small perturbation of the input embeddings.

Projected gradient ascent on what the token embeddings give out, one perturbation per text, as in
FreeLB (Zhu et al. 2020, arXiv:1909.11764) and in Zheng et al. 2022 (robust lottery tickets, ACL):

    delta_0 random, |delta_0| = start |E|;   delta_k+1 = delta_k + size |E| g_k / |g_k|

with g_k the gradient of the loss in delta_k, |.| the norm over all tokens of a text, E its
embeddings.  Differences: sizes are shares of |E|, since embeddings of one family are many times
longer than another's; delta_k is never longer than (start + k size) |E|, so nothing is projected;
the worst of all iterates counts, not the last; all passes have the same dropout.

For models that read token ids.  Images have no embeddings to look up, so they are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.errors import InputError

Batch = dict[str, Tensor]


def adversarial(model: nn.Module, loss: Callable[[Batch], Tensor], batch: Batch, *, steps: int,
                size: float, start: float, generator: torch.Generator) -> Tensor:
    """The highest loss among the start and `steps` steps of ascent; differentiable in the weights.

    loss(batch) runs the model.  size, start: shares of each text's embedding norm.  Padding (0 in
    `attention_mask`) is not perturbed; of an encoder-decoder only what the encoder reads is.
    steps = 0 is the plain loss.  Takes steps + 1 forward passes and `steps` backward passes to the
    embeddings.  No `.grad` is written, and no hook stays.
    Raises InputError for a value out of its range and a model that looks up no `input_ids`.
    """
    check(steps, size, start)
    if steps == 0:
        return loss(batch)
    found = tables(model)
    noise = _Noise(batch, start, generator)
    with noise.inside(found):
        worst = None
        for step in range(steps + 1):
            last = step == steps
            with contextlib.nullcontext() if last else _drawn_again(model):
                value = loss(batch)
            if worst is None or bool(value > worst):
                worst = value
            if not last:
                noise.climb(value, size)
    assert worst is not None  # there is a first pass
    return worst


def check(steps: int, size: float, start: float) -> None:
    """Raise InputError for a value out of its range."""
    for name, value in (("steps", steps), ("size", size), ("start", start)):
        if not value >= 0:
            raise InputError(f"{name} of an adversary must be at least 0, but got {value}; raise "
                             "it, or take 0 steps for none")


def tables(model: nn.Module) -> list[nn.Embedding]:
    """The embeddings that may read token ids: of the size of the model's input embeddings.

    An encoder may have a copy of its own.  Raises InputError where there are none.
    """
    find = getattr(model, "get_input_embeddings", None)
    own = find() if find is not None else None
    if not isinstance(own, nn.Embedding):
        raise InputError("an adversary perturbs the embeddings of tokens, but this model looks up "
                         "none: it does not read text; take a strategy without one")
    return [m for m in model.modules()
            if isinstance(m, nn.Embedding) and m.weight.shape == own.weight.shape]


class _Noise:
    """What is added to the embeddings (batch, tokens, d); starts at the first pass."""

    def __init__(self, batch: Batch, start: float, generator: torch.Generator) -> None:
        if "input_ids" not in batch:
            raise InputError("an adversary perturbs the embeddings of input_ids, but a batch has "
                             f"{', '.join(batch)}; take a strategy without one")
        self.ids, self.mask = batch["input_ids"], batch.get("attention_mask")
        self.start, self.generator = start, generator
        self.delta: Tensor | None = None

    @contextlib.contextmanager
    def inside(self, found: list[nn.Embedding]) -> Iterator[None]:
        """Tables with the noise; without it again afterwards, whatever happens."""
        handles = [m.register_forward_hook(self._add, with_kwargs=True) for m in found]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        ids = args[0] if args else next(iter(kwargs.values()))
        if ids.shape != self.ids.shape or not torch.equal(ids, self.ids.to(ids.device)):
            return None  # positions, or what a decoder reads
        if self.delta is None:
            self._begin(output.detach().float())
        assert self.delta is not None
        return output + self.delta.to(output.dtype)

    def _begin(self, embedded: Tensor) -> None:
        """Random noise of the starting size; embedded (batch, tokens, d)."""
        mask = torch.ones_like(self.ids) if self.mask is None else self.mask
        self.real = mask.to(embedded)[..., None]  # (batch, tokens, 1)
        self.norm = _norm(embedded * self.real)  # (batch, 1, 1)
        noise = torch.randn(embedded.shape, generator=self.generator).to(embedded) * self.real
        self.delta = self._scaled(noise, self.start).requires_grad_()

    def _scaled(self, direction: Tensor, share: float) -> Tensor:
        return share * self.norm * direction / _norm(direction).clamp(min=1e-12)

    def climb(self, value: Tensor, size: float) -> None:
        """A step up.  The graph is kept: this value may turn out to be the worst."""
        if self.delta is None:
            raise InputError("an adversary perturbs the embeddings of input_ids, but the model "
                             "looks up none of this batch; take a strategy without one")
        (slope,) = torch.autograd.grad(value, self.delta, retain_graph=True)
        step = self._scaled(slope * self.real, size)
        self.delta = (self.delta.detach() + step).requires_grad_()


def _norm(x: Tensor) -> Tensor:
    """(batch, tokens, d) -> (batch, 1, 1)."""
    found: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return found


def _drawn_again(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Random numbers drawn inside are drawn again after it: dropout of the next pass, say."""
    device = next(model.parameters()).device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
