"""One transformer block -> its sites.  The roles and what counts as a site: see `discover`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from searchpet.roles import (
    FEED_FORWARD,
    Layout,
    applied_to_output,
    attention_scopes,
    feed_forward,
    gate_layout,
    gated_query_layout,
    projection,
    qkv_layout,
    within,
)
from searchpet.site import Form, Site

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_CHANNELS_FIRST = (nn.PReLU, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class Member(NamedTuple):
    """A module of a block: path in the model, name in the block."""

    path: str
    name: str
    module: nn.Module


class Linear(NamedTuple):
    """A linear of a block."""

    path: str
    name: str
    module: nn.Module
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Block:
    """A block: where it stands, its modules in order of registration, the model's config."""

    part: str
    layer: int
    members: tuple[Member, ...]
    config: object

    @functools.cached_property
    def scopes(self) -> dict[str, str]:
        """Name of each attention -> prefix of its roles."""
        return attention_scopes(
            f"{name}.{leaf}"
            for _, name, module in self.members
            for leaf, _ in module.named_parameters(recurse=False)
        )

    @functools.cached_property
    def linears(self) -> tuple[Linear, ...]:
        sizes = ((m, linear_size(m.module)) for m in self.members)
        return tuple(Linear(*m, *size) for m, size in sizes if size)

    @functools.cached_property
    def norms(self) -> dict[str, tuple[str, int]]:
        """Name -> (path, size)."""
        sizes = ((m, norm_size(m.module)) for m in self.members)
        return {m.name: (m.path, size) for m, size in sizes if size}

    @functools.cached_property
    def lists(self) -> frozenset[str]:
        return frozenset(m.name for m in self.members if isinstance(m.module, nn.ModuleList))

    @functools.cached_property
    def feed_forward(self) -> dict[str, str]:
        """Name of each linear beside the attentions -> `in`, `gate`, `out` or `other`."""
        beside = [x for x in self.linears if self.scope_of(x.name) is None]
        kinds = {x.name: feed_forward(x.name.split("."), x.d_out > x.d_in) for x in beside}
        multiplied = {parent(name) for name, kind in kinds.items() if kind == "in"}
        gates = [name for name, kind in kinds.items() if kind == "gate"]
        # w1 without a w3 gates nothing
        return kinds | {name: "in" for name in gates if parent(name) not in multiplied}

    @functools.cached_property
    def branch_norms(self) -> dict[str, str]:
        """Name of a sublayer -> name of the norm between it and the residual addition."""
        if self.members[0].name:  # parallel lists: no module whose forward is the block's
            return {}
        try:
            source = inspect.getsource(type(self.members[0].module).forward)
        except (OSError, TypeError):
            return {}
        return {a: b for a, b in applied_to_output(source).items() if b in self.norms}

    def scope_of(self, name: str) -> str | None:
        return next((scope for scope in self.scopes if within(name, scope)), None)

    def site(
        self, path: str, role: str, form: Form, d_in: int, d_out: int, heads: int | None = None
    ) -> Site:
        return Site(path, role, self.layer, form, self.part, d_in, d_out, heads)


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear or of a transposed one, else None."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads its weight and never calls it
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 2:
        d_in, d_out = weight.shape
        return (d_in, d_out) if getattr(module, "nf", None) == d_out else None
    return None


def norm_size(module: nn.Module) -> int | None:
    """Features of a norm: a module with a 1-D weight, perhaps a 1-D bias, and nothing else."""
    own = dict(module.named_parameters())
    if isinstance(module, _CHANNELS_FIRST) or not own.keys() <= {"weight", "bias"}:
        return None
    holds = dict(module.named_parameters(recurse=False)).get("weight")
    return holds.numel() if holds is not None and holds.ndim == 1 else None


def parent(name: str) -> str:
    return name.rpartition(".")[0]


def linear_sites(block: Block) -> Iterator[Site]:
    """Linears (fused ones in slices) and sublayer outputs of a block."""
    for scope in block.scopes:
        yield from _attention(block, scope)
    yield from _feed_forwards(block)


