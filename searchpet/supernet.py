"""Deltas hooked into a backbone: `graft` for given deltas, `Supernet` for all of a space.

One forward hook per module: parallel deltas of every site of that module see the same x and y and
their results add; sequential deltas then act on the result.  The backbone's forward runs as it is.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.deltas import Delta
from searchpet.site import Site
from searchpet.space import Space, make

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Graft:
    """A delta at a site; `key` names it in files."""

    site: Site
    kind: str
    delta: Delta

    @property
    def key(self) -> str:
        return f"{self.site.path}:{self.site.role}:{self.kind}"


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
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        at: dict[str, list[int]] = defaultdict(list)
        for i, graft in enumerate(self.grafts):
            at[graft.site.path].append(i)
        for path, members in at.items():
            sources = {self.grafts[i].site.source for i in members
                       if self.grafts[i].delta.stage == "parallel"} - {None}
            for source in sources:
                hook = _Remember(self._inputs, str(source))
                self._handles.append(
                    model.get_submodule(str(source)).register_forward_pre_hook(
                        hook, with_kwargs=True))
            hook_in = _Act(self, members)
            self._handles.append(
                model.get_submodule(path).register_forward_hook(hook_in, with_kwargs=True))

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

    def tensors(self) -> dict[str, Tensor]:
        """Trained tensors by name, `path:role:kind/parameter`."""
        return {f"{g.key}/{name}": p.detach() for g in self.grafts
                for name, p in g.delta.named_parameters()}


class _Remember:
    """Pre-hook: keeps a module's input for a block site that ends elsewhere."""

    def __init__(self, inputs: dict[str, Tensor], source: str) -> None:
        self.inputs, self.source = inputs, source

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inputs[self.source] = _first(args, kwargs)


class _Act:
    """Forward hook: y -> y with the deltas of one module."""

    def __init__(self, owner: Grafts, members: Iterable[int]) -> None:
        self.owner = owner
        grafts = owner.grafts
        parallel = [i for i in members if grafts[i].delta.stage == "parallel"]
        self.pointwise = [i for i in parallel
                          if grafts[i].delta.pointwise and not grafts[i].site.index]
        self.parallel = [i for i in parallel if i not in self.pointwise]
        self.sequential = [i for i in members if grafts[i].delta.stage == "sequential"]
        self.index = {
            i: torch.cat([torch.arange(a, b) for a, b in grafts[i].site.index or ()])
            for i in members if grafts[i].site.index
        }

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        x = _first(args, kwargs) if self.parallel else None
        changed = self._pointwise(y)
        for i in self.parallel:
            source = self.owner.grafts[i].site.source
            seen = self.owner._inputs[source] if source else x
            changed = self._add(i, changed, seen, y, fresh=changed is not y)
        settled = changed
        for i in self.sequential:
            changed = self._add(i, changed, None, settled, fresh=changed is not settled)
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
        index = self.index.get(i)
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


def _spread(z: Tensor, y: Tensor) -> Tensor:
    """Bring z to y's rank: (width,) stays, (batch, width) -> (batch, 1, ..., width)."""
    if z.dim() == 1:
        return z
    if z.shape[0] != y.shape[0]:
        raise ValueError(f"per-example gates need y batch first, but z has {z.shape[0]} rows and "
                         f"y {y.shape[0]}")
    return z.view(z.shape[0], *(1,) * (y.dim() - 2), z.shape[-1])


def seeded(site: Site, kind: str, options: dict[str, Any], seed: int) -> Delta:
    """A delta whose random init depends on (seed, site, kind) alone, not on what was built before.

    So a retrained structure starts where the search started.
    """
    # hashed: torch reads the low 32 bits of a seed alone
    key = hashlib.sha256(f"{seed}:{site.path}:{site.role}:{kind}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(key[:8], "big") >> 1)
        return make(kind, site, options)


class Supernet:
    """A frozen backbone with every delta of a space, gated by `z`.

    z: (units,) or (batch, units); writing it sets the gates of all deltas.
    home: the device for alpha and the shift: the model's, or the CPU where that lacks float64.
    The head (names in `head`) trains with the deltas; everything else is frozen.
    """

    def __init__(self, model: nn.Module, space: Space, head: frozenset[str], seed: int) -> None:
        self.model, self.space = model, space
        freeze(model, head)
        self.head = [p for name, p in model.named_parameters() if name in head]
        self.grafts = Grafts(model, [
            Graft(p.site, p.kind, seeded(p.site, p.kind, p.options, seed))
            for p in space.placements
        ])
        device = next(model.parameters()).device
        self.home = torch.device("cpu") if device.type == "mps" else device
        self._unit = space.unit.to(device)
        self._whole = len(space) == len(space.unit)  # every coordinate a unit, in order
        self._widths = [p.width for p in space.placements]
        self.z = torch.ones(len(space), device=device)

    @property
    def z(self) -> Tensor:
        """The gates, (units,) or (batch, units)."""
        return self._z

    @z.setter
    def z(self, value: Tensor) -> None:
        value = value.to(self._unit.device)
        self._z = value
        spread = value if self._whole else value.index_select(-1, self._unit)
        self.grafts.z = list(spread.split(self._widths, dim=-1))

    def groups(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        """Parameter groups `{params, kind, lr}`, one per kind and one for the head.

        rates: learning rate of each kind and of `head`.
        """
        kinds: dict[str, list[nn.Parameter]] = defaultdict(list)
        for graft in self.grafts.grafts:
            kinds[graft.kind].extend(graft.delta.parameters())
        kinds["head"] = list(self.head)
        return [{"params": p, "kind": kind, "lr": rates[kind]} for kind, p in kinds.items() if p]

    def remove(self) -> None:
        """Take all deltas out of the backbone."""
        self.grafts.detach()


def freeze(model: nn.Module, head: frozenset[str]) -> None:
    """Only the head stays trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
