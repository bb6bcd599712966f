"""Grafts: deltas hooked into a backbone.

`weight` deltas change a module's weight, as parametrizations; hooks run the other stages in order:
`input` deltas change its x before anything sees it;
`parallel` deltas of every site of the module see the same x and y and their results add;
`sequential` deltas act on the result, `output` deltas on all of that.  The backbone's forward
runs as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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


class Grafts(nn.Module):
    """The deltas of a model, hooked in.  `z[i]` is the gate of delta i, (width,) or
    (batch, width); it starts at ones and is not part of the state.
    """

    def __init__(self, model: nn.Module, grafts: Sequence[Graft]) -> None:
        super().__init__()
        self.grafts = tuple(grafts)
        self.deltas = nn.ModuleList(graft.delta for graft in grafts)
        weight = next(model.parameters())
        self.deltas.to(weight.device)
        self.z: list[Tensor] = [torch.ones(g.delta.width, device=weight.device) for g in grafts]
        self.watch: Callable[[int, Tensor | None, Tensor], None] | None = None
        self._inputs: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._weighed: list[nn.Module] = []
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        at: dict[str, list[int]] = defaultdict(list)
        for i, graft in enumerate(self.grafts):
            at[graft.at].append(i)
        for path, members in at.items():
            for i in [i for i in members if self.grafts[i].delta.stage == "weight"]:
                module = model.get_submodule(path)
                parametrize.register_parametrization(module, "weight", _Weigh(self, i, module))
                self._weighed.append(module)
            members = [i for i in members if self.grafts[i].delta.stage != "weight"]
            enter = [i for i in members if self.grafts[i].delta.stage == "input"]
            if enter:
                self._handles.append(model.get_submodule(path).register_forward_pre_hook(
                    _Enter(self, enter), with_kwargs=True))
            members = [i for i in members if i not in enter]
            if not members:
                continue
            sources = {self.grafts[i].site.source for i in members
                       if self.grafts[i].delta.stage == "parallel"} - {None}
            for source in sources:
                hook = _Remember(self._inputs, str(source))
                self._handles.append(
                    model.get_submodule(str(source)).register_forward_pre_hook(
                        hook, with_kwargs=True))
            hook_in = _Act(self, members)
            self._handles.append(
                # first of all hooks: others that record outputs then see the changed ones
                model.get_submodule(path).register_forward_hook(
                    hook_in, with_kwargs=True, prepend=True))

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Grafts:
        """`model.to(device)` moves the gates as well: they are no parameters and no buffers."""
        self.z = [fn(z) for z in self.z]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def see(self, i: int, x: Tensor | None, y: Tensor) -> None:
        """What delta i is given in this pass; `watch`, if set, is told."""
        if self.watch is not None:
            self.watch(i, x, y)

    def detach(self) -> None:
        """Remove all hooks; the backbone is as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._weighed:
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

    def tensors(self) -> dict[str, Tensor]:
        """Trained tensors by name, `path:role:kind/parameter`; of sparse ones what is kept."""
        return {f"{g.key}/{name}": p.detach() if g.sparse is None else
                p.detach()[g.sparse[name].to(p.device)]
                for g in self.grafts for name, p in g.delta.named_parameters()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what `tensors` gave back in; names and shapes are the caller's to check."""
        for g in self.grafts:
            for name, p in g.delta.named_parameters():
                value = tensors[f"{g.key}/{name}"].to(p)
                if g.sparse is None:
                    p.copy_(value)
                else:
                    p.masked_scatter_(g.sparse[name].to(p.device), value)


class _Remember:
    """Pre-hook: keeps a module's input for a block site that ends elsewhere."""

    def __init__(self, inputs: dict[str, Tensor], source: str) -> None:
        self.inputs, self.source = inputs, source

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inputs[self.source] = _first(args, kwargs)


class _Weigh(nn.Module):
    """Parametrization: W -> W with a `weight` delta, on the rows that are the site's."""

    def __init__(self, owner: Grafts, i: int, module: nn.Module) -> None:
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
        part = matrix if rows is None else matrix[rows.to(matrix.device)]
        change = owner.deltas[i](part, part, z).to(matrix.dtype)
        new = matrix + change if rows is None else matrix.index_add(
            0, rows.to(matrix.device), change)
        return new.T if self.turned else new


class _Enter:
    """Pre-hook: x -> x with the `input` deltas of one module."""

    def __init__(self, owner: Grafts, members: Sequence[int]) -> None:
        self.owner, self.members = owner, members

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = changed = _first(args, kwargs)
        for i in self.members:
            z = _spread(self.owner.z[i], x)
            self.owner.see(i, x, x)
            changed = changed + self.owner.deltas[i](x, x, z).to(x.dtype)
        return _replace_first(args, kwargs, changed)


class _Act:
    """Forward hook: y -> y with the deltas of one module."""

    def __init__(self, owner: Grafts, members: Iterable[int]) -> None:
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
        x = _first(args, kwargs) if self.reads_x else None
        changed = self._pointwise(y)
        for i in self.parallel:
            source = self.owner.grafts[i].site.source
            seen = self.owner._inputs[source] if source else x
            changed = self._add(i, changed, seen, y, fresh=changed is not y)
        settled = changed
        for i in self.sequential:
            changed = self._add(i, changed, None, settled, fresh=changed is not settled)
        settled = changed
        for i in self.output:
            changed = self._add(i, changed, x, settled, fresh=changed is not settled)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

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
        x = x if x is None or reads is None else x.index_select(-1, reads.to(x.device))
        part = y if index is None else y.index_select(-1, index.to(y.device))
        if y.dtype in HALF and not torch.is_autocast_enabled(y.device.type):
            x, part = x if x is None else x.float(), part.float()  # deltas are fp32
        self.owner.see(i, x, part)
        delta = self.owner.deltas[i](x, part, _spread(self.owner.z[i], y)).to(y.dtype)
        if index is not None:
            return total.index_add(-1, index.to(y.device), delta.expand_as(part))
        return total.add_(delta) if fresh else total + delta


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is zero."""
    return a if b is None else b if a is None else a + b


def _first(args: Any, kwargs: Any) -> Tensor:
    """A module's first tensor argument; some modules are called with keywords only."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a module with deltas must be called with a tensor")


def _replace_first(args: Any, kwargs: Any, new: Tensor) -> tuple[Any, Any]:
    """The arguments with `new` in place of the tensor that `_first` finds."""
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
