"""Slices of linears, and the modules that stand where a whole sublayer is gone.

Every change goes through `Edits`, which can take it back.  A linear is nn.Linear, W (d_out, d_in),
or a transposed one (GPT-2's Conv1D), W (d_in, d_out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


class Edits:
    """Attributes set, with what they were before."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, holder: Any, name: str, value: Any) -> None:
        """`holder.name = value`."""
        self._before.append((holder, name, getattr(holder, name, _ABSENT)))
        setattr(holder, name, value)

    def put(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Another module at a path."""
        holder, _, name = path.rpartition(".")
        self.set(model.get_submodule(holder), name, module)

    def undo(self) -> None:
        """Everything as it was, the last change first."""
        while self._before:
            holder, name, value = self._before.pop()
            if value is _ABSENT:
                delattr(holder, name)
            else:
                setattr(holder, name, value)


# --- linears ------------------------------------------------------------------------------------


def plain(linear: nn.Module) -> bool:
    """Whether it is a linear that slices as one: not quantised, not wrapped."""
    if type(linear) is nn.Linear:
        return True
    weight = getattr(linear, "weight", None)
    if isinstance(linear, nn.Linear) or not isinstance(weight, nn.Parameter):
        return False
    return [*weight.shape] == [getattr(linear, name, None) for name in ("nx", "nf")]


def keep_outputs(edits: Edits, linear: nn.Module, index: Sequence[int]) -> None:
    """y -> y[..., index]: rows of W, and of the bias."""
    transposed = not isinstance(linear, nn.Linear)
    edits.set(linear, "weight", _select(linear.weight, 1 if transposed else 0, index))
    if linear.bias is not None:
        edits.set(linear, "bias", _select(linear.bias, 0, index))
    edits.set(linear, "nf" if transposed else "out_features", len(index))


def keep_inputs(edits: Edits, linear: nn.Module, index: Sequence[int]) -> None:
    """The same on x[..., index], as if the other inputs were 0: columns of W."""
    transposed = not isinstance(linear, nn.Linear)
    edits.set(linear, "weight", _select(linear.weight, 0 if transposed else 1, index))
    edits.set(linear, "nx" if transposed else "in_features", len(index))


def _select(weight: Any, dim: int, index: Sequence[int]) -> nn.Parameter:
    rows = torch.tensor(index, dtype=torch.int64, device=weight.device)
    chosen = weight.detach().index_select(dim, rows)
    return nn.Parameter(chosen, requires_grad=weight.requires_grad)


# --- what stands where something is gone --------------------------------------------------------


class Narrowed:
    """A config as one attention sees it: `own` values first, then the whole model's."""

    def __init__(self, whole: Any, **own: Any) -> None:
        self.whole = whole
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        if name == "whole" or name.startswith("__"):  # asked while a copy is being made
            raise AttributeError(name)
        return getattr(self.whole, name)


class Empty(nn.Module):
    """Where a linear lost all its outputs: x (..., d_in) -> (..., 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], 0)


class Constant(nn.Module):
    """Where a linear lost all its inputs: x (..., anything) -> its bias, (..., size); 0 without.

    The result is one row, expanded.
    """

    bias: nn.Parameter | None
    weight = None  # T5 asks for the dtype of its weight, if it has one

    def __init__(self, size: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.size = size
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        row: Tensor = x.new_zeros(1) if self.bias is None else self.bias
        return row.expand(*x.shape[:-1], self.size)


class NoAttention(nn.Module):
    """Where an attention lost all its heads: x (batch, length, d) -> (y, no weights).

    y is the output projection's bias, or 0; the norm of x + y where the attention does that by
    itself (`norm` names it).  A decoder's leaves one zero per token in the cache: the length of
    the cache's first layer is taken for the length of the text.

    shared: the family's attentions hand on a position bias, between y and the weights.
    owner:  the attention that owns that bias, stripped of its projections, if this was the one.
    """

    def __init__(self, size: int, bias: nn.Parameter | None, layer_idx: int | None, *,
                 norm: tuple[str, nn.Module] | None = None, shared: bool = False,
                 owner: nn.Module | None = None) -> None:
        super().__init__()
        self.output = Constant(size, bias)
        self.layer_idx = layer_idx
        self.norm = norm[0] if norm else None
        if norm:
            self.add_module(*norm)  # under its own name: its path is a site's
        self.shared = shared
        self.owner = owner

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        y: Tensor = self.output(x)
        if self.norm:
            normalise: Any = self.get_submodule(self.norm)
            y = normalise(x + y)
        past, total = self._seen(cache, x)
        if not self.shared:
            return y, None
        position_bias = kwargs.get("position_bias")
        if position_bias is None and self.owner is not None:
            compute: Any = self.owner.compute_bias
            position_bias = compute(x.shape[1], total, device=x.device, past_seen_tokens=past)
        return y, position_bias, None

    def _seen(self, cache: Any, x: Tensor) -> tuple[Any, int]:
        """Tokens in the cache before these, and its length with them."""
        if cache is None or self.layer_idx is None:
            return 0, x.shape[1]
        past = cache.get_seq_length(self.layer_idx)
        past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        own = getattr(cache, "self_attention_cache", cache)
        zeros = x.new_zeros(x.shape[0], 1, x.shape[1], 1)  # (batch, kv heads, length, head size)
        keys, _ = own.update(zeros, zeros, self.layer_idx)
        return past, keys.shape[-2]
