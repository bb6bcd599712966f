"""What PEFT can say of a trained structure: its adapters as plain values, before there are files.

One module of the model can carry, in PEFT's words and in this order:

- IA3, y <- (1 + g) y: what only scales a linear;
- LoRA, y <- y + s B A x + b: the atoms of all slices of a fused projection side by side, at the
  rank that they make together, and a bias (`lora_bias`), also where the linear has none.  A bias
  alone is a LoRA of rank 1 that is 0, which is how PEFT names a position;
- `modules_to_save`: norms, folded as `merge` folds them, and the head.

IA3 and LoRA do not go in one adapter: then there are two, IA3 first, which gives (1 + g) y + s B A
x + b, as here.  Norms and head are in the last one.  Channels and slices that the structure leaves
alone are stored as zeros (ones of IA3): padding.

Config keys are those of PEFT (Mangrulkar et al. 2022, github.com/huggingface/peft).  Its patterns
are regular expressions that match a name's end, so every name here is whole, escaped and anchored.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from searchpet.apply import grafts
from searchpet.deltas import Affine
from searchpet.errors import InputError, listed
from searchpet.grafts import Graft
from searchpet.merge import affine_of, fold_of, on_module, sizes, summed, write

Type = Literal["IA3", "LORA", "LN_TUNING"]
PREFIX = "base_model.model."  # what PEFT puts before a module's name in its files
OWN = "keep the run and load it with searchpet.load"


@dataclass(frozen=True)
class Adapter:
    """One PEFT adapter.

    config:  fields of the type's config.
    tensors: by their names in adapter_model.safetensors.
    gains:   1 + g of each norm among them, (d,), None for 1; by path.
    head:    names of the tensors that are the task's head.
    """

    type: Type
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    gains: Mapping[str, Tensor | None] = field(default_factory=dict)
    head: frozenset[str] = frozenset()


@dataclass
class _Place:
    """What the deltas of one linear amount to.

    g, c: (d_out,); atoms: A (r, d_in), B (d_out, r) and their factor s, one for each delta.
    """

    d_in: int
    d_out: int
    g: Tensor | None = None
    c: Tensor | None = None
    atoms: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)


def adapters(model: nn.Module, head: frozenset[str]) -> list[Adapter]:
    """The PEFT adapters of an applied model, in the order in which they are to be loaded.

    head: names of the head's parameters.
    Raises InputError that names what PEFT cannot express.
    """
    members: dict[str, list[Graft]] = defaultdict(list)
    for graft in grafts(model).grafts:
        members[graft.at].append(graft)
    _refuse(model, [graft for own in members.values() for graft in own])
    places: dict[str, _Place] = {}
    kept: dict[str, Tensor] = {}  # of modules_to_save
    gains: dict[str, Tensor | None] = {}
    for path, own in members.items():
        module = model.get_submodule(path)
        if own[0].site.form == "norm":
            state, gains[path] = _norm(module, path, own)
            kept |= {f"{path}.{name}": value for name, value in state.items()}
        else:
            places[path] = _place(module, own)
    heads, state = _head(model, head)
    found = _assembled(places, sorted({*gains, *heads}), {**kept, **state}, sorted(gains))
    named = frozenset(f"{PREFIX}{name}" for name in state)
    found[-1] = replace(found[-1], gains=gains, head=named)
    return found


def _refuse(model: nn.Module, members: Sequence[Graft]) -> None:
    """Raise InputError for what PEFT has no form for."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for graft in members:
        reason = _reason(model, graft)
        if reason:
            reasons[reason].append(f"{graft.kind} at {graft.site.path}")
    if reasons:
        told = "; ".join(f"{listed(places)} ({reason})" for reason, places in reasons.items())
        way = _WAYS.get(next(iter(reasons)), OWN) if len(reasons) == 1 else OWN
        raise InputError("PEFT must have a form for every position of a structure, but it has "
                         f"none for {told}; {way}")


