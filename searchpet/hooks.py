"""Hooks: what one module's deltas do to what goes in and what comes out.

`change` works on tensors, so that rows of a batch may have deltas of their own; `__call__` is what
torch calls.  Classes and no closures: models with hooks can be copied, pickled and compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from searchpet.deltas import Delta
from searchpet.site import Site

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Graft:
    """A delta at a site; `key` names it in files.

    reads, writes: features of the module's input and output that the delta sees and changes, as
    indices; None for all of them.  path: where the site is now, if not at `site.path`: removed
    layers renumber the others, while names in files stay.  sparse: masks of the delta's
    parameters by name, where some are 0 for good.
    """

    site: Site
    kind: str
    delta: Delta
    reads: Tensor | None = None
    writes: Tensor | None = None
    path: str = ""
    sparse: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.writes is None and self.site.index:
            slices = [torch.arange(a, b) for a, b in self.site.index]
            object.__setattr__(self, "writes", torch.cat(slices))

    @property
    def key(self) -> str:
        return f"{self.site.path}:{self.site.role}:{self.kind}"

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        if self.sparse is not None:
            return sum(int(mask.sum()) for mask in self.sparse.values())
        return sum(p.numel() for p in self.delta.parameters())

    @property
    def at(self) -> str:
        """Path of the module that is hooked."""
        return self.path or self.site.path


class Owner(Protocol):
    """Who has the deltas, their gates, and the inputs of modules that were remembered."""

    grafts: tuple[Graft, ...]
    deltas: nn.ModuleList
    z: list[Tensor]
    inputs: dict[str, Tensor]

    def see(self, i: int, x: Tensor | None, y: Tensor) -> None: ...


class Remember:
    """Pre-hook: keeps a module's input for a block site that ends elsewhere."""

    before = True

    def __init__(self, owner: Owner, source: str) -> None:
        self.owner, self.source = owner, source

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.keep(first(args, kwargs))

    def keep(self, x: Tensor) -> None:
        self.owner.inputs[self.source] = x


class Weigh(nn.Module):
    """Parametrization: W -> W with a `weight` delta, on the rows that are the site's."""

    def __init__(self, owner: Owner, i: int, module: nn.Module) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple: no submodule, the owner holds the deltas
        self.i, self.turned = i, hasattr(module, "nf")  # GPT-2's Conv1D stores the transpose

    def forward(self, weight: Tensor) -> Tensor:
        (owner,), i = self.owner, self.i
        z, rows = owner.z[i], owner.grafts[i].writes
        if z.dim() > 1:
            raise ValueError("masks of weights have no gates per example, but z has "
                             f"{z.shape[0]} rows")
        matrix = weight.T if self.turned else weight
        part = matrix if rows is None else matrix[rows]
        change = owner.deltas[i](part, part, z).to(matrix.dtype)
        new = matrix + change if rows is None else matrix.index_add(0, rows, change)
        return new.T if self.turned else new


class Enter:
    """Pre-hook: x -> x with the `input` deltas of one module."""

    before = True

    def __init__(self, owner: Owner, members: Sequence[int]) -> None:
        self.owner, self.members = owner, members

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replace_first(args, kwargs, self.change(first(args, kwargs)))

    def change(self, x: Tensor) -> Tensor:
        """x (batch, ..., d_in) as the module will see it."""
        changed = x
        for i in self.members:
            z = _spread(self.owner.z[i], x)
            self.owner.see(i, x, x)
            changed = changed + self.owner.deltas[i](x, x, z).to(x.dtype)
        return changed


