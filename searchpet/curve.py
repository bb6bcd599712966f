"""The smaller ones of several budgets: each is trained like any spec, in a folder of its own in
the run, and all together are a curve of scores over parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from searchpet import once
from searchpet.knee import knee
from searchpet.propose import SMALLER
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.settings import asked
from searchpet.spec import Spec


def specs(folder: RunFolder, largest: Spec) -> list[tuple[RunFolder, Spec]]:
    """Folders and specs of all budgets of a run, rising; the last is the run's own."""
    texts = largest.provenance.get("budgets")
    if not texts:
        return [(folder, largest)]
    found = [(RunFolder(path.parent), Spec.load(path.parent))
             for path in (folder.path / SMALLER).glob("*/spec.json")]
    return [*sorted(found, key=lambda pair: pair[1].budget.limit), (folder, largest)]


def begin(session: Session, folder: RunFolder, largest: Spec, **told: Any) -> None:
    """Say in the folder of each smaller spec how it is trained, so that it is a run of its own.

    told: what settings.json says beside the session's settings.
    """
    for sub, spec in specs(folder, largest)[:-1]:
        sub.write_json("settings.json", asked(
            session.settings, command="train", spec=spec.hash, reference=None, sweep=False,
            **told))


def train(session: Session, folder: RunFolder, largest: Spec, test: bool,
          ) -> list[Mapping[str, Any]]:
    """Train what is smaller than the run's own spec; result.json of each, rising."""
    rows: list[Mapping[str, Any]] = []
    for sub, spec in specs(folder, largest)[:-1]:
        session.job = spec.budget.text
        row = once.train(session, sub, spec, session.settings.seed, test=test)
        values = {**once.values_of(session, spec, row, test), "controls": [],
                  "strategy": spec.provenance["strategy"], "full_finetune": None}
        sub.write_json("result.json", values)
        rows.append(values)
    return rows


def summary(folder: RunFolder, largest: Spec, trained: Sequence[Mapping[str, Any]] = (),
            ) -> dict[str, Any]:
    """What result.json says of several budgets; nothing of one.

    trained: results of all, rising, where they were trained; else there is no score.
    """
    found = specs(folder, largest)
    if len(found) < 2:
        return {}
    rows: list[dict[str, Any]] = []
    for number, (sub, spec) in enumerate(found):
        score = trained[number]["score"] if trained else None
        rows.append({
            "budget": spec.budget.text, "limit": spec.budget.limit, "used": spec.budget.used,
            "trainable": trained[number]["trainable"] if trained else None, "score": score,
            "run": sub.path.relative_to(folder.path).as_posix()})
    at = knee([(row["trainable"], row["score"]) for row in rows]) if trained else None
    return {"budgets": rows, "knee": None if at is None else rows[at]["budget"]}
