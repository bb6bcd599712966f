"""What a run's delta.safetensors says of itself, and what its folder says of where it comes from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from searchpet.errors import InputError
from searchpet.run import RunFolder
from searchpet.saving import DELTA_FILE, MARK
from searchpet.spec import Spec, first_problem


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
    if MARK in metadata:
        raise InputError(f"{folder.path} was written by save_pretrained, which knows no task; "
                         "load it with searchpet.load, or name the folder of a run")
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


def belongs(folder: RunFolder, spec: Spec, spec_hash: str) -> None:
    """Raise InputError unless what lies in a folder was trained for the spec beside it."""
    if spec_hash != spec.hash:
        raise InputError(f"{folder.path / DELTA_FILE} must belong to the spec beside it "
                         f"({spec.hash[:12]}…), but is of {spec_hash[:12]}…")
