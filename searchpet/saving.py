"""`save_pretrained` of an applied model: a folder for transformers and for `searchpet.load`.

The folder holds the config and the weights as transformers writes them, those of the backbone
and of the head and none of ours, so a plain `from_pretrained` gives the model without its deltas
(the head is the trained one).  Beside them lie spec.json, delta.safetensors (deltas and head) and,
where the spec has some, masks.safetensors; `searchpet.load` builds the applied model of all that.

Two cases differ.  A folder called checkpoint-N is one that a Trainer writes and resumes from, with
`load_state_dict` of its model.safetensors alone: there the deltas stand in that file as well, and
a plain `from_pretrained` of it names them as unexpected.  A model with units removed has no
weights that `from_pretrained` could build: only our files are written (all in a checkpoint), and
`searchpet.load` starts from the backbone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from searchpet.bulk import MASK_FILE
from searchpet.errors import InputError
from searchpet.grafts import Grafts
from searchpet.run import RunFolder
from searchpet.source import locate
from searchpet.spec import Spec, first_problem

DELTA_FILE = "delta.safetensors"
MARK = "saved"  # key of the file's metadata
OWN = "searchpet."  # what the names of our parameters begin with
CHECKPOINT = re.compile(r"checkpoint-\d+")  # as the Trainer calls its own


class Saved(BaseModel):
    """What delta.safetensors says of the model that it was saved from.

    architecture: its class in transformers;  head: names of its parameters;  weights: sha256 of
    the others' names and values;  whole: whether they lie in the folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    spec_hash: str
    architecture: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    head: tuple[str, ...]
    labels: tuple[str, ...]
    problem_type: str | None
    weights: str
    whole: bool


class Saver:
    """Stands in an applied model's `save_pretrained`.

    spec, bits: what was applied, and the masks beside it;  head: parameters that train with it.
    dense: sha256 of the backbone's weights before units were removed, None if none were.
    """

    def __init__(self, model: nn.Module, spec: Spec, bits: Mapping[str, Tensor],
                 head: frozenset[str], dense: str | None) -> None:
        self.model, self.spec, self.bits, self.head = model, spec, bits, head
        self.dense = dense

    def __call__(self, save_directory: str | Path, is_main_process: bool = True,
                 state_dict: Mapping[str, Any] | None = None, push_to_hub: bool = False,
                 **options: Any) -> None:
        """As transformers' `save_pretrained`, with its arguments.

        Raises InputError for a merged model with units removed: nothing could load that.
        """
        model: Any = self.model
        again = re.fullmatch(CHECKPOINT, Path(save_directory).name) is not None
        save = type(model).save_pretrained
        applied = hasattr(model, "searchpet")
        if self.dense is not None and not applied:
            raise InputError("a merged model with units removed has weights that from_pretrained "
                             "cannot build; save it before merging, or take `searchpet export RUN "
                             "--format merged`, which says its sizes where a config can")
        if Path(save_directory).is_file():
            raise InputError(f"save_pretrained must be given a folder, but {save_directory} is a "
                             "file")
        if self.dense is None or again:
            if again:  # the names that load_state_dict knows; from_pretrained knows them too
                options.setdefault("save_original_format", False)
            state = dict(model.state_dict() if state_dict is None else state_dict)
            save(model, save_directory, is_main_process=is_main_process,
                 state_dict=_plain(state, again), **options)
        if applied and is_main_process:
            self._own(RunFolder(save_directory))
        if push_to_hub:  # as a whole: our files are part of what goes up
            model.push_to_hub(options.get("repo_id") or Path(save_directory).name,
                              **{key: options[key] for key in
                                 ("commit_message", "private", "token", "create_pr",
                                  "max_shard_size") if key in options})

    def _own(self, folder: RunFolder) -> None:
        """spec.json, delta.safetensors and masks.safetensors."""
        model: Any = self.model
        config = model.config
        about = Saved(
            spec_hash=self.spec.hash, architecture=type(model).__name__,
            head=tuple(sorted(self.head)), problem_type=config.problem_type,
            labels=tuple(str(config.id2label[i]) for i in range(config.num_labels)),
            weights=self.dense or fingerprint(model, self.head), whole=self.dense is None)
        folder.path.mkdir(parents=True, exist_ok=True)
        if self.bits:
            folder.write_tensors(MASK_FILE, self.bits)
        folder.write_text("spec.json", self.spec.text())
        folder.write_tensors(DELTA_FILE, trained_tensors(model, self.head),
                             {MARK: about.model_dump_json()})


