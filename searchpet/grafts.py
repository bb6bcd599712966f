"""Grafts: deltas hooked into a backbone.

`weight` deltas change a module's weight, as parametrizations; hooks run the other stages in order:
`input` deltas change its x before anything sees it;
`parallel` deltas of every site of the module see the same x and y and their results add;
`sequential` deltas act on the result, `output` deltas on all of that.  The backbone's forward
runs as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from searchpet.hooks import HALF, Act, Enter, Graft, Remember, Weigh, stored_as

__all__ = ["Graft", "Grafts", "hold_zeros"]


class Grafts(nn.Module):
    """The deltas of a model, hooked in.  `z[i]` is the gate of delta i, (width,) or
    (batch, width); it starts at ones and is not part of the state.

    hooks: what acts where, (path of the module, hook), in the order in which it is registered.
    """

    def __init__(self, model: nn.Module, grafts: Sequence[Graft]) -> None:
        super().__init__()
        weight = next(model.parameters())
        self.grafts = tuple(_moved(graft, lambda t: t.to(weight.device)) for graft in grafts)
        self.deltas = nn.ModuleList(graft.delta for graft in grafts)
        self.deltas.to(weight.device)
        self.z: list[Tensor] = [torch.ones(g.delta.width, device=weight.device) for g in grafts]
        self.watch: Callable[[int, Tensor | None, Tensor], None] | None = None
        self.inputs: dict[str, Tensor] = {}
        self.hooks: list[tuple[str, Remember | Enter | Act]] = []
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
                parametrize.register_parametrization(module, "weight", Weigh(self, i, module))
                self._handles.append(module.register_load_state_dict_pre_hook(stored_as))
                self._weighed.append(module)
            members = [i for i in members if self.grafts[i].delta.stage != "weight"]
            enter = [i for i in members if self.grafts[i].delta.stage == "input"]
            if enter:
                self.hooks.append((path, Enter(self, enter)))
            members = [i for i in members if i not in enter]
            if not members:
                continue
            sources = {self.grafts[i].site.source for i in members
                       if self.grafts[i].delta.stage == "parallel"} - {None}
            for source in sources:
                self.hooks.append((str(source), Remember(self, str(source))))
            self.hooks.append((path, Act(self, members)))
        for path, hook in self.hooks:
            self._handles.append(register(model.get_submodule(path), hook))

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Grafts:
        """`model.to(device)` moves gates and indices as well: they are no parameters, no buffers.

        `model.half()` leaves deltas and gates in their precision: a step of training, or 1 + g,
        would be lost in half of it.
        """
        def own(t: Tensor) -> Tensor:
            new = fn(t)
            halved = new.dtype in HALF and t.dtype not in HALF
            return t.to(new.device) if halved else new

        self.z = [own(z) for z in self.z]
        self.grafts = tuple(_moved(graft, own) for graft in self.grafts)
        super()._apply(own, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what a pass has left, which may hold on to its graph."""
        return {**self.__dict__, "inputs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: hooks of gradients are not copied with a parameter."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for graft in self.grafts:
            if graft.sparse is not None:
                hold_zeros(graft.delta, graft.sparse)

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


def _moved(graft: Graft, own: Callable[[Tensor], Tensor]) -> Graft:
    """The graft with its indices where its delta is, so that no pass has to send them."""
    reads = None if graft.reads is None else own(graft.reads)
    writes = None if graft.writes is None else own(graft.writes)
    return replace(graft, reads=reads, writes=writes)


def register(module: nn.Module, hook: Any) -> Any:
    """Hook it in; the handle that takes it out again."""
    if hook.before:
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    # first of all hooks: others that record outputs then see the changed ones
    return module.register_forward_hook(hook, with_kwargs=True, prepend=True)


def hold_zeros(delta: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """What the masks leave out gets no gradient any more."""
    for name, parameter in delta.named_parameters():
        keep = masks[name]
        parameter.register_hook(lambda g, keep=keep: g * keep.to(g.device))
