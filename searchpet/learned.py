"""One task of a folder: spec, deltas and head, whether a run or `save_pretrained` wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from searchpet.backbone import load_backbone
from searchpet.run import RunFolder
from searchpet.saving import Saved, rebuild, saved_in
from searchpet.spec import Spec
from searchpet.stored import Trained, belongs, origin, part_of, read_delta


@dataclass(frozen=True)
class Learned:
    """What a folder says of one task; about: of which kind the folder is."""

    folder: RunFolder
    spec: Spec
    tensors: Mapping[str, Tensor]
    labels: tuple[str, ...]
    about: Saved | Trained

    @property
    def task(self) -> str | None:
        """Its name; None where `save_pretrained` wrote the folder, which knows none."""
        return self.about.task if isinstance(self.about, Trained) else None

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the head's parameters in the model."""
        return tuple(name.removeprefix("head/") for name in self.tensors
                     if name.startswith("head/"))


def learned(name: str | None, place: str | Path) -> Learned:
    """One task of a folder; of a run on several tasks, the one of this name, which must be said.

    Raises InputError for a file that is damaged or of another spec.
    """
    folder = RunFolder(place)
    spec = Spec.load(folder.path)
    about: Saved | Trained
    if (saved := saved_in(folder)) is not None:
        tensors, about = saved
    else:
        everything, whole = read_delta(folder)
        tensors, about = part_of(everything, whole, name if whole.parts else None)
    belongs(folder, spec, about.spec_hash)
    return Learned(folder, spec, tensors, about.labels, about)


def backbone_of(one: Learned, place: str | None) -> tuple[nn.Module, str | None]:
    """The model that a folder's task is of, and the revision of its weights."""
    if isinstance(one.about, Saved):
        return rebuild(one.folder, one.spec, one.about, place), None
    own = place or origin(one.folder)
    backbone = load_backbone(
        own or one.spec.backbone.name, outputs=one.about.outputs, regression=False, seed=0,
        revision=None if own else one.spec.backbone.revision)
    return backbone.model, backbone.identity.revision
