"""Site: a position in a frozen backbone where deltas may act.  A value, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["linear", "norm", "block", "layer"]


@dataclass(frozen=True)
class Site:
    """One position.  `(path, role)` is unique in a model.

    path:   module whose output the deltas change, as in `model.get_submodule(path)`.
    role:   canonical name: `attention.query`, `ffn.block`, `norm.attention`, ...
    layer:  index of the block in its stack; -1 before the first, the block count after the last.
    form:   `linear` (x is the layer's input), `norm`, `block` (output of attention or of the
            feed-forward part, before the residual addition), or `layer` (a whole block of the
            stack, from one residual stream to the next).
    part:   the stack: `encoder` or `decoder`.
    d_in:   size of x's last dimension;  d_out: size of y's last dimension (of the slice, if any).
    heads:  attention heads of the block, or None.
    kv_heads: heads of keys and values, each shared by `heads / kv_heads` queries; None if unknown.
    index:  `((start, stop), ...)` ranges of output features when the module fuses several
            projections and this site is one of them; None for the whole output.
    source: path of the module whose *input* is the block's x (form `block` only).
    """

    path: str
    role: str
    layer: int
    form: Form
    part: str
    d_in: int
    d_out: int
    heads: int | None = None
    kv_heads: int | None = None
    index: tuple[tuple[int, int], ...] | None = None
    source: str | None = None
