"""What a finished run is good for: scores on other data, and labels for new texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from searchpet.apply import (
    DELTA_FILE,
    asked_before,
    origin,
    part_of,
    read_delta,
    restore,
)
from searchpet.backbone import load_tokenizer
from searchpet.batch import encode
from searchpet.errors import InputError
from searchpet.run import RunFolder
from searchpet.spec import Spec
from searchpet.task import Split, load_task, read_texts
from searchpet.train import evaluate as measure_model
from searchpet.train import predict as logits_of


def evaluate(run: str | Path, *, task: str | None = None, data: str | None = None,
             split: str = "validation", model: str | None = None, batch_size: int = 128,
             ) -> dict[str, float]:
    """Metrics of a trained run on a split of its task, or of another task with the same labels.

    Of a run on several tasks: on the one named, by its own name or as --task had it, else on each,
    as `task/metric`.
    """
    tensors, trained = read_delta(RunFolder(run))
    if trained.parts and task is None:
        return {f"{part.task}/{name}": value for part in trained.parts
                for name, value in evaluate(run, task=part.task, data=data, split=split,
                                            model=model, batch_size=batch_size).items()}
    before, own = asked_before(RunFolder(run)), None
    if trained.parts and task is not None:
        own, task = learned(run, task)
    _, trained = part_of(tensors, trained, own)
    found = load_task(task or before.get("task") or trained.task,
                      data=Path(d) if (d := data or before.get("data")) else None)
    if found.labels != trained.labels:
        raise InputError(f"evaluate needs a task with the labels that the run learned, "
                         f"{', '.join(trained.labels) or 'a number'}, but {found.name} has "
                         f"{', '.join(found.labels) or 'a number'}")
    part = found.splits.get(split)
    if part is None or part.labels is None:
        labelled = ", ".join(n for n, s in found.splits.items() if s.labels is not None)
        raise InputError(f"--split must be a labelled split of {found.name}, {labelled}, but got "
                         f"{split!r}")
    applied, tokenizer = _with_tokenizer(run, model, own)
    encoded = encode(part, tokenizer, trained.max_length)
    return measure_model(applied, encoded, found.metrics, batch_size)


def predict(run: str | Path, file: str | Path, *, task: str | None = None,
            model: str | None = None, batch_size: int = 128) -> list[dict[str, Any]]:
    """Predictions for new texts, one row each: the fields, `prediction`, and class `scores`.

    task: whose head predicts, for a run on several tasks.
    """
    task = learned(run, task)[0] if task is not None else None
    _, trained = part_of(*read_delta(RunFolder(run)), task)
    columns = read_texts(Path(file), trained.fields)
    applied, tokenizer = _with_tokenizer(run, model, task)
    encoded = encode(Split(columns, None), tokenizer, trained.max_length)
    logits = logits_of(applied, encoded, batch_size)
    rows = []
    for texts, row in zip(zip(*columns, strict=True), logits, strict=True):
        named: dict[str, Any] = dict(zip(trained.fields, texts, strict=True))
        if trained.labels:
            named["prediction"] = trained.labels[int(row.argmax())]
            named["logits"] = [round(float(v), 6) for v in row]
        else:
            named["prediction"] = round(float(row[0]), 6)
        rows.append(named)
    return rows


def _with_tokenizer(run: str | Path, model: str | None, task: str | None) -> tuple[Any, Any]:
    spec = Spec.load(run)
    own = model or origin(RunFolder(run))
    revision = None if own else spec.backbone.revision
    return restore(run, model, task=task), load_tokenizer(own or spec.backbone.name,
                                                          revision=revision)


def learned(run: str | Path, task: str) -> tuple[str, str]:
    """One of a run's tasks by its name in the run, and as --task named it: a folder, say.

    task: either of the two.  What is neither, or of a run on one task, is given back as both.
    """
    folder = RunFolder(run)
    if not folder.has(DELTA_FILE):
        return task, task
    names = [part.task for part in read_delta(folder)[1].parts]
    items = [item.strip() for item in str(asked_before(folder).get("task")).split(",")]
    for name, item in zip(names, items, strict=False):
        if task in (name, item) or Path(task).expanduser() == Path(item).expanduser():
            return name, item
    return task, task
