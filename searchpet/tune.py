"""The outer loop: a study of searches, run by one process or by many, that leaves a run behind.

The parent makes the study and, with several jobs, starts workers that join it by name; workers on
other machines join in the same way.  Nothing of a study lies in memory alone: any of them may die.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from searchpet.ask import STRATEGY, Ask
from searchpet.collect import STORE, fetch, front, keep, open_store, own, winner
from searchpet.engine import Result, default_out, evaluate, latencies
from searchpet.errors import InputError, shown
from searchpet.latency import Table
from searchpet.multitask import open_session
from searchpet.once import values_of
from searchpet.propose import budget_of
from searchpet.pruning import asked as prune_to
from searchpet.question import (
    FACTOR,
    LEAST,
    TPE,
    Question,
    about,
    check,
    duration,
    knobs_for,
    limits_of,
    question_of,
    rungs,
    written,
)
from searchpet.roster import standing, trials_of
from searchpet.run import Listener, RunFolder, silent
from searchpet.session import Session
from searchpet.settings import Settings
from searchpet.study import create, join, open_storage, run_proxy
from searchpet.tunefile import read_tune
from searchpet.worker import REUSED, Worker
from searchpet.workers import Crew, run_workers

UNTIL = "until"  # study attribute: the time after which no trial begins
LATENCY = "latency"  # study attribute: what units take, by which all trials are priced
FILE = "study.db"


def tune(
    *,
    trials: int = 50,
    timeout: str | None = None,
    study: str | None = None,
    storage: str | None = None,
    jobs: int = 1,
    metric: str = "score",
    limit: Mapping[str, str] | None = None,
    knobs: str | None = None,
    sampler: str = "tpe",
    pruner: str = "halving",
    artifacts: str | None = None,
    strategy: str = STRATEGY,
    budget: str = "0.01%",
    keep_flops: str | None = None,
    keep_weights: str | None = None,
    keep_latency: str | None = None,
    masks: str | None = None,
    count_head: bool = False,
    test: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    plugins: Sequence[str] = (),
    say: Callable[[str], None] = print,
    listener: Listener = silent,
    **settings: Any,
) -> Result:
    """Turn the knobs of a search for `trials` trials; leave the best one in `out` as a run.

    knobs: a tuning space by name or file; by default one that suits the rest.  metric: some of
    score, trainable, flops, latency, joined by commas; limit: the largest value of a metric that
    the best may have.  strategy: of trials where no knob chooses one; `tpe`: none, the knobs are
    the structure.  storage: address of a database; by default a file in `out`.  jobs: processes
    on this machine.  timeout: such as 90s, 30m, 2h; no trial begins later.  test: score the best
    one on the test split, once, at the end.  settings: fields of `Settings`.
    Raises InputError for whatever is wrong with the input.
    """
    chosen, seconds = Settings(**settings), duration(timeout)
    base = STRATEGY if strategy == TPE else strategy
    prune = prune_to(keep_flops, keep_weights, keep_latency, masks, base)
    ask = Ask(base, None, {}, budget, count_head, prune)
    metrics, limits = tuple(name.strip() for name in metric.split(",")), limits_of(limit or {})
    question = Question(
        chosen, ask, read_tune(knobs or knobs_for((*metrics, *limits), prune, strategy)), trials,
        rungs(chosen.steps), metrics, limits, sampler, pruner)
    check(question, jobs)
    if question.prunes and len(question.rungs) == 1:
        say(f"--pruner {pruner} needs --steps {FACTOR * LEAST} or more to compare trials before "
            f"their end: with {chosen.steps}, every trial runs to its end")
    if storage and not storage.startswith(("sqlite:", "journal:")):
        open_storage(storage)  # it must answer before anything is written
    if artifacts:
        open_store(artifacts, make=True)  # before anything is written
    folder = RunFolder(out or default_out(chosen, replace(ask, strategy="tune")))
    folder.start(written(question), resume)
    session = open_session(chosen, listener)
    budget_of(session, budget, count_head)[0].afford(1)
    table = latencies(session, folder, ask)
    crew = Crew(storage or f"sqlite:///{folder.path / FILE}", study or folder.path.name,
                folder.path, jobs, artifacts or str((folder.path / STORE).resolve()),
                chosen.data, chosen.device, tuple(plugins))
    made = create(crew.storage, crew.study, question.directions, about(question), resume)
    open_store(crew.artifacts, make=True)  # not before: a study that is refused leaves no files
    own(made, folder, begun=True)
    made.set_user_attr("trials", trials)
    made.set_user_attr(STORE, crew.artifacts)
    made.set_user_attr(LATENCY, table.model_dump() if table else None)
    made.set_user_attr(UNTIL, time.time() + seconds if seconds else None)
    for start in question.space.starts()[:trials]:
        made.enqueue_trial(start, skip_if_exists=True)
    if jobs > 1:
        run_workers(crew, made, say)
    else:
        _worker(made, question, session, folder.path, say).work()
    if (ended := standing(made).finished) < trials:
        within = f" within --timeout {timeout}" if timeout else ""
        say(f"{ended} of {trials} trials have ended{within}; repeat the command with --resume to "
            "go on")
    return finish(made, question, session, folder, test)


def work(storage: str, study: str | None, *, out: str | Path | None = None,
         data: str | None = None, device: str = "auto", say: Callable[[str], None] = print,
         listener: Listener = silent) -> None:
    """Be a worker of a study that `tune` has made, until it has all its trials.

    out: where trials leave their files; data: where the task lies on this machine.
    Raises InputError for a study that is not there or is of another version.
    """
    made = join(storage, study)
    question = question_of(made, data, device)
    open_store(str(made.user_attrs[STORE]))  # before anything is run that could not be left there
    folder = RunFolder(out or f"runs/{made.study_name}")
    own(made, folder)
    session = open_session(question.settings, listener)
    _worker(made, question, session, folder.path, say).work()


def collect(storage: str, study: str | None, *, out: str | Path | None = None,
            data: str | None = None, device: str = "auto", artifacts: str | None = None,
            test: bool = False, listener: Listener = silent) -> Result:
    """Write the best trial of a study to `out`, on whatever machine.

    Raises InputError as `work` does, and where no trial has finished.
    """
    made = join(storage, study)
    question = question_of(made, data, device)
    winner(made, question)
    folder = RunFolder(out or f"runs/{made.study_name}")
    own(made, folder)
    session = open_session(question.settings, listener)
    return finish(made, question, session, folder, test, artifacts)


def serve(storage: str, address: str, say: Callable[[str], None] = print) -> None:
    """Stand before a database as a gRPC proxy until interrupted.

    say: gets a line before it begins.

    Raises InputError for an address that is none, or taken, and where grpcio is not installed.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise InputError(f"--serve must read HOST:PORT, but got {address!r}")
    database, host = open_storage(storage), host or "localhost"
    say(f"serving {shown(storage)}; workers join by searchpet tune --worker --storage "
        f"grpc://{host}:{port} --study NAME")
    run_proxy(database, host, int(port))


