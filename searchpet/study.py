"""Studies: Optuna's storages, samplers and pruners as the outer loop uses them.

Storages: `sqlite:///FILE`, `postgresql://...` and other databases, where a killed worker's trial
is noticed by its missing heartbeat and run again; `journal:FILE`, a file that several processes
of one machine append to; `grpc://HOST:PORT`, a proxy that stands before a database.  The last two
have no heartbeat: there a trial is taken back only if its process is gone on this machine.
"""

from __future__ import annotations

import os
import random
import re
import socket
import uuid
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from searchpet.errors import InputError, shown, unknown
from searchpet.roster import GRACE, HEARTBEAT, again, root, trials_of

SAMPLERS = ("tpe", "nsga2", "gp", "random")
PRUNERS = ("halving", "hyperband", "none")
OURS = "searchpet"  # study attribute: what the study is of
WORDS = 120  # characters at most of a difference that is shown
ID = "id"  # study attribute: tells it from others of its name

optuna.logging.set_verbosity(optuna.logging.ERROR)


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
    line = shown(text[0].replace(secret, "***") if secret else text[0])
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
        study.set_user_attr(ID, uuid.uuid4().hex)
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
        noun = "objective" if len(had) == 1 else "objectives"
        raise InputError(f"study {study.study_name} has {len(had)} {noun} ({', '.join(had)}), but "
                         f"{len(directions)} are asked for; name another --study")
    then, now = _flat(before), _flat(about)
    for key in dict.fromkeys([*then, *now]):
        if then.get(key) != now.get(key):
            words = f"{key} was {then.get(key)!r} and is {now.get(key)!r} now"
            if len(words) > WORDS:
                words = f"its {key} differ"
            raise InputError(
                f"study {study.study_name} must go on as it began, but {words}; "
                "repeat the first command or name another --study")


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a study is of, settings one by one and first: the rest may follow from them."""
    parts = [about[name] for name in ("settings", "ask") if isinstance(about.get(name), dict)]
    found = {key: value for part in parts for key, value in part.items() if key != "space"}
    rest = {key: value for key, value in about.items() if key not in ("settings", "ask")}
    return {**found, **{"knobs" if key == "space" else key: v for key, v in rest.items()}}


def sampler(name: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """For a study of so many trials.  Raises InputError for an unknown name."""
    made: dict[str, Any] = {
        "tpe": optuna.samplers.TPESampler,
        "nsga2": partial(optuna.samplers.NSGAIISampler, population_size=max(4, trials // 5)),
        "gp": optuna.samplers.GPSampler, "random": optuna.samplers.RandomSampler}
    if name not in made:
        raise unknown("--sampler", name, SAMPLERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made[name](seed=seed % 2**32)  # type: ignore[no-any-return]


class Rungs(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) in one bracket, or
    Hyperband (Li et al. 2018, arXiv:1603.06560) in several: of the trials that have reported after
    so many steps, the best 1/factor go on; those of bracket b are first compared at rung b, among
    themselves.

    noise: by how much two scores may differ by chance; a trial that is behind by less goes on, so
    that nothing is decided while all are at chance.  Unlike Optuna's own, every trial counts once:
    not one that died, and a repetition has the bracket of what it repeats.  So a study that was
    cut off goes on as if it had not been.
    """

    def __init__(self, rungs: Sequence[int], brackets: int, noise: float) -> None:
        self.rungs, self.noise = rungs, noise
        self.factor = (max(2, round((rungs[-1] / rungs[0]) ** (1 / (len(rungs) - 1))))
                       if rungs[1:] else 2)
        self.weights = [brackets * self.factor**(brackets - 1 - b) / (brackets - b)
                        for b in range(brackets)]

    def bracket(self, trial: FrozenTrial) -> int:
        """Drawn by the trial's number, the weights as in Hyperband."""
        return random.Random(root(trial)).choices(range(len(self.weights)), self.weights)[0]

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        step, bracket = trial.last_step, self.bracket(trial)
        if step is None or step < self.rungs[bracket]:
            return False
        own = trial.intermediate_values[step]
        others = [t.intermediate_values[step] for t in trials_of(study)
                  if step in t.intermediate_values and t.number != trial.number
                  and t.state != TrialState.FAIL and self.bracket(t) == bracket]
        scores = sorted([own, *others], reverse=True)
        return own < scores[max(1, len(scores) // self.factor) - 1] - self.noise


def pruner(name: str, rungs: Sequence[int], noise: float = 0.0) -> optuna.pruners.BasePruner:
    """For trials that report after so many steps a score, larger is better; noise: as in `Rungs`.
    Raises InputError for an unknown name.
    """
    if name == "halving":
        return Rungs(rungs, 1, noise)
    if name == "hyperband":
        return Rungs(rungs, len(rungs), noise)
    if name == "none":
        return optuna.pruners.NopPruner()
    raise unknown("--pruner", name, PRUNERS)
