"""Cuts: what pruning leaves of a model, and the mask that computes what the cut model computes."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.factors import change, matrix_of, rows_of
from searchpet.site import Site

MIXERS = ("attention", "cross_attention")


@dataclass(frozen=True)
class Cut:
    """What stays and what goes, always in original numbering.  What is not named stays whole.

    heads:     path of an attention output projection -> kv groups that stay, ascending.  Group g
               is kv head g with the `heads / kv_heads` query heads that read it.
    neurons:   path of an `ffn.out` linear -> input features that stay, ascending.
    sublayers: paths of block sites whose sublayer goes: the branch adds nothing to the residual.
    layers:    paths of layer sites that go: their input passes by.
    ranks:     path and role of a linear -> singular directions of its matrix that stay,
               ascending, the largest first.  They are those of whole matrices, so nothing else
               may go beside them.

    With no group or neuron left, the output projection's bias remains of the sublayer.
    """

    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    neurons: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sublayers: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()
    ranks: Mapping[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)


class Hooks:
    """Handles of hooks, removed together."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def add(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def mask(model: nn.Module, cut: Cut) -> Hooks:
    """Hooks that make the model, of any family, compute what the cut one computes: x * z at
    output projections, y * 0 at block sites, y <- x at layer sites, y + (B A - W) x where
    directions go.  It gets no faster.

    Raises InputError for a cut that names what the model does not have.
    """
    sites = discover(model)
    check(cut, sites)
    hooks = Hooks()
    widths = {s.path: s.d_in for s in sites if s.form == "linear"}
    groups = {s.path: s.kv_heads for s in sites if s.form == "linear"}
    for path, kept in cut.heads.items():
        size = widths[path] // (groups[path] or 1)
        z = torch.zeros(widths[path])
        z[features(kept, size)] = 1.0
        hooks.add(model.get_submodule(path).register_forward_pre_hook(_gate(z)))
    for path, kept in cut.neurons.items():
        z = torch.zeros(widths[path])
        z[list(kept)] = 1.0
        hooks.add(model.get_submodule(path).register_forward_pre_hook(_gate(z)))
    for path in cut.sublayers:
        hooks.add(model.get_submodule(path).register_forward_hook(_silence))
    for path in cut.layers:
        layer = model.get_submodule(path)
        hooks.add(layer.register_forward_hook(_pass_by, with_kwargs=True))
    for site in sites:
        if (site.path, site.role) in cut.ranks:
            linear, rows = model.get_submodule(site.path), rows_of(site)
            lost = change(matrix_of(linear)[rows], cut.ranks[site.path, site.role])
            hooks.add(linear.register_forward_hook(_add(lost, rows)))
    return hooks


def features(groups: Iterable[int], size: int) -> list[int]:
    """Features of groups of `size` consecutive ones."""
    return [g * size + i for g in groups for i in range(size)]


def _gate(z: Tensor) -> Callable[..., Any]:
    """Pre-hook: x (..., d_in) -> x * z, z (d_in,)."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * z.to(args[0]), *args[1:])

    return hook


def _add(lost: Tensor, rows: Tensor) -> Callable[..., Any]:
    """Hook: y (..., d_out) -> y with `lost` (rows, d_in) x added to some of its features."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.index_add(-1, rows.to(output.device), F.linear(args[0], lost).to(output))

    return hook


def _silence(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def _pass_by(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    x = args[0] if args else kwargs["hidden_states"]
    return (x, *output[1:]) if isinstance(output, tuple) else x


# --- what a cut may name ------------------------------------------------------------------------


def check(cut: Cut, sites: Sequence[Site]) -> None:
    """Raise InputError unless every path is a site of its kind and every index in its range."""
    linears = [s for s in sites if s.form == "linear"]
    outputs = {s.path: s.kv_heads or 0 for s in linears if s.role in _outputs(MIXERS)}
    downs = {s.path: s.d_in for s in linears if s.role == "ffn.out"}
    blocks = {s.path for s in sites if s.form == "block"}
    layers = {s.path for s in sites if s.form == "layer"}
    _named("heads", "attention output projections", cut.heads, outputs)
    _named("neurons", "linears of role ffn.out", cut.neurons, downs)
    _named("sublayers", "block sites", cut.sublayers, blocks)
    _named("layers", "layer sites", cut.layers, layers)
    for path, groups in cut.heads.items():
        _ascending(f"kv groups kept at {path}", groups, outputs[path])
    for path, neurons in cut.neurons.items():
        _ascending(f"neurons kept at {path}", neurons, downs[path])
    ranks = {f"{s.path} ({s.role})": min(s.d_in, s.d_out) for s in linears}
    for (path, role), kept in cut.ranks.items():
        _named("ranks", "linears with their roles", [f"{path} ({role})"], ranks)
        _ascending(f"directions kept at {path}", kept, ranks[f"{path} ({role})"])
    if cut.ranks and (cut.heads or cut.neurons or cut.sublayers or cut.layers):
        raise InputError("a cut of ranks must take nothing else out: they are those of whole "
                         "matrices; cut one sort")


def _outputs(prefixes: Iterable[str]) -> set[str]:
    return {f"{prefix}.output" for prefix in prefixes}


def _named(name: str, what: str, paths: Iterable[str], known: Collection[str]) -> None:
    for path in paths:
        if path not in known:
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"a cut's {name} must name {what} of the model, but got "
                             f"{path!r}{hint}")


def _ascending(what: str, kept: Sequence[int], count: int) -> None:
    ordered = all(a < b for a, b in itertools.pairwise(kept))
    if not ordered or any(not 0 <= i < count for i in kept):
        raise InputError(f"{what} must ascend within 0..{count - 1}, but got {list(kept)[:8]}")