def _linear_sites(
    block: Block, linear: Linear, role: str, layout: Layout | None, heads: int | None = None
) -> Iterator[Site]:
    """The linear's site, or one per part of a fused one."""
    site = block.site(linear.path, role, "linear", linear.d_in, linear.d_out, heads)
    if layout is None:
        yield site
        return
    prefix = role.partition(".")[0]
    for part, index in layout.ranges().items():
        width = sum(stop - start for start, stop in index)
        yield replace(site, role=f"{prefix}.{part}", d_out=width, index=index)


# --- attention ----------------------------------------------------------------------------------


def _attention(block: Block, scope: str) -> Iterator[Site]:
    prefix = block.scopes[scope]
    kinds = _projections(block, scope)
    named = {kind: linear for linear, kind in reversed(kinds.items())}  # the first of each kind
    output, query = named.get("output"), named.get("query")
    d_q = output.d_in if output else query.d_out if query else None  # as many as it mixes
    heads = _heads(block, scope, d_q)
    sites: list[Site] = []
    for linear, kind in kinds.items():
        layout = None
        if kind == "fused":
            layout, kind = _fused(block, linear, d_q, heads, query is not None), "other"
        elif kind == "query" and heads and linear.d_out == 2 * (d_q or 0):
            layout = gated_query_layout(linear.d_out, heads)
        sites.extend(_linear_sites(block, linear, f"{prefix}.{kind}", layout, heads))
    d_k = next((site.d_out for site in sites if site.role == f"{prefix}.key"), None)
    kv_heads = _kv_heads(heads, d_q, d_k)
    yield from (replace(site, kv_heads=kv_heads) for site in sites)
    source = query or named.get("fused")
    if output and source:
        if source.d_in != output.d_out:  # queries from a latent: what makes the latent sees x
            source = next((x for x in kinds if x.d_in == output.d_out), source)
        path = _after(block, scope, output.path)
        site = block.site(path, f"{prefix}.block", "block", source.d_in, output.d_out, heads)
        yield replace(site, source=source.path, kv_heads=kv_heads)


