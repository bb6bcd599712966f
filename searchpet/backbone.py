"""A pretrained transformer with a classification head, from a name to a model with an identity.

The head is exactly the parameters that the checkpoint lacks.  Loading reads one local folder: it
never touches the network, never unpickles and never runs a checkpoint's own code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from searchpet.errors import InputError
from searchpet.source import DEFAULT, Source, locate, nearby

__all__ = [
    "DEFAULT",
    "Backbone",
    "Identity",
    "config_hash",
    "load_backbone",
    "load_tokenizer",
    "skeleton",
]

# Keys of a config that depend on the task, the run or the library, not on the architecture.
VOLATILE = {
    "architectures",
    "classifier_dropout",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class Identity:
    """What a spec says of its backbone.  Never a path.

    name:        the hub's name, or the name of a local folder.
    revision:    the hub's commit, or `sha256:` and the hash of the folder's weight files.
    config_hash: sha256 of the architecture part of the config; the same for every task.
    parameters:  number of parameters without the head, tied ones once.
    """

    name: str
    revision: str
    config_hash: str
    parameters: int


@dataclass
class Backbone:
    """A loaded model, in float32 and evaluation mode; `head` names what is freshly initialised."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: Identity
    head: frozenset[str]


def load_backbone(
    name: str, *, outputs: int, regression: bool, seed: int, revision: str | None = None
) -> Backbone:
    """The model called `name` with a head of `outputs` logits, the same for the same `seed`.

    name: a local folder, or a name on the hub (DEFAULT is also found in the `demo` extra).
    Raises InputError if it cannot be found, verified or used as a sequence classifier.
    """
    if outputs < 1:
        raise InputError(f"outputs >= 1 must hold, but got {outputs=}")
    source = locate(name, revision)
    config = _config(source)
    architecture = config_hash(config)
    config.num_labels = outputs
    config.problem_type = "regression" if regression else "single_label_classification"
    tokenizer = _tokenizer(source)
    model, head = _model(source, config, seed)
    if not source.revision.startswith("sha256:"):  # a copy saved later must not tell our path
        model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = source.name
    # the tokenizer decides: a decoder reads its answer at the last token that is not padding
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    count = sum(p.numel() for n, p in model.named_parameters() if n not in head)
    identity = Identity(source.name, source.revision, architecture, count)
    return Backbone(model, tokenizer, identity, head)


def skeleton(name: str, architecture: str) -> nn.Module | None:
    """The classifier called `name` without weights, on the device `meta`.

    None where its config is not on this machine, or not of that architecture (`config_hash`).
    """
    try:
        with _loading(name):
            config = AutoConfig.from_pretrained(
                nearby(name), local_files_only=True, trust_remote_code=False)
            if (type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
                    or config_hash(config) != architecture):
                return None
            with torch.device("meta"):
                model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    except InputError:  # a figure without it is poorer, not wrong
        return None
    return model


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone, with a padding token.  Raises InputError as `load_backbone` does."""
    return _tokenizer(locate(name, revision))


def _config(source: Source) -> PreTrainedConfig:
    with _loading(source.name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            "backbone must be a model of texts that transformers can give a classification head, "
            f"but {source.name!r} is of type {config.model_type!r}, which has no such class; take "
            "another model, such as a BERT or a LLaMA"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"weights must be plain numbers, but {source.name!r} is quantised; give the original"
        )
    return config


def config_hash(config: PreTrainedConfig) -> str:
    """sha256 of canonical JSON.  Defaults are left out: a later library version may add some."""
    needs_arguments = getattr(config, "has_no_defaults_at_init", False)
    defaults = {} if needs_arguments else type(config)().to_dict()
    architecture = _architecture(config.to_dict(), defaults)
    text = json.dumps(architecture, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _architecture(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _architecture(value, {}) if isinstance(value, dict) else value
        for key, value in config.items()
        if key == "model_type"
        or not (key in VOLATILE or str(key).startswith("_") or value == defaults.get(key, ...))
    }


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    with _loading(source.name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"a batch needs a padding token, but the tokenizer of {source.name!r} has neither "
                "pad_token nor eos_token; set one and save the tokenizer again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(
    source: Source, config: PreTrainedConfig, seed: int
) -> tuple[PreTrainedModel, frozenset[str]]:
    # the head's draw leaves the caller's generator alone
    with _loading(source.name), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source.folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # another task's head, of another size
            output_loading_info=True,
        )
    absent = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    head = frozenset(name for name, _ in model.named_parameters() if name in absent)
    inside = sorted(name for name in head if _in_a_block(model, name))
    if inside:
        raise InputError(
            f"a checkpoint must hold its whole backbone, but {source.name!r} lacks {inside[0]} "
            f"and {len(inside) - 1} more inside its blocks, or has them in another size"
        )
    return model, head


def _in_a_block(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter lies in the stack of blocks: no head does."""
    prefix = f"{model.base_model_prefix}."
    path = name.split(".")
    parents = (model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path)))
    return name.startswith(prefix) and any(isinstance(m, nn.ModuleList) for m in parents)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Quiet while transformers reads a folder; what it says of one it cannot use is one line."""
    try:
        with quietly():
            yield
    except Exception as error:  # a bad folder can raise nearly anything in there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"backbone {name!r} must load as a transformers sequence classifier, but: {reason}"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and its reports, such as of a head that is new."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
