"""A plain transformers model: every delta folded into the weights, nothing of ours left.

Two things may have no place in a checkpoint.  A bias on a linear that has none: where a flag of
the family's config (`attention_bias`, `mlp_bias`) gives it one, the flag is set and the others get
zeros.  What removal left: a config knows one size for all layers, so only a model whose layers
are all of one size, or one that lost whole layers, is one that `from_pretrained` can build.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from searchpet.apply import grafts
from searchpet.discover import discover
from searchpet.errors import InputError, listed
from searchpet.merge import merge

WAY = "keep the run and load it with searchpet.load"
BARE = "search with --forbid kind=bias,role=norm.*"  # where norms have none: no format takes them
# names of config keys, whatever the family: what a config says is checked on what it builds
_WIDTHS = ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim",
           "decoder_ffn_dim", "hidden_dim")
_HEADS = ("num_attention_heads", "num_heads", "n_head")
_KV_HEADS = ("num_key_value_heads",)


def folded(model: nn.Module, needs_config: bool = True) -> nn.Module:
    """Merge an applied model for good, in place; return it.

    needs_config: whether its config must say all that its weights hold.
    Raises InputError, before any weight is changed, for what cannot be folded, by position, and
    for what has no place in the config.
    """
    own = grafts(model)
    bent = [f"{g.kind} at {g.site.path}" for g in own.grafts if g.delta.neutral == 0
            and g.delta.affine(torch.ones(g.delta.width)) is None]
    if bent:
        raise InputError(f"what is folded into weights must be affine, but the structure has "
                         f"{listed(bent)}; {WAY}")
    lack = [g for g in own.grafts if g.delta.neutral == 0 and _adds(g.delta)
            and getattr(model.get_submodule(g.at), "bias", None) is None]
    for path in _placed(model, lack, needs_config):
        module: Any = model.get_submodule(path)
        d_out = module.weight.shape[1] if hasattr(module, "nf") else module.weight.shape[0]
        module.bias = nn.Parameter(torch.zeros(d_out), requires_grad=False)
    return merge(model)


def _adds(delta: Any) -> bool:
    """Whether a delta has a constant part."""
    affine = delta.affine(torch.ones(delta.width))
    return affine is not None and affine.c is not None


def _placed(model: nn.Module, lack: Sequence[Any], needs_config: bool) -> list[str]:
    """Paths of linears that are to get a bias of zeros; sets the config's flags.

    lack: the grafts that need a bias where the module has none.
    """
    needed = {g.at for g in lack}
    linears = {g.at for g in lack if g.site.form == "linear"}
    if not needed:
        return []
    if needed == linears and not needs_config:
        return sorted(needed)
    config: Any = model.config
    flags = [key for key, value in config.to_dict().items() if value is False and "bias" in key]
    for chosen in (*((flag,) for flag in flags), tuple(flags)):
        paths = _biased(model, _changed(config, dict.fromkeys(chosen, True)))
        if needed <= set(paths):
            for flag in chosen:
                setattr(config, flag, True)
            return paths
    norms = [g for g in lack if g.site.form == "norm"]
    named = listed([f"{g.kind} at {g.site.path}" for g in (lack if needs_config else norms)])
    other = [BARE] if norms else []
    if needs_config:
        other.append("take --format peft")
    raise InputError(f"a bias must have a place in the family's config, but {config.model_type} "
                     f"has none for {named}; {WAY}, or {' and '.join(other)}")


def _biased(model: nn.Module, config: Any) -> list[str]:
    """Paths of the linears that have a bias by this config, and none in the model."""
    own, found = dict(model.named_modules()), []
    for name, _ in _twin(model, config).named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf == "bias" and path in own and getattr(own[path], "bias", None) is None:
            found.append(path)
    return found


def say_sizes(model: nn.Module) -> None:
    """Write the sizes that removal left into a model's config.

    Raises InputError where no config can say them.
    """
    own = _shapes(model)
    for change in _changes(model):
        config = _changed(model.config, change)
        try:
            fits = _shapes(_twin(model, config)) == own
        except (ValueError, RuntimeError):  # sizes that the family does not take together
            continue
        if fits:
            model.config = config
            return
    sites = discover(model)
    widths = sorted({s.d_in for s in sites if s.role == "ffn.out"})
    heads = sorted({s.kv_heads or 0 for s in sites if s.role.endswith("attention.output")})
    raise InputError(
        "a plain checkpoint must have layers of one size that its config can say, but removal "
        f"left feed-forwards of {_numbers(widths)} neurons and attentions of {_numbers(heads)} "
        f"heads, or took sublayers out; {WAY}, or take --format onnx, whose graph is as small")


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "no"


def _changes(model: nn.Module) -> Iterator[dict[str, int]]:
    """What the config may have to say: nothing new, one width, one number of heads, both."""
    sites = discover(model)
    widths = {s.d_in for s in sites if s.role == "ffn.out"}
    heads = {(s.heads, s.kv_heads) for s in sites if s.role.endswith("attention.output")}
    own = model.config.to_dict()  # type: ignore[operator,union-attr]
    parts: list[dict[str, int]] = []
    if len(widths) == 1:
        parts.append(dict.fromkeys((k for k in _WIDTHS if k in own), widths.pop()))
    if len(heads) == 1:
        count, kv = heads.pop()
        parts.append({**{k: count or 1 for k in _HEADS if k in own},
                      **{k: kv or 1 for k in _KV_HEADS if k in own}})
    for size in range(len(parts) + 1):
        for chosen in itertools.combinations(parts, size):
            yield {key: value for part in chosen for key, value in part.items()}


def _changed(config: Any, values: dict[str, Any]) -> Any:
    """A copy of a config with other values."""
    copied = copy.deepcopy(config)
    for key, value in values.items():
        setattr(copied, key, value)
    return copied


def _twin(model: nn.Module, config: Any) -> nn.Module:
    """A model of the same class as a config has it, without memory for its weights."""
    make: Any = type(model)
    with torch.device("meta"):
        twin: nn.Module = make(config)
    return twin


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}