def _kv_heads(heads: int | None, d_q: int | None, d_k: int | None) -> int | None:
    """Heads of d_k features of keys, where queries have `heads` of d_q; `heads` if unsure."""
    if not heads or not d_q or not d_k or d_q % heads or d_k % (d_q // heads):
        return heads
    count = d_k // (d_q // heads)
    return count if count <= heads and heads % count == 0 else heads


def _projections(block: Block, scope: str) -> dict[Linear, str]:
    inside = [x for x in block.linears if block.scope_of(x.name) == scope]
    return {x: projection(x.name[len(scope) + 1 :].split(".")) for x in inside}


def _output(block: Block, scope: str) -> Linear | None:
    return next((x for x, kind in _projections(block, scope).items() if kind == "output"), None)


def _heads(block: Block, scope: str, d_q: int | None) -> int | None:
    """From the attention's attributes, its head size, or the config, whichever comes first."""
    modules = [m.module for m in block.members if within(m.name, scope)]
    for holder in modules:
        for name in _HEADS:
            if isinstance(getattr(holder, name, None), int):
                return int(getattr(holder, name))
    for holder in modules:
        size = getattr(holder, "head_dim", None)
        if isinstance(size, int) and d_q and d_q % size == 0:
            return d_q // size
    heads = getattr(block.config, "num_attention_heads", None)
    return heads if isinstance(heads, int) else None


def _fused(
    block: Block, linear: Linear, d_q: int | None, heads: int | None, separate: bool
) -> Layout | None:
    """How a fused projection stores its parts; None where that is not known."""
    name = linear.name.rpartition(".")[2].lower()
    owner = next(m.module for m in block.members if m.name == parent(linear.name))
    d_key, d_value = (getattr(owner, n, 0) for n in ("qk_nope_head_dim", "v_head_dim"))
    layout: Layout | None
    if not d_q or not heads or hasattr(owner, "act_fn"):
        return None  # linear attention activates its fused output and stores it in ways of its own
    if name == "kv_b_proj":
        layout = Layout(heads, (("key", d_key), ("value", d_value)))
    elif "mp_num" in inspect.signature(getattr(owner, "_split_heads", len)).parameters:
        # written for four cores: its forward holds this 4, and this order, as literals
        layout = Layout(4, (("query", d_q // 4), ("value", d_q // 4), ("key", d_q // 4)))
    else:
        per_head = hasattr(owner, "multi_query")
        layout = qkv_layout(name, linear.d_out, d_q, heads, separate, per_head)
    return layout if layout and layout.size == linear.d_out else None


# --- feed-forward -------------------------------------------------------------------------------


def _feed_forwards(block: Block) -> Iterator[Site]:
    beside = [x for x in block.linears if x.name in block.feed_forward]
    inner = {x.d_in for x in beside if block.feed_forward[x.name] == "out"}
    for linear in beside:
        kind, layout = block.feed_forward[linear.name], None
        if kind == "in" and linear.d_out not in inner and linear.d_out in {2 * d for d in inner}:
            layout = gate_layout(linear.name.rpartition(".")[2].lower(), linear.d_out)
        mixer = not block.scopes and _container(block, linear.name) is None
        prefix = "attention" if mixer else "ffn"  # a token mixer in attention's place
        yield from _linear_sites(block, linear, f"{prefix}.{kind}", layout)
    experts = _experts(block)
    yield from _plain_blocks(
        block, [x for x in beside if _container(block, x.name) not in experts]
    )
    ends = [output for scope in block.scopes if (output := _output(block, scope))]
    ends += [x for x in beside if block.feed_forward[x.name] == "out"]
    width = ends[0].d_out if ends else 0
    for container, path in experts.items() if width else ():
        site = block.site(_after(block, container, path), "ffn.block", "block", width, width)
        yield replace(site, source=path)


def _plain_blocks(block: Block, linears: list[Linear]) -> Iterator[Site]:
    """An output linear ends a sublayer that the first `in` or `gate` since the last one began."""
    source: Linear | None = None
    for linear in linears:
        kind = block.feed_forward[linear.name]
        if kind in ("in", "gate") and source is None:
            source = linear
        if kind == "out" and source:
            path = _after(block, _container(block, linear.name), linear.path)
            site = block.site(path, "ffn.block", "block", source.d_in, linear.d_out)
            yield replace(site, source=source.path)
            source = None


def _experts(block: Block) -> dict[str, str]:
    """Name -> path of each feed-forward part whose work is shared by experts.

    Their outputs are summed, so only the whole module's output is the sublayer's.
    """
    outs = [name for name, kind in block.feed_forward.items() if kind == "out"]
    containers = [c for name in outs if (c := _container(block, name))]
    shared = {c for c in containers if containers.count(c) > 1}
    for _, name, module in block.members:
        stacked = any(p.ndim == 3 for p in module.parameters(recurse=False))
        if stacked and not isinstance(module, nn.modules.conv._ConvNd):
            shared.add(_container(block, name) or "")
    return {m.name: m.path for m in block.members if m.name and m.name in shared}


def _container(block: Block, name: str) -> str | None:
    """The outermost module on the way to `name` that is called a feed-forward part."""
    tokens = name.split(".")
    depth = next((i for i, t in enumerate(tokens) if FEED_FORWARD.search(t.lower())), None)
    if depth is None:
        return None
    found = ".".join(tokens[: depth + 1])
    return ".".join(tokens[: depth + 2]) if found in block.lists else found


def _after(block: Block, sublayer: str | None, path: str) -> str:
    """Path of the norm on the sublayer's output inside the residual branch, else `path`."""
    norm = block.branch_norms.get(sublayer or "")
    return block.norms[norm][0] if norm else path
