"""From a spec to a model: `apply` grafts its deltas, `load` also restores the trained tensors.

An applied model is the transformers model itself with one submodule more, `model.searchpet`; its
forward, its loss and its `.logits` are unchanged, so `transformers.Trainer` trains it as it is,
`pipeline` takes it, and `save_pretrained` writes its spec and deltas beside the weights.

`torch.compile` takes it as well, in one graph without a break (`fullgraph=True`): hooks that were
there before are traced with their modules.  Compile after `apply`, and again after `merge`; gates
that change, as in a search, or `watch`, make it compile anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.backbone import config_hash, load_backbone
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.grafts import Graft, Grafts
from searchpet.processes import from_first
from searchpet.realise import (
    cut,
    mask_grafts,
    pet_grafts,
    renamer,
    structure,
    weight_grafts,
)
from searchpet.removal import removable
from searchpet.removal import remove as cut_out
from searchpet.run import RunFolder
from searchpet.saving import (
    DELTA_FILE,
    Saved,
    Saver,
    fingerprint,
    rebuild,
    saved_in,
    trained_tensors,
)
from searchpet.spec import Spec
from searchpet.stored import (
    Trained,
    asked_before,
    belongs,
    name_labels,
    origin,
    part_of,
    read_delta,
)
from searchpet.supernet import freeze

__all__ = [
    "DELTA_FILE", "Trained", "apply", "asked_before", "grafts", "has_masks", "load", "name_labels",
    "origin", "outside_base", "part_of", "read_delta", "restore", "save_delta", "trained_tensors",
    "write_tensors",
]


def apply(model: nn.Module, spec: Spec, *, head: frozenset[str] | None = None, seed: int = 0,
          remove: bool | None = False) -> nn.Module:
    """Graft a spec's deltas, silent and trainable, into a transformers model; return the model.

    Everything else is frozen but the head: the parameters named in `head`, by default those
    outside the model's base model.  seed: of the deltas' random factors.
    remove: what the spec prunes is masked by hooks (False), really taken out (True), or taken out
    where the family is proven (None); both compute the same.
    Raises InputError when the spec was made for another architecture, names a site or a
    coordinate that is not there, costs another number of parameters than it says, or when what
    it prunes cannot be taken out.
    """
    if hasattr(model, "searchpet"):
        raise InputError("a model takes one spec at a time, but this one has deltas already; "
                         "load it again, or merge them first")
    _same_architecture(model, spec)
    given, spec = spec, _at_home(spec, model)
    head = outside_base(model) if head is None else head
    plan = structure(spec, discover(model))
    if remove is None:
        remove = (plan.prunes and not plan.weights
                  and removable(model, cut(plan)) is None)
    found = pet_grafts(plan, seed)
    _count(model, spec, found, head)  # before anything is changed
    weighed = weight_grafts(plan)
    if remove and weighed:
        raise InputError("masks of weights leave nothing that can be taken out, so they do not go "
                         "with remove=True; use remove=False")
    dense = fingerprint(model, head) if remove and plan.prunes else None
    if remove and plan.prunes:
        found = pet_grafts(plan, seed, renamer(cut_out(model, cut(plan))))
    else:
        found += mask_grafts(plan) + weighed
    freeze(model, head)
    model.searchpet = Grafts(model, found)
    owner: Any = model
    owner.save_pretrained = Saver(model, given, plan.bits, head, dense)
    return model


def _at_home(spec: Spec, model: nn.Module) -> Spec:
    """The spec with its paths as the model's class has them: those of T5's classifiers begin with
    `transformer.`, those of the T5 that generates do not.  Masks are named by path: they stay.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    inside = isinstance(getattr(model, prefix[:-1], None), nn.Module)
    if prefix == "." or any(e.mask or e.path.startswith(prefix) == inside for e in spec.entries):
        return spec
    return spec.model_copy(update={"entries": tuple(
        e.model_copy(update={"path": prefix + e.path if inside else e.path.removeprefix(prefix)})
        for e in spec.entries)})


def grafts(model: nn.Module) -> Grafts:
    """The deltas of an applied model."""
    found = model.searchpet
    assert isinstance(found, Grafts)  # callers have applied a spec
    return found


def has_masks(model: nn.Module) -> bool:
    """Whether an applied model prunes by hooks, at its old size."""
    return any(graft.delta.neutral == 1 for graft in grafts(model).grafts)


def _count(model: nn.Module, spec: Spec, pet: list[Graft], head: frozenset[str]) -> None:
    """Raise InputError unless the deltas cost what the spec says."""
    counted = sum(graft.parameters for graft in pet)
    if spec.budget.counts == "deltas and head":
        counted += sum(p.numel() for n, p in model.named_parameters() if n in head)
    elif counted != spec.budget.used:
        raise InputError(f"a spec must cost what it says, {spec.budget.used:,} parameters, but "
                         f"its deltas have {counted:,}; it was edited or damaged")
    if counted > spec.budget.limit:
        raise InputError(f"a spec must stay within its budget of {spec.budget.limit:,} "
                         f"parameters, but its {spec.budget.counts} have {counted:,}")


