"""The two long parts of every job, each done once per folder: find a structure, train it.

What is there already is kept, so a job that was cut off goes on by doing the same again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from searchpet.ask import OWN, Ask
from searchpet.bulk import MASK_FILE
from searchpet.inherit import FILE as INHERITED
from searchpet.launch import follow
from searchpet.outside import Outside
from searchpet.propose import SMALLER, budgets_of, propose
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.spacefile import toml
from searchpet.spec import Spec
from searchpet.train import Outcome


def find(session: Session, folder: RunFolder, ask: Ask, seed: int, scores: bool = False,
         ) -> tuple[Spec, float]:
    """The structure of a folder and the seconds that its search took.

    scores: keep those of all units.  Raises InputError as `propose` does.
    """
    if not folder.has("spec.json"):
        spec, seconds = propose(session, folder, ask, seed, scores)
        if ask.file:
            folder.write_text(OWN, toml(ask.file))
        folder.write_json("search.json", {"seconds": seconds})
        folder.write_text("spec.json", spec.text())
    folder.drop("search*.checkpoint.safetensors")
    own = (f"{SMALLER}/{budget.limit}/spec.json" for budget, _ in budgets_of(session, ask))
    follow(folder, "spec.json", MASK_FILE, INHERITED, *own)
    return Spec.load(folder.path), float(folder.read_json("search.json")["seconds"])


def train(session: Session, folder: RunFolder, method: Spec | Outside | str, seed: int, *,
          tau: float | None = None, sweep: bool = False, test: bool = False,
          start: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """The outcome of a folder's training, as plain values.

    sweep: choose tau by validation before; the rest as in `Session.fit`, with what it raises.
    """
    if not folder.has("training.json"):
        tried = session.sweep(method, folder, seed) if sweep else []
        if tried:
            tau = max(tried, key=lambda pair: pair[1])[0]
        outcome = session.fit(method, folder, seed, tau=tau, test=test, start=start)
        folder.write_json("training.json", {**_row(outcome), "sweep": tried})
    folder.drop("train.checkpoint.safetensors")
    return dict(folder.read_json("training.json"))


def _row(outcome: Outcome) -> dict[str, Any]:
    """`score` is test's first metric where test was asked for."""
    metrics = outcome.test or outcome.metrics
    return {
        "score": next(iter(metrics.values())), "metrics": metrics,
        "validation_score": outcome.score, "start_score": outcome.start,
        "trainable": outcome.trainable, "head": outcome.head,
        "tau": outcome.tau, "best_step": outcome.step, "train_seconds": outcome.seconds,
        "history": outcome.history, "most": outcome.most,
        "removed": outcome.removed, "tensors": outcome.tensors,
    }


def values_of(session: Session, spec: Spec | None, row: Mapping[str, Any], test: bool,
              ) -> dict[str, Any]:
    """The part of result.json that every run has."""
    backbone = session.identity.parameters
    return {
        "task": session.task.name, "metric": session.task.metrics[0],
        "split": "test" if test else "validation", "score": row["score"],
        "metrics": row["metrics"], "validation_score": row["validation_score"],
        "budget_limit": spec.budget.limit if spec else None, "trainable": row["trainable"],
        "head": row["head"], "backbone": backbone, "fraction": row["trainable"] / backbone,
        "seed": session.settings.seed, "tau": row["tau"],
        "spec_hash": spec.hash if spec else None,
        "keep": spec.keep.model_dump() if spec and spec.keep else None,
        "removed": row["removed"], "tensors": row.get("tensors"),
        "seconds": {"search": row.get("search_seconds", 0.0), "train": row["train_seconds"]},
        "warnings": [*session.task.warnings, *_in_vain(spec, row)],
    }


def _in_vain(spec: Spec | None, row: Mapping[str, Any]) -> list[str]:
    """A warning where training made a structure worse than it began."""
    start, score = row.get("start_score"), row["validation_score"]
    if spec is None or start is None or score >= start:
        return []
    return [f"training ended at {score:.4f} on validation, below the {start:.4f} that it began "
            "with; try a smaller --tau, or `searchpet train SPEC --sweep`"]
