"""Recall: the command of a run, from the settings in its folder, so that it runs as it stands.

Works for runs that Python has started as well.  Options at their defaults are left out, --out and
--resume too: the command makes a new run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import tomli_w

from searchpet.ask import STRATEGY, Ask, space_of
from searchpet.errors import InputError, shown
from searchpet.pruning import MASKS
from searchpet.recovery import TERMS, Recovery
from searchpet.run import RunFolder
from searchpet.settings import Settings
from searchpet.spacefile import tune_names
from searchpet.transfer import SOURCE
from searchpet.tunefile import TuneFile, read_tune

KNOBS = "knobs.toml"
ALWAYS = ("model", "task")  # stand in every command: they are the question
FLAGS = {"count_head": "--count-head", "full": "--full", "test": "--test",
         "no_train": "--no-train", "sweep": "--sweep"}


def command_of(folder: RunFolder) -> str | None:
    """A shell line, without passwords; None where settings.json says no command.

    Writes the knobs of a study of its own beside the run, since the command names them.
    """
    asked = folder.read_json("settings.json") if folder.has("settings.json") else {}
    verbs = {"search": _search, "train": _train, "transfer": _transfer, "tune": _tune}
    verb = asked.get("command") if isinstance(asked, dict) else None
    if not isinstance(verb, str) or verb not in verbs:
        return None
    if verb == "transfer" and not folder.has(SOURCE):  # of an older version
        return None
    words = ["searchpet", verb, *verbs[verb](asked, folder), *_settings(asked)]
    words += [flag for name, flag in FLAGS.items() if asked.get(name) is True]
    return shlex.join(map(shown, map(str, words)))


def _settings(asked: Mapping[str, Any]) -> list[Any]:
    words: list[Any] = []
    for field in fields(Settings):
        value = asked.get(field.name)
        if value is not None and (field.name in ALWAYS or value != field.default):
            words += [f"--{field.name.replace('_', '-')}", value]
    return words


def _search(asked: Mapping[str, Any], folder: RunFolder) -> list[Any]:
    return [*_ask(asked), *_option("--distill", asked.get("distill")), *_start(asked),
            *_recovery(asked.get("recovery")), *_option("--controls", asked.get("controls"), 1)]


def _start(asked: Mapping[str, Any]) -> list[str]:
    """What the training starts from, where that is not the usual."""
    try:
        usual = Ask(asked.get("strategy", STRATEGY), budget=asked.get("budget", Ask.budget),
                    prune=asked.get("prune")).inherits
    except InputError:  # a strategy that is not here
        usual = False
    inherits = bool(asked.get("inherit"))
    if inherits == usual or asked.get("no_train"):
        return []
    return ["--inherit" if inherits else "--fresh"]


def _train(asked: Mapping[str, Any], folder: RunFolder) -> list[Any]:
    reference = {"full": "--full", "head": "--head-only"}.get(str(asked.get("reference")))
    return [reference or folder.path / "spec.json", *_option("--distill", asked.get("distill")),
            *_recovery(asked.get("recovery"))]


def _transfer(asked: Mapping[str, Any], folder: RunFolder) -> list[Any]:
    return [folder.path / SOURCE, *_option("--budget", asked.get("budget")),
            *_option("--controls", asked.get("controls"), 0),
            *([] if asked.get("train", True) else ["--no-train"])]


def _tune(asked: Mapping[str, Any], folder: RunFolder) -> list[Any]:
    found = folder.read_json("result.json").get("study", {}) if folder.has("result.json") else {}
    words = _option("--trials", found.get("trials"), 50)
    words += _option("--metric", ",".join(asked.get("metrics", [])), "score")
    for name, most in (asked.get("limits") or {}).items():
        words += ["--limit", f"{name}={most:g}"]
    words += _option("--sampler", asked.get("sampler"), "tpe")
    words += _option("--pruner", asked.get("pruner"), "halving")
    ask = {k: v for k, v in (asked.get("ask") or {}).items() if k not in ("space", "set")}
    return [*words, *_option("--knobs", _knobs(asked.get("space"), folder)), *_ask(ask)]


def _knobs(content: Any, folder: RunFolder) -> str | None:
    """The name of a study's tuning space, or of a file that holds it."""
    if not isinstance(content, Mapping):
        return None
    space = TuneFile.model_validate(content)
    for name in tune_names():
        if read_tune(name).model_dump(mode="json") == space.model_dump(mode="json"):
            return name
    plain = space.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    folder.write_text(KNOBS, tomli_w.dumps(plain))
    return str(folder.path / KNOBS)


def _ask(asked: Mapping[str, Any]) -> list[Any]:
    """What is searched, within which budgets."""
    strategy = str(asked.get("strategy", STRATEGY))
    words = [*_option("--strategy", strategy, STRATEGY),
             *_option("--space", asked.get("space"), _own_space(strategy))]
    for key, value in (asked.get("set") or {}).items():
        words += ["--set", f"{strategy.partition(':')[0]}.{key}={value}"]
    words += _option("--budget", asked.get("budget"))
    words += [word for name in ("must", "forbid") for text in asked.get(name) or ()
              for word in (f"--{name}", text)]
    prune = asked.get("prune")
    if prune:
        words += [f"--keep-{prune['measure']}", prune["text"],
                  *_option("--masks", prune["masks"], MASKS)]
    return words


def _own_space(strategy: str) -> str | None:
    try:
        return space_of(strategy, None)
    except InputError:  # a strategy that is not here: say the space
        return None


def _recovery(terms: Mapping[str, Any] | None) -> list[Any]:
    """Terms with a weight: to name one is to drop the others.  Options that are not default."""
    default = {f.name: 0.0 if f.name in TERMS else f.default for f in fields(Recovery)}
    return [word for name, value in (terms or {}).items() if value != default.get(name)
            for word in ("--recovery", f"{name}={value}")]


def _option(name: str, value: Any, default: Any = None) -> list[Any]:
    return [] if value is None or value in ("", default) else [name, value]
