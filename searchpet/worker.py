"""A worker of the outer loop: Optuna turns the knobs of the search, trial after trial.

A trial is a search and a training, first with few steps, then with more while it is among the
better ones (successive halving: Li et al. 2018, arXiv:1810.05934), at last with as many as were
asked for.  Structures are hashed: one that was trained before, with the same steps and tau, is not
trained again.  Every worker does the same: it takes the next trial until there are enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from searchpet import once
from searchpet.ask import Ask
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.interrupts import Held
from searchpet.knobs import Values, ask_of, settings_of
from searchpet.ledger import claim
from searchpet.measures import measures
from searchpet.propose import budget_of, version
from searchpet.question import Question
from searchpet.roster import (
    FAILURE,
    VERSION,
    Surplus,
    admit,
    again,
    root,
    standing,
    take_back,
    trials_of,
    unclaimed,
)
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.site import Site
from searchpet.spacefile import SpaceFile, read_space
from searchpet.spec import Spec
from searchpet.study import pruner, sampler
from searchpet.train import Recipe

REUSED = "reused"  # trial attribute: the trial whose last score was taken over; or None
RUN = "run"  # trial attribute: the folder of its last rung, in the study's folder
PAUSE = 1.0  # seconds between looks at whether another worker's trial has ended or died


@dataclass
class Worker:
    """One process of a study.

    folder: where trials leave their runs; say: gets a line per trial; store: keeps the files of a
    finished trial; deadline: time after which no trial is begun.
    """

    question: Question
    study: Study
    session: Session
    folder: Path
    say: Callable[[str], None] = print
    store: Callable[[Trial, Path], None] = lambda trial, path: None
    deadline: float = math.inf

    def __post_init__(self) -> None:
        self._began, self._first = time.time(), standing(self.study).finished
        self._held = Held()  # Ctrl-C waits while a trial is begun, ended or given back

    @cached_property
    def _base(self) -> SpaceFile:
        return read_space(self.question.space.base)

    @cached_property
    def _sites(self) -> tuple[Site, ...]:
        with self.session.fresh(self.question.settings.seed) as model:
            return discover(model)

    @cached_property
    def _noise(self) -> float:
        """One standard error of the difference between two shares near one half of the validation
        rows.
        """
        return math.sqrt(0.5 / len(self.session.splits["validation"]))

    def work(self) -> None:
        """Take trials until there are enough, and none is left behind by a worker that died."""
        with self._held:
            take_back(self.study)
            while any(map(unclaimed, trials_of(self.study))):  # the dead come before what is new
                self._wait(PAUSE / 4)
            while time.time() < self.deadline:
                now = standing(self.study)
                if now.waiting or now.fresh < self.question.trials:
                    self._next()
                elif now.running:
                    self._wait(PAUSE)
                else:
                    return

    def _wait(self, seconds: float) -> None:
        """For the trials of others."""
        with self._held.through():
            time.sleep(seconds)
        take_back(self.study)

    def _next(self) -> None:
        """Run one trial.  What it samples depends on its place and on what is finished, so that
        a study that was cut off goes on to the same trials.
        """
        q = self.question
        self.study.pruner = pruner(q.pruner if q.prunes else "none", q.rungs, self._noise)
        running: list[Trial] = []
        lost: list[int] = []

        def objective(trial: Trial) -> Any:
            running.append(trial)
            try:
                found = self._run(trial)
            except optuna.exceptions.UpdateFinishedTrialError:
                lost.append(trial.number)
                raise
            lost.append(trial.number)  # what is left can only fail if the trial was taken away
            return found

        try:
            self.study.optimize(objective, n_trials=1, catch=(InputError, Surplus))
        except Exception:
            if lost:  # it was silent for so long that it was taken for dead: somebody repeats it
                self.say(f"trial {lost[0]} was taken for dead, and is repeated")
                return
            self._give_back(running)
            raise
        except BaseException:  # Ctrl-C
            if not lost:
                self._give_back(running)
            raise

    def _give_back(self, running: Sequence[Trial]) -> None:
        """Have a trial repeated that ends for no fault of its own: a full disk, Ctrl-C."""
        for trial in running:
            again(self.study, _frozen(self.study, trial.number))

    def begin(self, trial: Trial) -> FrozenTrial:
        """Claim a trial, and have its knobs sampled by its place; none is before it is suggested.

        Raises Surplus as `admit` does.
        """
        q = self.question
        frozen, place = admit(self.study, trial, q.trials)
        self.study.sampler = sampler(q.sampler, 1_000_003 * q.settings.seed + place, q.trials)
        return frozen

    def _run(self, trial: Trial) -> Any:
        """A trial, from its knobs to its values; a failure says why."""
        frozen = self.begin(trial)
        began = time.monotonic()
        try:
            values = self.question.suggest(trial)
            trial.set_user_attr(VERSION, version())
            with self._held.through():
                found = self._reuse(trial) or self._tried(trial, frozen, values)
        except optuna.TrialPruned as pruned:
            self._tell(trial, f"pruned: {pruned}", began)
            raise
        except (InputError, torch.OutOfMemoryError) as error:
            why = str(error) if isinstance(error, InputError) else (
                f"the device's memory must hold a trial, but it ran out: {error}")
            trial.set_user_attr(FAILURE, why)
            self._tell(trial, f"failed: {why}", began)
            raise InputError(why) from error
        self._tell(trial, ", ".join(f"{k} {v:.6g}" for k, v in found.items()), began)
        return tuple(found.values())

    def _tell(self, trial: Trial, what: str, began: float) -> None:
        """A line on a trial that has ended, with the time that is left at this pace."""
        trial.set_user_attr("seconds", round(time.monotonic() - began, 3))
        now, wanted = standing(self.study), self.question.trials
        done = now.finished + 1
        pace = (time.time() - self._began) / max(1, done - self._first)
        left = max(0.0, min(pace * (wanted - done), self.deadline - time.time()))
        reused = trial.user_attrs.get(REUSED)
        same = "" if reused is None else f", that of trial {reused}: not trained again"
        self.say(f"[{done}/{wanted}, about {left / 60:.0f} min left] trial {trial.number}: {what}"
                 f"{same}{self._best()}")

    def _best(self) -> str:
        """What the trials before have come to."""
        with suppress(ValueError):
            if len(self.question.metrics) > 1:
                return f"; {len(self.study.best_trials)} on the front before"
            best = self.study.best_trial
            return f"; best before {self.study.best_value:.6g}, trial {best.number}"
        return ""

    def _reuse(self, trial: Trial) -> dict[str, float] | None:
        """The values of an earlier trial with the same knobs, if there is one.

        Raises TrialPruned where that one was pruned.
        """
        for other in trials_of(self.study):
            if other.number < trial.number and other.params == trial.params:
                if other.state == TrialState.COMPLETE:
                    return self._copied(trial, other)
                if other.state == TrialState.PRUNED:
                    trial.set_user_attr(REUSED, other.number)
                    for step, value in other.intermediate_values.items():
                        trial.report(value, step)
                    raise optuna.TrialPruned(f"the settings of trial {other.number}")
        return None

    def _copied(self, trial: Trial, other: FrozenTrial) -> dict[str, float]:
        """The values and attributes of another trial."""
        trial.set_user_attr(REUSED, other.number)
        for name in ("score", "trainable", "flops", "latency", "head", "spec_hash"):
            if name in other.user_attrs:
                trial.set_user_attr(name, other.user_attrs[name])
        self._constrain(trial, other.user_attrs)
        for step, value in other.intermediate_values.items():
            trial.report(value, step)
        return dict(zip(self.question.metrics, other.values or (), strict=True))

    def _constrain(self, trial: Trial, found: Mapping[str, float]) -> None:
        for name, most in self.question.limits.items():
            trial.set_constraint(name, found[name] - most)

    def _tried(self, trial: Trial, frozen: FrozenTrial, values: Values) -> dict[str, float]:
        """Search and train with more and more steps."""
        q, session = self.question, self.session
        limit = budget_of(session, q.ask.budget, q.ask.count_head)[1]
        head = session.head_size if q.ask.count_head else 0
        ask = ask_of(values, self._base, q.ask, self._sites, limit, head)
        known_good = values in q.space.starts()
        trial.set_user_attr("head", session.head_size)
        with _own_folder(self.folder, frozen) as own:
            for steps in q.rungs if q.prunes else q.rungs[-1:]:
                folder = own.sub(str(steps))
                session.settings = settings_of(values, q.settings, steps)
                # before the last rung its end alone is compared
                session.evaluations = 1 if steps < q.rungs[-1] else Recipe.evaluations
                spec, score = self._rung(trial, folder, ask)
                if q.prunes:
                    trial.report(score, steps)
                    if steps < q.rungs[-1] and not known_good and trial.should_prune():
                        raise optuna.TrialPruned(f"{score:.6g} after {steps} steps")
            found = measures(session, spec, score, {*q.metrics, *q.limits})
            for name, value in found.items():
                trial.set_user_attr(name, value)
            trial.set_user_attr(RUN, folder.path.relative_to(self.folder).as_posix())
            self._constrain(trial, found)
            self.store(trial, folder.path)
        return {name: found[name] for name in q.metrics}

    def _rung(self, trial: Trial, folder: RunFolder, ask: Ask) -> tuple[Spec, float]:
        """Search, then train, unless that structure was trained so in an earlier trial."""
        session, seed = self.session, self.session.settings.seed
        session.job = f"trial {trial.number}"
        spec, _ = once.find(session, folder, ask, seed)
        key = f"{spec.hash[:16]} tau {session.settings.tau:.6g} steps {session.settings.steps}"
        trial.set_user_attr("spec_hash", spec.hash)
        trial.set_user_attr("trainable", spec.budget.used)
        if (known := self._known(key)) is not None and not folder.has("training.json"):
            trial.set_user_attr(REUSED, known.number)
            trial.set_user_attr(key, known.user_attrs[key])
            return spec, float(known.user_attrs[key])
        score = float(once.train(session, folder, spec, seed)["validation_score"])
        if REUSED in trial.user_attrs:  # of a rung before this one
            trial.set_user_attr(REUSED, None)
        trial.set_user_attr(key, score)
        return spec, score

    def _known(self, key: str) -> FrozenTrial | None:
        """The first trial that has trained this structure in this way.  For the last rung it must
        have ended well: before that its files may lie with a worker that died.
        """
        last = self.session.settings.steps == self.question.rungs[-1]
        return next((t for t in trials_of(self.study) if key in t.user_attrs
                     and (not last or t.state == TrialState.COMPLETE)), None)


def _frozen(study: Study, number: int) -> FrozenTrial:
    return next(t for t in study.get_trials(deepcopy=False) if t.number == number)


@contextmanager
def _own_folder(study: Path, frozen: FrozenTrial) -> Iterator[RunFolder]:
    """A trial's folder: that of the trial which it repeats, since its checkpoints are there, or
    one of its own where a process holds that one still.
    """
    path = study / "trials" / f"{root(frozen):04d}"
    with claim(path) as mine:
        if mine:
            yield RunFolder(path)
            return
    yield RunFolder(path.with_name(f"{path.name}-{frozen.number}"))
