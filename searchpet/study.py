"""Studies: Optuna's storages, samplers and pruners as the outer loop uses them.

Storages: `sqlite:///FILE`, `postgresql://...` and other databases, where a killed worker's trial
is noticed by its missing heartbeat and run again; `journal:FILE`, a file that several processes
of one machine append to; `grpc://HOST:PORT`, a proxy that stands before a database.  The last two
have no heartbeat: there a trial is taken back only if its process is gone on this machine.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import psutil
from optuna.storages import BaseStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from searchpet.errors import InputError, shown, unknown

HEARTBEAT, GRACE = 10, 30  # seconds; a trial that was silent for GRACE is taken for dead
RETRIES = 3  # of a trial whose worker died; a trial that always kills its worker must end
SAMPLERS = ("tpe", "nsga2", "gp", "random")
PRUNERS = ("halving", "hyperband", "none")
OURS = "searchpet"  # study attribute: what the study is of
WORKER = "worker"  # trial attribute: who runs it

optuna.logging.set_verbosity(optuna.logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    _retry = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
FAILURE = "failure"  # trial attribute: why it failed; without it, its worker died
VERSION = "version"  # trial attribute: of which version it is; set as soon as every knob is
SURPLUS = "surplus"  # trial attribute: it was beyond the number asked for


class Surplus(Exception):
    """A trial beyond the number that was asked for: two workers wanted the last one."""


def open_storage(url: str) -> BaseStorage:
    """The storage at an address.  Raises InputError for one that is wrong or does not answer."""
    kind, _, rest = url.partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if kind == "journal":
                # absolute: Optuna's lock is a link to the file, and of one that points nowhere it
                # does not see that its owner died
                return optuna.storages.JournalStorage(JournalFileBackend(os.path.abspath(rest)))
            if kind == "grpc":
                return _proxy(rest)
            return _database(url)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"--storage {shown(url)} needs its database's driver, but it is not "
                         "installed; pip install 'searchpet[cluster]' has that of PostgreSQL and "
                         "of grpc://") from error
    except Exception as error:  # each database has errors of its own
        raise InputError(f"--storage must be sqlite:///FILE, postgresql://..., journal:FILE or "
                         f"grpc://HOST:PORT and answer, but {shown(url)}: "
                         f"{reason(error, url)}") from error


def _database(url: str) -> BaseStorage:
    local = url.startswith("sqlite")
    url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    wait = {"timeout": 60} if local else {"connect_timeout": 10} if "postgres" in url else {}
    return optuna.storages.RDBStorage(
        url, engine_kwargs={"connect_args": wait, "pool_pre_ping": not local},
        heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=again)


def _proxy(rest: str) -> BaseStorage:
    host, _, port = rest.removeprefix("//").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--storage must be grpc://HOST:PORT for a proxy, but got grpc:{rest}")
    storage = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    storage.wait_server_ready(timeout=10)
    return storage


def run_proxy(storage: BaseStorage, host: str, port: int) -> None:
    """Serve a storage to `grpc://HOST:PORT` until interrupted.

    Raises InputError where the port is taken or grpcio is not installed.
    """
    try:
        with socket.socket() as trial:  # gRPC would share the port with whoever has it
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.run_grpc_proxy_server(storage, host=host, port=port)
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"--serve needs a free port and grpcio, but {host}:{port}: "
                         f"{reason(error)}") from error


def reason(error: Exception, url: str = "") -> str:
    """The first line of a database's error, without the password of its address."""
    text = str(getattr(error, "orig", None) or error).strip().splitlines() or [repr(error)]
    secret = url.rpartition("@")[0].partition("://")[2].partition(":")[2]
    line = text[0].replace(secret, "***") if secret else text[0]
    return f"{type(error).__name__}: {line}" if len(line) < 20 else line


def create(url: str, name: str, directions: Sequence[str], about: Mapping[str, Any],
           resume: bool) -> Study:
    """The study called `name`, made or gone on with.

    about: what the study is of; it must not change.  Raises InputError where it does, and where
    the study is there already and `resume` is off.
    """
    storage = open_storage(url)
    there = name in {s.study_name for s in optuna.get_all_study_summaries(storage)}
    if there and not resume:
        raise InputError(f"--study must be a new name in {shown(url)}, but {name} is there; add "
                         "--resume to continue it, or name another")
    if not there:
        study = optuna.create_study(study_name=name, storage=storage, directions=[
            StudyDirection[direction.upper()] for direction in directions])
        study.set_user_attr(OURS, dict(about))
        return study
    study = _load(storage, name, url)
    _check(study, directions, about)
    return study


