"""Anatomy: a model's sublayers and stacks as removal sees them, and which cuts they can take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from searchpet.cuts import MIXERS, Cut
from searchpet.errors import InputError
from searchpet.families import Family
from searchpet.site import Site
from searchpet.slices import plain

_PROJECTS = ("query", "key", "value", "other")
_WIDENS = ("in", "gate")


@dataclass(frozen=True)
class Sublayer:
    """A sublayer that removal understands.

    layer: path of its layer;  output, block: where its branch ends;  inputs: the linears that
    feed `output`, one per part of a fused one.
    """

    layer: str
    output: Site
    block: Site
    inputs: tuple[Site, ...]

    @property
    def mixer(self) -> str:
        """Path of the module that holds the first projection: of an attention, the mixing one."""
        return self.inputs[0].path.rpartition(".")[0]

    @property
    def crosses(self) -> bool:
        return self.output.role.startswith("cross_")


def sublayers_of(sites: Sequence[Site]) -> tuple[Sublayer, ...]:
    """Attentions, cross-attentions and feed-forward parts: at most one of each in a layer."""
    found = []
    for layer in (site.path for site in sites if site.form == "layer"):
        inside: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            if site.path.startswith(f"{layer}."):
                inside[site.role].append(site)
        for prefix in (*MIXERS, "ffn"):
            end, feeds = ("out", _WIDENS) if prefix == "ffn" else ("output", _PROJECTS)
            output, block = inside[f"{prefix}.{end}"], inside[f"{prefix}.block"]
            inputs = [site for kind in feeds for site in inside[f"{prefix}.{kind}"]]
            if len(output) == len(block) == 1 and inputs:
                found.append(Sublayer(layer, output[0], block[0], tuple(inputs)))
    return tuple(found)


def refuse(model: nn.Module, cut: Cut, family: Family, sites: Sequence[Site],
           sublayers: Sequence[Sublayer]) -> None:
    """Raise InputError for a cut that the model's structure or family cannot take."""
    known = {s.output.path: s for s in sublayers} | {s.block.path: s for s in sublayers}
    for path in (*cut.heads, *cut.neurons, *cut.sublayers):
        sublayer = known.get(path)
        why = "is in no layer with one attention and one feed-forward part"
        if sublayer and sublayer.crosses and not family.cross:
            why = "is cross-attention, which is not proven for this family"
        elif sublayer:
            why = _unsliceable(model, sublayer, family)
        if why:
            raise InputError(f"a cut must name what can be sliced, but {path} {why}: leave it "
                             "masked, latency will not drop")
    for path, layers in stacks(model, sites).items():
        _refuse_layers(model, path, layers, cut, family, sublayers)
    if family.encoder_deepest and getattr(model, "can_generate", bool)():
        before, after = _depths(sites, frozenset()), _depths(sites, cut.layers)
        if after["encoder"] < after["decoder"] and before["encoder"] >= before["decoder"]:
            raise InputError("a model of this family that generates must keep an encoder as deep "
                             f"as its decoder (its cache is as deep as that), but got {after}; "
                             "drop decoder layers too")


def _depths(sites: Sequence[Site], dropped: frozenset[str]) -> dict[str, int]:
    return {part: sum(s.form == "layer" and s.part == part and s.path not in dropped
                      for s in sites) for part in ("encoder", "decoder")}


def _unsliceable(model: nn.Module, sublayer: Sublayer, family: Family) -> str:
    """Why not, or nothing."""
    for site in (*sublayer.inputs, sublayer.output):
        if not plain(model.get_submodule(site.path)):
            return f"belongs with {site.path}, which is no plain linear"
        if site.role.endswith(".other") and site.path.rpartition(".")[2] not in family.rows:
            return f"belongs with {site.path}, whose rows are not known to be heads"
    return ""


def stacks(model: nn.Module, sites: Sequence[Site]) -> dict[str, list[str]]:
    """Path of each list of layers -> paths of its layers."""
    lists = dict.fromkeys(s.path.rpartition(".")[0] for s in sites if s.form == "layer")
    return {path: [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]
            for path in lists}


def _refuse_layers(model: nn.Module, stack: str, layers: list[str], cut: Cut, family: Family,
                   sublayers: Sequence[Sublayer]) -> None:
    # a stack without one whole layer could not be told from any other list of modules
    left = [s for s in sublayers if s.layer in layers and not gone(s, cut)]
    mixing = {s.layer for s in left if s.output.role != "ffn.out"}
    whole = mixing & {s.layer for s in left if s.output.role == "ffn.out"}
    if not whole:
        raise InputError(f"every stack must keep a layer with attention heads and neurons, but "
                         f"the cut leaves none in {stack}; keep more of one")
    first = layers[0]
    if first not in cut.layers:
        return
    owner = model.get_submodule(stack.rpartition(".")[0])
    if family.after_first and getattr(owner, family.after_first, None) is not None:
        raise InputError(f"the first layer must stay where the stack's {family.after_first!r} "
                         f"acts on its output, but the cut drops {first}")
    if family.bias:
        heir = next(layer for layer in layers if layer not in cut.layers)
        able = {s.layer for s in sublayers if s.output.role == "attention.output"}
        if not {first, heir} <= able:
            raise InputError(f"the position bias of {first} must pass to the next layer's "
                             f"attention, but {heir} has none; keep {first}")


def gone(sublayer: Sublayer, cut: Cut) -> bool:
    """Whether nothing is left inside."""
    kept = cut.neurons if sublayer.output.role == "ffn.out" else cut.heads
    return (sublayer.layer in cut.layers or sublayer.block.path in cut.sublayers
            or kept.get(sublayer.output.path) == ())
