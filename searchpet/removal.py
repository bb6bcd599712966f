"""Removal: what pruning takes out of a transformer, really taken out, so that latency drops.

A removed model computes what `mask` computes on the dense one, with fewer operations:

- attention heads and neurons: rows of the projections before them, columns of the one after;
- all of a sublayer's: a stub that returns the output projection's bias;
- a sublayer: a stub that returns 0 (where the norm on the branch's output is inside the branch,
  it stands in the norm's place too).  Norms before a sublayer stay: they cost next to nothing;
- a layer: its list is rebuilt, config counts and cache indices follow;
- singular directions of a matrix: two smaller matrices in its place (`searchpet.factors`).

Weights are sliced by structure: `discover` says which features of which linear are whose.  What a
family's own code reads besides is data in `families`.  Per-layer widths have no place in a config:
to load a removed model, build the dense one, remove, then load the state.

Proven on transformers 5.23: logits differ from the masked model's by float rounding alone.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from searchpet.anatomy import Sublayer, gone, refuse, stacks, sublayers_of
from searchpet.cuts import Cut, Hooks, check, features, mask
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.factors import put_factors, refuse_factors
from searchpet.families import FAMILIES, Family
from searchpet.probe import outputs, random_inputs, rows
from searchpet.site import Site
from searchpet.slices import (
    Constant,
    Edits,
    Empty,
    Narrowed,
    NoAttention,
    keep_inputs,
    keep_outputs,
)

__all__ = ["Cut", "Hooks", "mask", "removable", "remove"]

TOLERANCE = 1e-4  # of the largest logit (of 1, if that is larger), in fp32
_HALF = 8  # roundings of the largest logit that half precision is allowed: its sums differ more


def removable(model: nn.Module, cut: Cut | None = None) -> str | None:
    """None where removal is proven for the model's family, else the reason, in one line; with a
    cut, also the reason why the model or its family cannot take that one.
    """
    try:
        _family(model)
        if cut is not None:
            _plan(model, cut)
    except InputError as error:
        return str(error)
    return None


def remove(model: nn.Module, cut: Cut, *, verify: bool = True) -> dict[str, str]:
    """Take out, in place, what the cut says; return old path -> new path of renumbered layers.

    verify: compare the output on random input with that of the masked model, before.  The largest
    difference may be 1e-4 of the largest logit (1e-4 where that is below 1), in half precision 8
    roundings of it.
    Raises InputError, before anything is changed, for a family that is not proven or a cut that
    it cannot take; and where verification fails.  On every exception the model is restored: the
    weights it had come back, not copies.  For that both are held until the function returns.
    """
    family, sites, sublayers = _plan(model, cut)
    probe = random_inputs(model, rows(model), 16, torch.Generator().manual_seed(0))
    expected = _masked(model, cut, probe) if verify else None
    edits = Edits()
    try:
        _hand_over_bias(edits, model, cut, family, sublayers)
        for sublayer in sublayers:
            if sublayer.layer not in cut.layers:
                _take_out(edits, model, sublayer, cut, family)
        put_factors(edits, model, sites, cut.ranks)
        renamed = _drop_layers(edits, model, cut, family, sites)
        if expected is not None:
            _compare(outputs(model, probe), expected)
    except BaseException:
        edits.undo()
        raise
    return renamed


def _family(model: nn.Module) -> Family:
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    if kind not in FAMILIES:
        raise InputError(
            f"removal must be proven for a family, but it is not for {kind}: what is pruned stays "
            f"masked, latency will not drop; proven are {', '.join(sorted(FAMILIES))}")
    if hasattr(model, "searchpet"):
        raise InputError("removal must come before deltas, but this model has some; load it again")
    return FAMILIES[kind]


def _plan(model: nn.Module, cut: Cut) -> tuple[Family, Sequence[Site], Sequence[Sublayer]]:
    """What removal works on.  Raises InputError for a cut that cannot be taken."""
    family, sites = _family(model), discover(model)
    check(cut, sites)
    sublayers = sublayers_of(sites)
    refuse(model, cut, family, sites, sublayers)
    refuse_factors(model, cut.ranks)
    return family, sites, sublayers


def _masked(model: nn.Module, cut: Cut, probe: dict[str, Tensor]) -> Tensor:
    hooks = mask(model, cut)
    try:
        return outputs(model, probe)
    finally:
        hooks.remove()


def _compare(found: Tensor, expected: Tensor) -> None:
    largest = max(1.0, float(expected.abs().max()))
    half = expected.dtype in (torch.bfloat16, torch.float16)
    share = _HALF * torch.finfo(expected.dtype).eps if half else TOLERANCE
    difference = float((found.float() - expected.float()).abs().max())
    if not difference <= share * largest:
        raise InputError(f"a removed model must compute what the masked one does, but logits "
                         f"differ by {difference:.2g} (allowed: {share * largest:.2g}); the model "
                         "is as it was, keep what is pruned masked")


# --- sublayers ----------------------------------------------------------------------------------


def _take_out(edits: Edits, model: nn.Module, sublayer: Sublayer, cut: Cut,
              family: Family) -> None:
    ffn = sublayer.output.role == "ffn.out"
    if gone(sublayer, cut):
        _stub(edits, model, sublayer, family, silent=sublayer.block.path in cut.sublayers)
        return
    kept = (cut.neurons if ffn else cut.heads).get(sublayer.output.path)
    count = sublayer.output.d_in if ffn else sublayer.output.kv_heads or 1
    if kept is None or len(kept) == count:
        return
    _slice(edits, model, sublayer, kept, count)
    if not ffn:
        _tell(edits, model, sublayer, kept, family)


def _slice(edits: Edits, model: nn.Module, sublayer: Sublayer, kept: Sequence[int],
           count: int) -> None:
    """Keep some of `count` equal groups of features between `inputs` and `output`."""
    outs: dict[str, list[int]] = defaultdict(list)
    for site in sublayer.inputs:
        ranges = site.index or ((0, site.d_out),)
        own = [i for start, stop in ranges for i in range(start, stop)]
        outs[site.path] += [own[i] for i in features(kept, site.d_out // count)]
    for path, index in outs.items():
        keep_outputs(edits, model.get_submodule(path), sorted(index))
    index = features(kept, sublayer.output.d_in // count)
    keep_inputs(edits, model.get_submodule(sublayer.output.path), index)


def _tell(edits: Edits, model: nn.Module, sublayer: Sublayer, groups: Sequence[int],
          family: Family) -> None:
    """Write the attention's new sizes where its forward reads them."""
    kv_heads, heads = sublayer.output.kv_heads or 1, sublayer.output.heads or 1
    mixer: Any = model.get_submodule(sublayer.mixer)
    left = len(groups) * heads // kv_heads
    for names, value in ((family.heads, left), (family.kv_heads, len(groups)),
                         (family.width, sublayer.output.d_in // heads * left)):
        for name in names:
            edits.set(mixer, name, value)
    own: dict[str, Any] = dict.fromkeys(family.config, left)
    if family.bias:
        index = torch.tensor(features(groups, heads // kv_heads), device=mixer.o.weight.device)
        before = getattr(mixer, "kept_heads", None)  # of an earlier removal
        index = index if before is None else before[index]
        edits.set(mixer, "kept_heads", nn.Buffer(index, persistent=False))
        own["_attn_implementation"] = _SELECTING
    if own:
        whole = getattr(mixer.config, "whole", mixer.config)
        edits.set(mixer, "config", Narrowed(whole, **own))


_SELECTING = "searchpet_selected_heads"


def _attend(module: nn.Module, *args: Any, position_bias: Tensor, **kwargs: Any) -> Any:
    """The attention that the model is set to, with the kept heads of a bias that is passed on to
    other layers in full: position_bias (1 or batch, all heads, queries, keys).
    """
    config: Any = module.config
    own: Any = sys.modules[type(module).__module__]
    kept: Any = module.kept_heads
    attention = AttentionInterface().get_interface(
        config.whole._attn_implementation, own.eager_attention_forward)
    return attention(module, *args, position_bias=position_bias.index_select(1, kept), **kwargs)


AttentionInterface.register(_SELECTING, _attend)


def _stub(edits: Edits, model: nn.Module, sublayer: Sublayer, family: Family, *,
          silent: bool) -> None:
    """Nothing is left inside; `silent`: nor is the bias, nor the norm on the branch's output."""
    output: Any = model.get_submodule(sublayer.output.path)
    size = sublayer.output.d_out
    bias = None if silent else output.bias
    if sublayer.output.role == "ffn.out":
        for path in {site.path for site in sublayer.inputs}:
            edits.put(model, path, Empty())
        edits.put(model, sublayer.output.path, Constant(size, bias))
    else:
        inside = sublayer.output.path.startswith(f"{sublayer.mixer}.")
        stub = _no_attention(edits, model, sublayer, family, bias if inside else None)
        edits.put(model, sublayer.mixer, stub)
        if not inside:
            edits.put(model, sublayer.output.path, Constant(size, bias))
    if silent and sublayer.block.path != sublayer.output.path:
        edits.put(model, sublayer.block.path, Constant(size, None))


def _no_attention(edits: Edits, model: nn.Module, sublayer: Sublayer, family: Family,
                  bias: nn.Parameter | None) -> NoAttention:
    mixer: Any = model.get_submodule(sublayer.mixer)
    owner = None
    if getattr(mixer, "has_relative_attention_bias", False):
        owner = mixer
        for site in (*sublayer.inputs, sublayer.output):
            edits.set(mixer, site.path.rpartition(".")[2], None)
    index = None if sublayer.crosses else getattr(mixer, "layer_idx", None)
    norm = (family.norm, getattr(mixer, family.norm)) if family.norm else None
    return NoAttention(sublayer.block.d_in, bias, index, norm=norm, shared=family.bias,
                       owner=owner)


# --- layers -------------------------------------------------------------------------------------


def _hand_over_bias(edits: Edits, model: nn.Module, cut: Cut, family: Family,
                    sublayers: Iterable[Sublayer]) -> None:
    """Where the layer that owns the stack's position bias goes, the next one takes it over."""
    if not family.bias:
        return
    by_stack: dict[str, list[Sublayer]] = defaultdict(list)
    for sublayer in sublayers:
        if sublayer.output.role == "attention.output":
            by_stack[sublayer.layer.rpartition(".")[0]].append(sublayer)
    for members in by_stack.values():
        owner: Any = model.get_submodule(members[0].mixer)
        if members[0].layer in cut.layers and owner.has_relative_attention_bias:
            heir = model.get_submodule(
                next(s.mixer for s in members if s.layer not in cut.layers))
            edits.set(heir, "relative_attention_bias", owner.relative_attention_bias)
            edits.set(heir, "has_relative_attention_bias", True)


def _drop_layers(edits: Edits, model: nn.Module, cut: Cut, family: Family,
                 sites: Sequence[Site]) -> dict[str, str]:
    """Rebuild the lists; old path -> new path of the layers whose number changed."""
    renamed = {}
    parts = {site.path.rpartition(".")[0]: site.part for site in sites if site.form == "layer"}
    for stack, layers in stacks(model, sites).items():
        kept = [i for i, path in enumerate(layers) if path not in cut.layers]
        if len(kept) == len(layers):
            continue
        modules = [model.get_submodule(layers[i]) for i in kept]
        for new, (old, module) in enumerate(zip(kept, modules, strict=True)):
            if new != old:
                renamed[layers[old]] = f"{stack}.{new}"
            for inner in module.modules():
                if isinstance(getattr(inner, "layer_idx", None), int):
                    edits.set(inner, "layer_idx", new)
        edits.put(model, stack, nn.ModuleList(modules))
        owner = model.get_submodule(stack.rpartition(".")[0])
        _recount(edits, model, owner, family, parts[stack], kept)
    return renamed


def _recount(edits: Edits, model: nn.Module, owner: nn.Module, family: Family, part: str,
             kept: list[int]) -> None:
    """Layer counts and types in the model's config, and in the stack's own if it has one."""
    config: Any = model.config
    keys = {id(config): (config, family.depth.get(part))}
    own: Any = getattr(owner, "config", config)
    keys.setdefault(id(own), (own, family.own_depth))
    for holder, key in keys.values():
        types = getattr(holder, "layer_types", None)
        if types and key:
            edits.set(holder, "layer_types", [types[i] for i in kept])
        if key:
            edits.set(holder, key, len(kept))
