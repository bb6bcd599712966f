"""What a study is of: the question that its trials and workers share, checked and read back.

It lies in the study itself, so that a worker on another machine needs nothing but the storage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from optuna.study import Study
from optuna.trial import Trial

from searchpet.ask import Ask
from searchpet.errors import InputError
from searchpet.measures import DIRECTIONS, check_metrics
from searchpet.propose import version
from searchpet.pruning import Prune
from searchpet.settings import Settings, asked
from searchpet.study import OURS, pruner, sampler
from searchpet.tunefile import DEFAULT, Knob, TuneFile

FACTOR, RUNGS, LEAST = 4, 3, 20  # between two rungs; rungs at most; steps of the first at least
DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smh]?)")
TPE = "tpe"  # as a strategy: the outer loop is the search


@dataclass(frozen=True)
class Question:
    """What a study is of; every worker has the same.

    rungs: steps of a trial's searches and trainings, rising; metrics: what trials are judged by;
    limits: metric -> the largest value that is allowed.
    """

    settings: Settings
    ask: Ask
    space: TuneFile
    trials: int
    rungs: tuple[int, ...]
    metrics: tuple[str, ...] = ("score",)
    limits: Mapping[str, float] = field(default_factory=dict)
    sampler: str = "tpe"
    pruner: str = "halving"

    @property
    def directions(self) -> list[str]:
        return [DIRECTIONS[name] for name in self.metrics]

    @property
    def prunes(self) -> bool:
        """Whether trials are compared before their end: Optuna can do so by one metric."""
        return len(self.metrics) == 1 and self.pruner != "none"

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """A value for every knob that counts, in the order of the file."""
        values: dict[str, Any] = {}
        for knob in self.space.knob:
            if knob.counts(values):
                values[knob.name] = _suggested(trial, knob)
        return values


def _suggested(trial: Trial, knob: Knob) -> Any:
    if knob.choices:
        return trial.suggest_categorical(knob.name, knob.choices)
    assert knob.low is not None  # a knob has choices, or both ends
    assert knob.high is not None
    if knob.whole:
        return trial.suggest_int(knob.name, int(knob.low), int(knob.high), log=knob.log)
    return trial.suggest_float(knob.name, knob.low, knob.high, log=knob.log)


def about(question: Question) -> dict[str, Any]:
    """What must not change in a study, as plain values.  Where data and devices are may."""
    settings = {k: v for k, v in asdict(question.settings).items() if k not in ("data", "device")}
    return {
        "version": _compatible(version()), "settings": settings, "ask": question.ask.settings(),
        "space": question.space.model_dump(mode="json"), "metrics": list(question.metrics),
        "limits": dict(question.limits), "rungs": list(question.rungs),
        "sampler": question.sampler, "pruner": question.pruner}


def question_of(study: Study, data: str | None, device: str) -> Question:
    """What a study is of.  Raises InputError for one of another version."""
    had = study.user_attrs[OURS]
    if had.get("version") != _compatible(version()):
        raise InputError(f"study {study.study_name} must be of version {_compatible(version())}, "
                         f"which runs here, but was made by {had.get('version')}; install that "
                         "one, or begin a new study")
    ask = {k: v for k, v in had["ask"].items() if k not in ("space", "prune")}
    prune = Prune(**had["ask"]["prune"]) if had["ask"]["prune"] else None
    return Question(
        Settings(**had["settings"], data=data, device=device), Ask(**ask, prune=prune),
        TuneFile.model_validate(had["space"]), int(study.user_attrs["trials"]),
        tuple(had["rungs"]), tuple(had["metrics"]), had["limits"], had["sampler"], had["pruner"])


def written(question: Question) -> dict[str, Any]:
    """The content of settings.json: model, task and data stand where every run has them."""
    return {**asked(question.settings), "command": "tune",
            **{k: v for k, v in about(question).items() if k != "settings"}}


def _compatible(text: str) -> str:
    """The part of a version that a study depends on: 0.3.1 -> 0.3."""
    return ".".join(text.split(".")[:2])


def check(question: Question, jobs: int) -> None:
    """Raise InputError for what cannot be asked of a study."""
    for name, value in (("--trials", question.trials), ("--jobs", jobs)):
        if value < 1:
            raise InputError(f"{name} must be >= 1, but got {value}")
    check_metrics([*question.metrics, *question.limits])
    if "score" not in question.metrics or len(set(question.metrics)) < len(question.metrics):
        raise InputError("--metric must be score, or score and others, each once, but got "
                         f"{','.join(question.metrics)}")
    sampler(question.sampler, 0, question.trials)
    pruner(question.pruner, question.rungs)


def rungs(steps: int) -> tuple[int, ...]:
    """Steps of a trial's tries: the last one has all of them, those before a quarter each."""
    found = [steps]
    while len(found) < RUNGS and found[0] // FACTOR >= LEAST:
        found.insert(0, found[0] // FACTOR)
    return tuple(found)


def knobs_for(metrics: Sequence[str], prune: Prune | None, strategy: str) -> str:
    """The tuning space that suits what is asked for.  metrics: limited ones too."""
    if strategy == TPE:
        return "autopeft"
    if {"flops", "latency"} & set(metrics):
        return "inference"
    if prune is not None:
        return "prune"
    return "pareto" if len(metrics) > 1 else DEFAULT


def limits_of(given: Mapping[str, str]) -> dict[str, float]:
    """METRIC -> the largest value allowed.  Raises InputError for what nobody can meet."""
    found = {}
    for name, text in given.items():
        if name not in DIRECTIONS or name == "score":
            raise InputError(f"--limit must be of trainable, flops or latency, but got {name}")
        try:
            found[name] = float(text)
        except ValueError as error:
            raise InputError(f"--limit {name} must be a number, but got {text!r}") from error
        if not 0 < found[name] < float("inf"):
            raise InputError(f"--limit {name} must be above 0, which nothing undercuts, but got "
                             f"{text}")
    return found


def duration(text: str | None) -> float | None:
    """Seconds of `90s`, `30m`, `2h`, `90`.  Raises InputError for anything else."""
    if text is None:
        return None
    match = DURATION.fullmatch(text.strip())
    if not match or float(match[1]) == 0:
        raise InputError(f"--timeout must be a time such as 90s, 30m or 2h, but got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