def _plain(state: Mapping[str, Any], own: bool) -> dict[str, Any]:
    """The state under the names of the plain model; with our deltas or without."""
    return {name.replace(".parametrizations.weight.original", ".weight"): value
            for name, value in state.items() if own or not name.startswith(OWN)}


def trained_tensors(model: nn.Module, head: frozenset[str]) -> dict[str, Tensor]:
    """`path:role:kind/parameter` for deltas, `head/name` for the head."""
    parameters, applied = dict(model.named_parameters()), model.searchpet
    own = {f"head/{name}": parameters[name] for name in sorted(head)}
    assert isinstance(applied, Grafts)  # callers have applied a spec
    return {**applied.tensors(), **own}


def fingerprint(model: nn.Module, head: frozenset[str]) -> str:
    """sha256 of the names, shapes and values of all parameters but ours and the head's.

    Names begin in the base model, so that it is the same for classes that only add a head.
    """
    digest = hashlib.sha256()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {_strip(name).removeprefix(prefix): p for name, p in model.named_parameters()
             if name not in head and not name.startswith(OWN)}
    for name in sorted(found):
        value = found[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _strip(name: str) -> str:
    return name.replace(".parametrizations.weight.original", ".weight")


def saved_in(folder: RunFolder) -> tuple[dict[str, Tensor], Saved] | None:
    """Tensors of a folder that `save_pretrained` wrote; None for a run's.

    Raises InputError for a damaged file, and one that belongs to another spec.
    """
    tensors, metadata = folder.read_tensors(DELTA_FILE)
    if MARK not in metadata:
        return None
    try:
        saved = Saved.model_validate(json.loads(metadata[MARK]))
    except ValidationError as error:
        raise InputError(f"{folder.path / DELTA_FILE}: {first_problem(error)}") from error
    except ValueError as error:
        raise InputError(f"{folder.path / DELTA_FILE} must say what it was saved from: {error}"
                         ) from error
    return tensors, saved


def rebuild(folder: RunFolder, spec: Spec, saved: Saved, place: str | None) -> nn.Module:
    """The model that was saved, without its deltas, in evaluation mode.

    place: where the backbone lies, if not in the folder.  Raises InputError where it is not there
    or not the one that the deltas were trained on.
    """
    build = _class_of(folder, saved.architecture)
    source = str(folder.path) if saved.whole and place is None else str(
        locate(place or spec.backbone.name,
               None if place else spec.backbone.revision).folder)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of a bare backbone the head is new; ours follows
    try:
        config = transformers.AutoConfig.from_pretrained(
            source, local_files_only=True, trust_remote_code=False)
        if saved.labels:
            config.id2label = dict(enumerate(saved.labels))
            config.label2id = {label: i for i, label in enumerate(saved.labels)}
        config.problem_type = saved.problem_type
        model: Any = build.from_pretrained(
            source, config=config, local_files_only=True, use_safetensors=True,
            ignore_mismatched_sizes=True)
    except Exception as error:  # a bad folder can raise nearly anything in there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{source} must load as a {saved.architecture}, but: {reason}"
                         ) from error
    finally:
        transformers.logging.set_verbosity(level)
    if absent := set(saved.head) - {name for name, _ in model.named_parameters()}:
        raise InputError(f"{folder.path / DELTA_FILE}: head must name parameters of a "
                         f"{saved.architecture}, but it has no {min(absent)}")
    found = fingerprint(model, frozenset(saved.head))
    if found != saved.weights:
        raise InputError(f"the weights of {source} must be those that the deltas were trained on "
                         f"({saved.weights[:12]}…), but they are {found[:12]}…; give model, the "
                         "folder of the right ones")
    plain: nn.Module = model.eval()
    return plain


def _class_of(folder: RunFolder, name: str) -> Any:
    """The model class of transformers that has this name; nothing else can be named."""
    build = getattr(transformers, name, None)
    if not (isinstance(build, type) and issubclass(build, transformers.PreTrainedModel)):
        raise InputError(f"{folder.path / DELTA_FILE}: architecture must be a model class of "
                         f"transformers, but got {name!r}")
    return build