_FULL = "a full update of a matrix"
_BARE = "a norm without a bias"
_WAYS = {_FULL: "take --format merged",
         _BARE: f"{OWN}, or search with --forbid kind=bias,role=norm.*"}


def _reason(model: nn.Module, graft: Graft) -> str | None:
    """Why PEFT cannot express a delta; None where it can."""
    if graft.delta.neutral == 1:
        return "PEFT does not prune"
    affine = graft.delta.affine(torch.ones(graft.delta.width))
    if affine is None or graft.delta.stage != "parallel":
        return "it is not affine"
    if affine.M is not None and graft.kind != "lora":
        return _FULL
    bare = getattr(model.get_submodule(graft.at), "bias", None) is None
    if affine.c is not None and graft.site.form == "norm" and bare:
        return _BARE
    return None


def _place(module: nn.Module, members: Sequence[Graft]) -> _Place:
    """What a linear's deltas amount to, on all of its features."""
    d_out, d_in = sizes(module)
    place = _Place(d_in, d_out)
    pointwise = []
    for graft in members:
        if graft.kind == "lora":
            delta: Any = graft.delta
            B = delta.B.detach()
            if graft.writes is not None:
                B = B.new_zeros(d_out, B.shape[1]).index_copy(0, graft.writes, B)
            place.atoms.append((delta.A.detach(), B, delta.scaling))
        else:
            pointwise.append(on_module(affine_of(graft), graft, d_in, d_out))
    total: Affine = summed(pointwise)
    place.g, place.c = total.g, total.c
    return place


def _norm(module: nn.Module, path: str, members: list[Graft],
          ) -> tuple[dict[str, Tensor], Tensor | None]:
    """A norm's parameters with its deltas folded in, and its gain (d,)."""
    fold = fold_of(module, path, members)
    folded = copy.copy(module)  # with parameters of its own, without hooks
    folded._parameters = {name: nn.Parameter(p.detach().clone())
                          for name, p in module.named_parameters()}
    folded._forward_hooks, folded._forward_pre_hooks = OrderedDict(), OrderedDict()
    with torch.no_grad():
        write(folded, fold)
    gain = None if fold.affine.g is None else 1 + fold.affine.g
    return {name: p.detach() for name, p in folded.named_parameters()}, gain


def _head(model: nn.Module, head: frozenset[str]) -> tuple[list[str], dict[str, Tensor]]:
    """Paths of the modules that hold the head, and all their tensors by name.

    Raises InputError for a head that is a parameter of the model itself.
    """
    owners = sorted({name.rpartition(".")[0] for name in head})
    if "" in owners:
        raise InputError(f"PEFT saves a head by its modules, but that of this model is a "
                         f"parameter of the model itself, {min(head)}; take --format merged")
    return owners, {f"{owner}.{name}": p.detach() for owner in owners
                    for name, p in model.get_submodule(owner).state_dict().items()}


def _assembled(places: Mapping[str, _Place], saved: Sequence[str], state: Mapping[str, Tensor],
               norms: Sequence[str]) -> list[Adapter]:
    """IA3 where something scales, LoRA where something adds; norms alone have a type as well.

    saved: paths of whole modules;  state: their tensors by name;  norms: which of them are norms.
    """
    found = []
    scaled = {path: p.g for path, p in places.items() if p.g is not None}
    added = {path: p for path, p in places.items() if p.atoms or p.c is not None}
    if scaled:
        tensors = {f"{PREFIX}{path}.ia3_l": (1 + g).view(-1, 1) for path, g in scaled.items()}
        found.append(Adapter("IA3", {"target_modules": sorted(scaled),
                                     "feedforward_modules": []}, tensors))
    if added:
        found.append(_lora(added))
    if not found:
        within = "ln_tuning_layers."
        tensors = {f"{PREFIX}{_with(name, within, norms)}": v for name, v in state.items()}
        rest = [path for path in saved if path not in norms]
        return [Adapter("LN_TUNING", {"target_modules": list(norms),
                                      "modules_to_save": rest or None}, tensors)]
    last = found[-1]
    last.config["modules_to_save"] = list(saved) or None
    last.tensors.update({f"{PREFIX}{name}": value for name, value in state.items()})
    return found


