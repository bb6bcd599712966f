"""The trials of a study: who runs which, which of them died and are to be run again, how many
there are.  A trial that is run again is another one to Optuna; its `root` is the first.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import optuna
import psutil
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

HEARTBEAT, GRACE = 10, 30  # seconds; a trial that was silent for GRACE is taken for dead
RETRIES = 3  # of a trial whose worker died; a trial that always kills its worker must end
WORKER = "worker"  # trial attribute: who runs it
VERSION = "version"  # trial attribute: of which version it is; set as soon as every knob is
FAILURE = "failure"  # trial attribute: why it failed; without it, its worker died
SURPLUS = "surplus"  # trial attribute: it was beyond the number asked for

with warnings.catch_warnings():
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    _retry = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)


class Surplus(Exception):
    """A trial beyond the number that was asked for: two workers wanted the last one."""


@dataclass(frozen=True)
class Standing:
    """How far a study is.  fresh: trials that are no repetition of another one."""

    fresh: int
    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int

    @property
    def finished(self) -> int:
        return self.complete + self.pruned + self.failed


def standing(of: Study | Sequence[FrozenTrial]) -> Standing:
    """Counts of a study's trials, or of those that `trials_of` has just given; one that died and
    was repeated counts once, a surplus one not at all.
    """
    trials = trials_of(of) if isinstance(of, Study) else of
    latest = {root(trial): trial for trial in trials}  # in the order of numbers
    count = {state: sum(t.state == state for t in latest.values()) for state in TrialState}
    return Standing(fresh=len(latest), complete=count[TrialState.COMPLETE],
                    pruned=count[TrialState.PRUNED], failed=count[TrialState.FAIL],
                    running=count[TrialState.RUNNING], waiting=count[TrialState.WAITING])


def trials_of(study: Study) -> list[FrozenTrial]:
    """All trials but surplus ones, by number.  They are the study's own: not to be changed."""
    return [t for t in study.get_trials(deepcopy=False) if not t.user_attrs.get(SURPLUS)]


def root(trial: FrozenTrial) -> int:
    """The number of the trial that this one repeats, else its own."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def place_of(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> int:
    """How manieth a trial is, repetitions in the place of what they repeat."""
    return len({root(t) for t in trials if root(t) < root(trial)})


def admit(study: Study, trial: Trial, wanted: int) -> tuple[FrozenTrial, int]:
    """Mark who runs a trial; return it, and its place.

    Raises Surplus for a first try beyond the wanted number, and for a second repetition of the
    same trial.
    """
    trials = trials_of(study)
    frozen = next(t for t in trials if t.number == trial.number)
    place, earlier = place_of(frozen, trials), [t for t in trials if t.number < trial.number]
    twice = any(root(t) == root(frozen) and t.state != TrialState.FAIL for t in earlier)
    if twice or (root(frozen) == trial.number and place >= wanted):
        trial.set_user_attr(SURPLUS, True)
        raise Surplus
    trial.set_user_attr(WORKER, me())
    return frozen, place


def me() -> str:
    """This process: where it runs, its number there, when it began."""
    own = psutil.Process(os.getpid())
    return f"{_here()}/{own.pid}/{own.create_time():.0f}"


@cache
def _here() -> str:
    """The host, and what tells it from others of its name: two containers may share that, but
    not their processes.
    """
    found = socket.gethostname()
    with contextlib.suppress(OSError):  # Linux alone has them
        found += "." + Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        found += "." + os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return found


def again(study: Study, trial: FrozenTrial) -> None:
    """Enqueue a trial once more, with the same settings; not more than RETRIES times.

    One that was cut off between two knobs is sampled anew from its number: with half of them
    given, the sampler would draw others for the rest than it would have.
    """
    trial = copy.deepcopy(trial)
    trial.user_attrs.pop(WORKER, None)
    if VERSION not in trial.user_attrs:
        trial.params, trial.distributions = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        _retry(study, trial)


def take_back(study: Study) -> None:
    """Repeat trials of dead workers: those of this machine at once, others where their heartbeat
    is missing; and those that were given up by somebody who died before repeating them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _gone(trial.user_attrs.get(WORKER)) or (unclaimed(trial) and _old(trial)):
            with contextlib.suppress(ValueError, optuna.exceptions.OptunaError):
                study.tell(trial.number, state=TrialState.FAIL)  # refused if somebody else did
                again(study, trial)
    for trial in {root(t): t for t in trials_of(study)}.values():
        if trial.state == TrialState.FAIL and FAILURE not in trial.user_attrs and _settled(trial):
            again(study, trial)


def unclaimed(trial: FrozenTrial) -> bool:
    """Whether a trial runs, but its worker has not said yet who it is, or died before it could."""
    return trial.state == TrialState.RUNNING and WORKER not in trial.user_attrs


def _old(trial: FrozenTrial) -> bool:
    began = trial.datetime_start
    return began is not None and time.time() - began.timestamp() > GRACE


def _settled(trial: FrozenTrial) -> bool:
    """Whether whoever gave a trial up has had the time to repeat it, and may still do so."""
    ended = trial.datetime_complete
    tries = len(trial.system_attrs.get("retry_history", ()))
    return tries < RETRIES and ended is not None and time.time() - ended.timestamp() > GRACE


def _gone(worker: str | None) -> bool:
    """Whether a process of this machine is no more."""
    host, number, began = (worker or "//").rsplit("/", 2)
    if host != _here():
        return False
    try:
        return bool(abs(psutil.Process(int(number)).create_time() - float(began)) > 2)
    except psutil.NoSuchProcess:
        return True