def join(url: str, name: str | None) -> Study:
    """The study called `name`, or the only one there.  Raises InputError if it is not there."""
    storage = open_storage(url)
    names = [s.study_name for s in optuna.get_all_study_summaries(storage)]
    if name is None and len(names) != 1:
        raise InputError(f"--study must say which of {', '.join(sorted(names)) or 'no studies'} "
                         f"in {shown(url)}")
    study = _load(storage, name or names[0], url, names)
    if OURS not in study.user_attrs:
        raise InputError(f"study {study.study_name} in {shown(url)} must be one that `searchpet "
                         "tune` made, but it is not; name another --study")
    return study


def storage_of(study: Study) -> BaseStorage:
    """The storage of a study, which Optuna wants beside a finished trial for its artifacts."""
    return study._storage


def _load(storage: BaseStorage, name: str, url: str, names: Sequence[str] = ()) -> Study:
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        raise unknown(f"study in {shown(url)}", name, names) from error


def _check(study: Study, directions: Sequence[str], about: Mapping[str, Any]) -> None:
    """Refuse to mix trials of two questions."""
    before = study.user_attrs.get(OURS)
    if not isinstance(before, dict):
        raise InputError(f"study {study.study_name} must be one that `searchpet tune` made, but "
                         "it is not; name another --study")
    had = [d.name.lower() for d in study.directions]
    if had != list(directions):
        raise InputError(f"study {study.study_name} has {len(had)} objectives ({', '.join(had)}), "
                         f"but {len(directions)} are asked for; name another --study")
    for key in sorted(before.keys() | about.keys()):
        if before.get(key) != about.get(key):
            raise InputError(
                f"study {study.study_name} must go on as it began, but {key} was "
                f"{before.get(key)!r} and is {about.get(key)!r} now; repeat the first command or "
                "name another --study")


def sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Raises InputError for an unknown name."""
    made: dict[str, Any] = {
        "tpe": optuna.samplers.TPESampler, "nsga2": optuna.samplers.NSGAIISampler,
        "gp": optuna.samplers.GPSampler, "random": optuna.samplers.RandomSampler}
    if name not in made:
        raise unknown("--sampler", name, SAMPLERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made[name](seed=seed % 2**32)  # type: ignore[no-any-return]


def pruner(name: str, rungs: Sequence[int]) -> optuna.pruners.BasePruner:
    """For trials that report after so many steps.  Raises InputError for an unknown name."""
    factor = max(2, round((rungs[-1] / rungs[0]) ** (1 / (len(rungs) - 1)))) if rungs[1:] else 2
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=rungs[0], reduction_factor=factor)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=rungs[0], max_resource=rungs[-1], reduction_factor=factor)
    if name == "none":
        return optuna.pruners.NopPruner()
    raise unknown("--pruner", name, PRUNERS)


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


def admit(study: Study, trial: Trial, wanted: int) -> FrozenTrial:
    """Mark who runs a trial, and return it.

    Raises Surplus for a first try beyond the wanted number, and for a second repetition of the
    same trial.
    """
    trials = trials_of(study)
    frozen = next(t for t in trials if t.number == trial.number)
    earlier = [t for t in trials if t.number < trial.number]
    twice = any(root(t) == root(frozen) and t.state != TrialState.FAIL for t in earlier)
    if twice or (root(frozen) == trial.number and len({root(t) for t in earlier}) >= wanted):
        trial.set_user_attr(SURPLUS, True)
        raise Surplus
    trial.set_user_attr(WORKER, me())
    return frozen


def me() -> str:
    """This process: host, number, when it began."""
    own = psutil.Process(os.getpid())
    return f"{socket.gethostname()}/{own.pid}/{own.create_time():.0f}"


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
    if host != socket.gethostname():
        return False
    try:
        return bool(abs(psutil.Process(int(number)).create_time() - float(began)) > 2)
    except psutil.NoSuchProcess:
        return True