def _with(name: str, within: str, norms: Sequence[str]) -> str:
    """A parameter's name, with PEFT's module between it and a norm that is tuned by itself."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.{within}{leaf}" if path in norms else name


def _lora(places: Mapping[str, _Place]) -> Adapter:
    """One LoRA adapter, each position with its own rank and factor."""
    biased = any(place.c is not None for place in places.values())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, place in places.items():
        A, B, scaling = _side_by_side(place)
        key, name = pattern(path), PREFIX + path
        ranks[key], alphas[key] = len(A), scaling * len(A)  # PEFT's factor is alpha / rank
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        if biased:
            c = torch.zeros(place.d_out) if place.c is None else place.c
            tensors[f"{name}.lora_B.bias"] = c / scaling  # which PEFT multiplies it with
    return Adapter("LORA", {
        "target_modules": sorted(places), "r": 1, "lora_alpha": 1, "rank_pattern": ranks,
        "alpha_pattern": alphas, "lora_bias": biased, "lora_dropout": 0.0}, tensors)


def _side_by_side(place: _Place) -> tuple[Tensor, Tensor, float]:
    """A (r, d_in), B (d_out, r) and the factor of all atoms; zeros of rank 1 where there are none.

    Where factors differ, B takes up the difference.
    """
    if not place.atoms:
        return torch.zeros(1, place.d_in), torch.zeros(place.d_out, 1), 1.0
    scaling = place.atoms[0][2]
    A = torch.cat([A for A, _, _ in place.atoms])
    B = torch.cat([B if s == scaling else B * (s / scaling) for _, B, s in place.atoms], dim=1)
    return A, B, scaling


def pattern(path: str) -> str:
    """The regular expression that PEFT matches to this one name: `layer.1` is not `layer.11`."""
    return "^" + re.escape(path)


def expected(model: nn.Module, found: Sequence[Adapter]) -> int:
    """Trained numbers of the deltas that do something, as PEFT would hold them.

    Counted on the deltas themselves: an atom's numbers and biases that are not 0, scales with
    1 + g != 1.  Of a norm, where folding rounds, what it leaves of its scales and biases.
    """
    total = 0
    for graft in grafts(model).grafts:
        if graft.site.form == "norm":
            continue
        if graft.kind == "lora":
            total += sum(int(p.count_nonzero()) for p in graft.delta.parameters())
            continue
        affine = affine_of(graft)
        total += int((1 + affine.g != 1).sum()) if affine.g is not None else 0
        total += int(affine.c.count_nonzero()) if affine.c is not None else 0
    return total + sum(_changed(adapter, adapter.tensors, dict(model.named_parameters()))
                       for adapter in found)


def effective(adapter: Adapter, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> int:
    """Numbers of an adapter's tensors that do something on a base model, without the head.

    base: its parameters by name.
    """
    total = _changed(adapter, tensors, base)
    for name, value in tensors.items():
        if ".lora_" in name:
            total += int(value.count_nonzero())
        elif name.endswith(".ia3_l"):
            total += int((value != 1).sum())
    return total


def _changed(adapter: Adapter, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> int:
    """Parameters of norms that differ from the base's; of a bias, after its norm's own gain."""
    within = "ln_tuning_layers." if adapter.type == "LN_TUNING" else ""
    total = 0
    for path, gain in adapter.gains.items():
        for leaf in ("weight", "bias"):
            new = tensors.get(f"{PREFIX}{path}.{within}{leaf}")
            if new is not None:
                old = base[f"{path}.{leaf}"]
                old = old * gain if leaf == "bias" and gain is not None else old
                total += int((new != old).sum())
    return total


def stored(found: Sequence[Adapter]) -> tuple[int, int]:
    """Numbers in the adapters' files, padding and whole norms included, and those of the head."""
    head = sum(a.tensors[name].numel() for a in found for name in a.head)
    return sum(t.numel() for a in found for t in a.tensors.values()) - head, head
