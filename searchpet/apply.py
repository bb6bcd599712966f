"""From a spec to a model: `apply` grafts its deltas, `load` also restores the trained tensors.

An applied model is the transformers model itself with one submodule more, `model.searchpet`; its
forward, its loss and its `.logits` are unchanged, so `transformers.Trainer` trains it as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
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
from searchpet.spec import Spec, first_problem
from searchpet.supernet import freeze

DELTA_FILE = "delta.safetensors"


class Trained(BaseModel):
    """What delta.safetensors says of itself: enough to rebuild the model and read its output.

    parts: of each task, where there are several; their heads lie side by side.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    spec_hash: str
    task: str
    type: Literal["classification", "regression"]
    fields: tuple[str, ...] = Field(min_length=1, max_length=2)
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = Field(min_length=1)
    max_length: int = Field(gt=0)
    parts: tuple[Trained, ...] = ()

    @property
    def outputs(self) -> int:
        return len(self.labels) or 1


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
    spec = _at_home(spec, model)
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
    if remove and plan.prunes:
        found = pet_grafts(plan, seed, renamer(cut_out(model, cut(plan))))
    else:
        found += mask_grafts(plan) + weighed
    freeze(model, head)
    model.searchpet = Grafts(model, found)
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
                         f"parameters, but its deltas have {counted:,}")


def load(run: str | Path, *, device: str = "cpu", remove: bool | None = None,
         task: str | None = None, model: str | None = None) -> nn.Module:
    """The trained model of a run folder: the transformers class, in evaluation mode.

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
    tensors, trained = part_of(*read_delta(folder), task)
    if trained.spec_hash != spec.hash:
        raise InputError(f"{folder.path / DELTA_FILE} must belong to the spec beside it "
                         f"({spec.hash[:12]}…), but is of {trained.spec_hash[:12]}…")
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


def origin(folder: RunFolder) -> str | None:
    """The local folder that the run's backbone was taken from, if it was one and is there."""
    model = asked_before(folder).get("model")
    return model if isinstance(model, str) and Path(model).is_dir() else None


def asked_before(folder: RunFolder) -> dict[str, Any]:
    """What a run was asked for; nothing where no settings.json is left.

    Raises InputError for a file that is no object.
    """
    found = folder.read_json("settings.json") if folder.has("settings.json") else {}
    if not isinstance(found, dict):
        raise InputError(f"{folder.path / 'settings.json'} must be an object of settings, but is "
                         f"a {type(found).__name__}; it was edited or damaged, delete it")
    return found


def name_labels(model: nn.Module, labels: tuple[str, ...]) -> None:
    """Write the class names into the model's config."""
    if labels:
        config: Any = model.config
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}


def read_delta(folder: RunFolder) -> tuple[dict[str, Tensor], Trained]:
    """Tensors of delta.safetensors and what they are for.  Raises InputError if damaged."""
    tensors, metadata = folder.read_tensors(DELTA_FILE)
    try:
        return tensors, Trained.model_validate(json.loads(metadata.get("searchpet", "null")))
    except ValidationError as error:
        raise InputError(f"{folder.path / DELTA_FILE}: {first_problem(error)}") from error
    except ValueError as error:
        raise InputError(f"{folder.path / DELTA_FILE} must say what it is for: {error}") from error


def part_of(tensors: dict[str, Tensor], trained: Trained, task: str | None,
            ) -> tuple[dict[str, Tensor], Trained]:
    """What is of one task; all there is, where there is only one.

    Raises InputError where it must be said which, and for a task that the run has not learned.
    """
    names = [part.task for part in trained.parts] or [trained.task]
    if task is None and len(names) > 1:
        raise InputError(f"a run on several tasks must be loaded for one of them, "
                         f"{', '.join(names)}; give task, --task on the command line")
    if task is not None and task not in names:
        raise InputError(f"task must be one that the run has learned, {', '.join(names)}, but got "
                         f"{task!r}")
    if not trained.parts:
        return tensors, trained
    number = names.index(task or "")
    found = {}
    for name, value in tensors.items():
        of = re.search(r"\.of\.([0-9]+)\.", name) if name.startswith("head/") else None
        if of is None:
            found[name] = value
        elif int(of[1]) == number:
            found[name.replace(of[0], ".")] = value
    return found, trained.parts[number]


def save_delta(folder: RunFolder, model: nn.Module, head: frozenset[str],
               trained: Trained) -> str:
    """Write the trained tensors, deltas and head, and nothing else; the file's sha256."""
    folder.write_tensors(DELTA_FILE, trained_tensors(model, head),
                         {"searchpet": trained.model_dump_json()})
    return from_first(lambda: folder.digest(DELTA_FILE))


def trained_tensors(model: nn.Module, head: frozenset[str]) -> dict[str, Tensor]:
    """`path:role:kind/parameter` for deltas, `head/name` for the head."""
    parameters = dict(model.named_parameters())
    own = {f"head/{name}": parameters[name] for name in sorted(head)}
    return {**grafts(model).tensors(), **own}


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
