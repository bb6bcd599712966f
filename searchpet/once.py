"""The two long parts of every job, each done once per folder: find a structure, train it.

What is there already is kept, so a job that was cut off goes on by doing the same again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from searchpet import halving
from searchpet.ask import OWN, Ask
from searchpet.bulk import MASK_FILE
from searchpet.inherit import FILE as INHERITED
from searchpet.launch import follow
from searchpet.outside import Outside
from searchpet.propose import propose
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.spacefile import toml
from searchpet.spec import Spec
from searchpet.train import Outcome


def find(session: Session, folder: RunFolder, ask: Ask, seed: int) -> tuple[Spec, float]:
    """The structure of a folder and the seconds that its search took.

    Raises InputError as `propose` does.
    """
    if not folder.has("spec.json"):
        spec, seconds = propose(session, folder, ask, seed)
        if ask.file:
            folder.write_text(OWN, toml(ask.file))
        folder.write_json("search.json", {"seconds": seconds})
        folder.write_text("spec.json", spec.text())
    folder.drop("search*.checkpoint.safetensors")
    follow(folder, "spec.json", MASK_FILE, INHERITED)
    return Spec.load(folder.path), float(folder.read_json("search.json")["seconds"])


def train(session: Session, folder: RunFolder, method: Spec | Outside | str, seed: int, *,
          tau: float | None = None, sweep: bool = False, test: bool = False,
          start: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """The outcome of a folder's training, as plain values.

    sweep: choose tau by validation before; the rest as in `Session.fit`, with what it raises.
    """
    if not folder.has("training.json"):
        tried = halving.sweep(session, method, folder, seed) if sweep else None
        outcome = session.fit(method, folder, seed, tau=tried["tau"] if tried else tau, test=test,
                              start=start)
        found = _counted(tried, outcome, session.settings.steps) if tried else None
        folder.write_json("training.json", {**_row(outcome), "sweep": found})
    folder.drop("train.checkpoint.safetensors")
    folder.drop("sweep-*/train.checkpoint.safetensors")
    return dict(folder.read_json("training.json"))


def _counted(tried: Mapping[str, Any], outcome: Outcome, steps: int) -> dict[str, Any]:
    """A sweep with what it cost, the winner's own training included.

    steps: of one training.  The winner's steps before the choice are counted once.
    """
    won = next(one for one in tried["tried"] if one["tau"] == tried["tau"])
    taken = tried["steps"] + outcome.history[-1][0] - won["steps"]
    return {**tried, "steps": taken, "trainings": round(taken / steps, 4),
            "seconds": round(tried["seconds"] + outcome.seconds, 3)}


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