class Act:
    """Forward hook: y -> y with the deltas of one module."""

    before = False

    def __init__(self, owner: Owner, members: Iterable[int]) -> None:
        self.owner = owner
        grafts = owner.grafts
        parallel = [i for i in members if grafts[i].delta.stage == "parallel"]
        self.pointwise = [i for i in parallel
                          if grafts[i].delta.pointwise and grafts[i].writes is None]
        self.parallel = [i for i in parallel if i not in self.pointwise]
        self.sequential = [i for i in members if grafts[i].delta.stage == "sequential"]
        self.output = [i for i in members if grafts[i].delta.stage == "output"]
        # only a whole layer's mask reads what goes in
        self.reads_x = bool(self.parallel) or any(
            grafts[i].site.form == "layer" for i in self.output)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        changed = self.change(first(args, kwargs) if self.reads_x else None, y)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def change(self, x: Tensor | None, y: Tensor) -> Tensor:
        """y (batch, ..., d_out) of a module that was given x; x is None unless `reads_x`."""
        changed = self._pointwise(y)
        for i in self.parallel:
            source = self.owner.grafts[i].site.source
            seen = self.owner.inputs[source] if source else x
            changed = self._add(i, changed, seen, y, fresh=changed is not y)
        settled = changed
        for i in self.sequential:
            changed = self._add(i, changed, None, settled, fresh=changed is not settled)
        settled = changed
        for i in self.output:
            changed = self._add(i, changed, x, settled, fresh=changed is not settled)
        return changed

    def _pointwise(self, y: Tensor) -> Tensor:
        """(1 + sum g) * y + sum c in one pass, over the deltas that are no more than that."""
        g: Tensor | None = None
        c: Tensor | None = None
        for i in self.pointwise:
            self.owner.see(i, None, y)
            part = self.owner.grafts[i].delta.affine(_spread(self.owner.z[i], y))
            assert part is not None  # what `pointwise` promises
            g, c = _plus(g, part.g), _plus(c, part.c)
        wide = y.float() if y.dtype in HALF else y  # 1 + g in half precision would lose g
        if g is not None:
            wide = wide * (1 + g) if c is None else torch.addcmul(c, wide, 1 + g)
        elif c is not None:
            wide = wide + c
        return y if wide is y else wide.to(y.dtype)

    def _add(self, i: int, total: Tensor, x: Tensor | None, y: Tensor, fresh: bool) -> Tensor:
        """total + delta_i; in place where `total` is a sum made here, which nothing else holds."""
        reads, index = self.owner.grafts[i].reads, self.owner.grafts[i].writes
        x = x if x is None or reads is None else x.index_select(-1, reads)
        part = y if index is None else y.index_select(-1, index)
        if y.dtype in HALF and not torch.is_autocast_enabled(y.device.type):
            x, part = x if x is None else x.float(), part.float()  # deltas are fp32
        self.owner.see(i, x, part)
        delta = self.owner.deltas[i](x, part, _spread(self.owner.z[i], y)).to(y.dtype)
        if index is not None:
            return total.index_add(-1, index, delta.expand_as(part))
        return total.add_(delta) if fresh else total + delta


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is zero."""
    return a if b is None else b if a is None else a + b


def first(args: Any, kwargs: Any) -> Tensor:
    """A module's first tensor argument; some modules are called with keywords only."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a module with deltas must be called with a tensor")


def replace_first(args: Any, kwargs: Any, new: Tensor) -> tuple[Any, Any]:
    """The arguments with `new` in place of the tensor that `first` finds."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], new, *args[i + 1 :]), kwargs
    name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: new}


def _spread(z: Tensor, y: Tensor) -> Tensor:
    """Bring z to y's rank: (width,) stays, (batch, width) -> (batch, 1, ..., width)."""
    if z.dim() == 1:
        return z
    if z.shape[0] != y.shape[0]:
        raise ValueError(f"per-example gates need y batch first, but z has {z.shape[0]} rows and "
                         f"y {y.shape[0]}")
    return z.view(z.shape[0], *(1,) * (y.dim() - 2), z.shape[-1])


def stored_as(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A masked module's weight, stored as that of a plain one, is found under torch's own name."""
    if f"{prefix}weight" in state:
        state[f"{prefix}parametrizations.weight.original"] = state.pop(f"{prefix}weight")
