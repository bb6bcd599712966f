"""Verify: count again what a run claims, on the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchpet import catalog
from searchpet.apply import grafts, has_masks, part_of, read_delta, restore
from searchpet.discover import discover
from searchpet.flops import flops
from searchpet.probe import outputs, positions, random_inputs, rows
from searchpet.run import RunFolder
from searchpet.spec import KeepUse, Spec

CLOSE = 1e-4  # of the largest logit: two ways to compute the same differ by float rounding


@dataclass(frozen=True)
class Check:
    """One figure: what the files claim, what was found, and whether they agree."""

    what: str
    claimed: Any
    found: Any
    holds: bool


def verify(run: str | Path, model: str | None = None) -> list[Check]:
    """Recount a run's parameters and what it leaves of the blocks, and compare outputs.

    model: folder of the backbone, where it is not found by its name.
    Raises InputError for a run that cannot be loaded at all: a spec whose hash is not that of its
    content, tensors of another spec, another architecture.
    """
    folder = RunFolder(run)
    spec = Spec.load(folder.path)
    tensors, whole_run = read_delta(folder)
    heads = _head(tensors)
    first = whole_run.parts[0].task if whole_run.parts else None  # what is checked is shared
    tensors, trained = part_of(tensors, whole_run, first)
    masked = restore(run, model, remove=False, task=first)
    head = _head(tensors)
    stored = sum(t.numel() for t in tensors.values()) - head
    counted = stored + (heads if spec.budget.counts == "deltas and head" else 0)
    deltas = sum(p.numel() for p in grafts(masked).parameters())
    whole = sum(p.numel() for p in masked.parameters()) - head - deltas
    checks = [
        _same("hash of the spec", trained.spec_hash[:12], spec.hash[:12]),
        _same("parameters of the backbone", spec.backbone.parameters, whole),
        _same("parameters that count", spec.budget.used, counted),
        _same("trainable parameters of the deltas", stored, _trainable(masked)),
        Check("within the budget", spec.budget.limit, counted, counted <= spec.budget.limit),
    ]
    if folder.has("result.json"):
        result = folder.read_json("result.json")
        checks.append(_same("trainable parameters of result.json", result["trainable"], stored))
    weighed = any(e.mask and catalog.get("deltas", e.kind).neutral == 1 for e in spec.entries)
    if spec.keep is not None and weighed:
        checks.append(_same("weights that are left", round(spec.keep.used), _nonzero(masked)))
    elif spec.keep is not None:
        checks += _pruned(spec.keep, masked, restore(run, model, task=first))
    return checks


def _head(tensors: Mapping[str, Tensor]) -> int:
    """Parameters of the task heads."""
    return sum(t.numel() for name, t in tensors.items() if name.startswith("head/"))


def _pruned(keep: KeepUse, masked: nn.Module, removed: nn.Module) -> list[Check]:
    """What is left once it is really taken out, and whether that computes the same."""
    if has_masks(removed):
        return [Check("really removed", True, False, False)]
    inputs = random_inputs(masked, rows(masked), 16, torch.Generator().manual_seed(0))
    expected = outputs(masked, inputs)
    apart = float((outputs(removed, inputs) - expected).abs().max())
    bound = CLOSE * max(1.0, float(expected.abs().max()))
    size = min(128, positions(masked)) if "input_ids" in inputs else 128
    for model in (masked, removed):
        grafts(model).detach()
        del model.searchpet

    if keep.measure == "latency":  # measured anew it differs: `used` is a sum of the run's table
        return [Check("masked and removed outputs agree", bound, apart, apart <= bound)]

    def count(model: nn.Module) -> int:
        return _weights(model) if keep.measure == "weights" else sum(
            flops(model, length=size).values())

    return [
        Check("masked and removed outputs agree", bound, apart, apart <= bound),
        _same(f"{keep.measure} of the whole blocks", round(keep.dense), count(masked)),
        _same(f"{keep.measure} that are left", round(keep.used), count(removed)),
        Check("within what may be kept", keep.limit, count(removed),
              count(removed) <= keep.limit),
    ]


def _weights(model: nn.Module) -> int:
    """Elements of the matrices of all linears in blocks, fused ones once."""
    paths = {site.path for site in discover(model) if site.form == "linear"}
    return sum(model.get_submodule(path).get_parameter("weight").numel() for path in paths)


def _nonzero(model: nn.Module) -> int:
    """Elements of the blocks' matrices that no mask of weights takes out; leaves no deltas."""
    masks = [g for g in grafts(model).grafts if g.delta.stage == "weight"
             and not g.delta.atoms]
    grafts(model).detach()
    del model.searchpet
    total = _weights(model)
    for graft in masks:
        whole = torch.ones(graft.site.d_out, graft.site.d_in)
        total += int(graft.delta.cpu()(whole, whole, torch.ones(graft.delta.width)).sum())
    return total


def _trainable(model: nn.Module) -> int:
    """Parameters of an applied model's deltas."""
    return sum(graft.parameters for graft in grafts(model).grafts)


def _same(what: str, claimed: Any, found: Any) -> Check:
    return Check(what, claimed, found, claimed == found)