def load(run: str | Path, *, device: str = "cpu", remove: bool | None = None,
         task: str | None = None, model: str | None = None) -> nn.Module:
    """The trained model of a run folder, or of a folder that `save_pretrained` wrote: the
    transformers class, in evaluation mode.

    model: where the backbone lies, if not where its name says (hub, demo extra) or where it lay.
    task: whose head the model gets, for a run on several tasks.
    remove: as in `apply`; by default what the spec prunes is really gone where the family is
    proven, else masked.
    Raises InputError for a damaged or foreign file.
    """
    return restore(run, model, remove=remove, task=task).to(device)


def restore(run: str | Path, model: str | None = None, *, remove: bool | None = None,
            task: str | None = None) -> nn.Module:
    """`load`, on the CPU."""
    folder = RunFolder(run)
    spec = Spec.load(folder.path)
    if (saved := saved_in(folder)) is not None:
        return _restore_saved(folder, spec, *saved, model, remove, task)
    tensors, trained = part_of(*read_delta(folder), task)
    belongs(folder, spec, trained.spec_hash)
    backbone = load_backbone(
        model or origin(folder) or spec.backbone.name, outputs=trained.outputs,
        regression=trained.type == "regression", seed=0,
        revision=None if model or origin(folder) else spec.backbone.revision)
    if backbone.identity.revision != spec.backbone.revision:
        raise InputError(
            f"the backbone must be {spec.backbone.name} at {spec.backbone.revision}, but the one "
            f"found is at {backbone.identity.revision}: other weights give other predictions")
    applied = apply(backbone.model, spec, head=backbone.head, remove=remove)
    name_labels(applied, trained.labels)
    write_tensors(applied, backbone.head, tensors, folder.path / DELTA_FILE)
    return applied.eval()


def _restore_saved(folder: RunFolder, spec: Spec, tensors: Mapping[str, Tensor], saved: Saved,
                   model: str | None, remove: bool | None, task: str | None) -> nn.Module:
    """The model that `save_pretrained` saved."""
    belongs(folder, spec, saved.spec_hash)
    if task is not None:
        raise InputError(f"a folder of save_pretrained has one head, but got {task=}; drop it")
    head = frozenset(saved.head)
    applied = apply(rebuild(folder, spec, saved, model), spec, head=head, remove=remove)
    write_tensors(applied, head, tensors, folder.path / DELTA_FILE)
    return applied.eval()


def save_delta(folder: RunFolder, model: nn.Module, head: frozenset[str],
               trained: Trained) -> str:
    """Write the trained tensors, deltas and head, and nothing else; the file's sha256."""
    folder.write_tensors(DELTA_FILE, trained_tensors(model, head),
                         {"searchpet": trained.model_dump_json()})
    return from_first(lambda: folder.digest(DELTA_FILE))


@torch.no_grad()
def write_tensors(model: nn.Module, head: frozenset[str], tensors: Mapping[str, Tensor],
                  origin: str | Path) -> None:
    """Copy stored tensors into an applied model.  Raises InputError unless names and shapes
    match exactly.
    """
    own = trained_tensors(model, head)
    missing, extra = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    if missing or extra:
        name, state = (min(missing), "lacks") if missing else (min(extra), "has the unknown")
        raise InputError(f"{origin} must hold exactly the tensors of its spec and head, but "
                         f"{state} {name}")
    for name, target in own.items():
        if target.shape != tensors[name].shape:
            raise InputError(f"{origin}: {name} must have shape {tuple(target.shape)}, but has "
                             f"{tuple(tensors[name].shape)}")
        if name.startswith("head/"):
            target.copy_(tensors[name])
    grafts(model).restore(tensors)


def outside_base(model: nn.Module) -> frozenset[str]:
    """Names of the parameters outside a transformers model's base model: its head."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        return frozenset()
    return frozenset(n for n, _ in model.named_parameters() if not n.startswith(f"{prefix}."))


def _same_architecture(model: nn.Module, spec: Spec) -> None:
    config: Any = getattr(model, "config", None)
    if config is None:
        raise InputError("a spec must be applied to a transformers model (one with a config), "
                         f"but got {type(model).__name__}")
    if config_hash(config) != spec.backbone.config_hash:
        raise InputError(
            f"a spec must be applied to the architecture it was made for, {spec.backbone.name} "
            f"(config {spec.backbone.config_hash[:12]}…), but this model's config is "
            f"{config_hash(config)[:12]}…; search again on this model")