def finish(study: Study, question: Question, session: Session, folder: RunFolder,
           test: bool = False, artifacts: str | None = None) -> Result:
    """Write the best trial's files and result.json; of several metrics, the front as well.

    artifacts: where they are, if not where the study says.
    """
    best = winner(study, question)
    spec = fetch(study, folder.path, best, folder, artifacts)
    leading = front(study, question)
    for trial in leading if len(question.metrics) > 1 else ():
        fetch(study, folder.path, trial, folder.sub(f"front/{trial.number:04d}"), artifacts)
    session.settings = replace(question.settings, tau=_tau(best, question))
    row = dict(folder.read_json("training.json"))
    if test:
        row |= _tested(session, folder)
    now = standing(study)
    values = {
        **values_of(session, spec, row, test), "strategy": spec.provenance["strategy"],
        "space": spec.provenance["space"], "full_finetune": None,
        # trials were judged by validation: beside a test score theirs would mislead
        "controls": [] if test else _known_good(study, question, best),
        "study": {
            "name": study.study_name, "trial": best.number, "trials": now.finished,
            "pruned": now.pruned, "failed": now.failed, "params": best.params,
            "front": [{"trial": t.number, **dict(zip(question.metrics, t.values, strict=True))}
                      for t in leading]}}
    if not folder.has("settings.json"):
        folder.write_json("settings.json", written(question))
    folder.write_json("result.json", values)
    return Result(folder.path, spec, values)


def _known_good(study: Study, question: Question, best: FrozenTrial) -> list[dict[str, Any]]:
    """Rows for the comparison: what the settings that were tried first came to."""
    rows = []
    starts = question.space.starts()
    for trial in trials_of(study):
        if (trial.params in starts and trial.number != best.number and trial.values
                and trial.user_attrs.get(REUSED) is None):
            strategy = str(trial.params.get("strategy", "start"))
            rows.append({
                "name": "defaults" if trial.params == starts[0] else strategy,
                "score": trial.user_attrs["score"],
                "trainable": int(trial.user_attrs["trainable"])})
    return rows


def _tested(session: Session, folder: RunFolder) -> dict[str, Any]:
    """The best trial's metrics on test: the one time that test data is touched."""
    metrics = evaluate(folder.path, data=session.settings.data, split="test")
    return {"metrics": metrics, "score": next(iter(metrics.values()))}


def _worker(study: Study, question: Question, session: Session, folder: Path,
            say: Callable[[str], None]) -> Worker:
    until = study.user_attrs.get(UNTIL)
    where = str(study.user_attrs[STORE])
    if table := study.user_attrs.get(LATENCY):
        session.table = Table.model_validate(table)
    return Worker(question, study, session, folder, say,
                  partial(keep, study, question, where), until or float("inf"))


def _tau(trial: FrozenTrial, question: Question) -> float:
    return float(trial.params.get("tau", question.settings.tau))
