"""What a study leaves behind: files of its trials as artifacts, and the best one as a run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import download_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from searchpet.errors import InputError
from searchpet.measures import DIRECTIONS
from searchpet.question import Question
from searchpet.roster import root, standing, trials_of
from searchpet.run import RunFolder
from searchpet.spec import Spec
from searchpet.study import ID, reason, storage_of
from searchpet.worker import REUSED, RUN

FILES = ("spec.json", "delta.safetensors", "masks.safetensors", "training.json", "log.jsonl",
         "space.toml", "probabilities.json")
STORE = "artifacts"  # study attribute: where the files are; and their folder's name
MARK = "study.json"  # in a folder: the study that it belongs to
S3 = "s3://"


def own(study: Study, folder: RunFolder, begun: bool = False) -> None:
    """Mark a folder as this study's.  begun: it was begun for this one, so it may hold files.

    Raises InputError where it is another's: trials are told apart by their numbers there.
    """
    mine = study.user_attrs.get(ID)
    used = not begun and any((folder.path / name).exists() for name in ("settings.json", "trials"))
    if folder.read_json(MARK)["id"] != mine if folder.has(MARK) else used:
        raise InputError(f"--out must be a folder of study {study.study_name} alone, but "
                         f"{folder.path} has files of another run; name another")
    folder.path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"study": study.study_name, "id": mine}) + "\n"
    _whole(folder.path / MARK, lambda part: part.write_text(text))


def open_store(where: str, make: bool = False) -> Any:
    """The artifact store at a folder, made if it shall be, or an `s3://BUCKET`.

    Raises InputError for a bucket without boto3, another sort of address, and a folder that
    cannot be written.
    """
    if not where.startswith(S3):
        if "://" in where:
            raise InputError(f"--artifacts must be a folder or s3://BUCKET, but got {where}")
        try:
            if make:
                Path(where).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=where).close()
        except OSError as error:
            raise InputError("--artifacts must be a folder that can be written here, but "
                             f"{where}: {error.strerror}; share that one, or begin the study with "
                             "another") from error
        return optuna.artifacts.FileSystemArtifactStore(where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.artifacts.Boto3ArtifactStore(where.removeprefix(S3).rstrip("/"))
    except ImportError as error:
        raise InputError(f"--artifacts {where} needs boto3, but it is not installed; pip install "
                         "boto3, or name a folder") from error


def keep(study: Study, question: Question, where: str, trial: Trial, run: Path) -> None:
    """Store a finished trial's files, if it may become the best one.

    Raises OSError where the store does not take them: no fault of the trial, which is to be
    repeated from its files.
    """
    if len(question.metrics) == 1 and not _leads(study, question, trial):
        return
    try:
        store = open_store(where)
        for name in FILES:
            if (run / name).is_file():
                optuna.artifacts.upload_artifact(
                    artifact_store=store, file_path=str(run / name), study_or_trial=trial)
    except Exception as error:  # each sort of store has errors of its own
        if isinstance(error, OSError) and error.errno:  # a full disk's does not say where
            raise OSError(error.errno, error.strerror, where) from error
        raise OSError(f"{where} must take the files of a trial, but: {reason(error)}") from error


def _leads(study: Study, question: Question, trial: Trial) -> bool:
    """Whether it keeps the limits, and no finished trial that does has a better score."""
    found = trial.user_attrs
    if any(found[name] > most for name, most in question.limits.items()):
        return False
    return all(t.value is None or t.value <= found["score"] for t in fitting(study))


def fitting(study: Study) -> list[FrozenTrial]:
    """Trials that ended well and keep the limits."""
    return [t for t in trials_of(study) if t.state == TrialState.COMPLETE
            and all(v <= 0 for v in t.constraints.values())]


def winner(study: Study, question: Question) -> FrozenTrial:
    """The best trial; of several metrics, the one of the front with the best score; of equal ones
    the cheapest, then the first.

    Raises InputError where no trial has finished, or none within the limits.
    """
    done = [t for t in trials_of(study) if t.state == TrialState.COMPLETE]
    now = standing(study)
    if not now.finished:
        raise InputError(f"a study must have a finished trial, but {study.study_name} has none "
                         "yet; go on with --resume, and more time if it had a --timeout")
    if not done:
        failures = [t.user_attrs["failure"] for t in trials_of(study) if "failure" in t.user_attrs]
        why = f": {failures[-1]}" if failures else ""
        raise InputError(f"a study must have a finished trial, but {study.study_name} has "
                         f"{now.failed} failed and {now.pruned} pruned ones alone{why}")
    if not (fits := fitting(study)):
        limits = ", ".join(f"{k} <= {v:g}" for k, v in question.limits.items())
        least = {k: min(t.user_attrs[k] for t in done) for k in question.limits}
        raise InputError(f"a trial must meet {limits}, but the least that {len(done)} trials came "
                         f"to is {', '.join(f'{k} {v:g}' for k, v in least.items())}; raise the "
                         "limit, or give the space knobs that lower it")
    signs = [1 if DIRECTIONS[name] == "maximize" else -1 for name in question.metrics]
    place = question.metrics.index("score")
    return max(fits, key=lambda t: (t.values[place], [
        sign * value for sign, value in zip(signs, t.values, strict=True)], -root(t)))


def front(study: Study, question: Question) -> list[FrozenTrial]:
    """The Pareto front by falling score; of one metric, the best trial."""
    if len(question.metrics) == 1:
        return [winner(study, question)]
    place = question.metrics.index("score")
    return sorted(study.best_trials, key=lambda t: -t.values[place])


def fetch(study: Study, folder: Path, trial: FrozenTrial, out: RunFolder,
          artifacts: str | None = None) -> Spec:
    """Write a trial's files to `out`: from the study's folder, else from the artifacts, which are
    where the study says or `artifacts`.

    Raises InputError where they are in neither.
    """
    where = artifacts or str(study.user_attrs.get(STORE))
    for source in sources(study, trial):
        run = folder / str(source.user_attrs.get(RUN, "nowhere"))
        if (run / "delta.safetensors").is_file() and (
                Spec.load(run).hash == trial.user_attrs["spec_hash"]):
            out.path.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if (run / name).is_file():
                    _whole(out.path / name, partial(shutil.copyfile, run / name))
            return Spec.load(out.path)
        metas = optuna.artifacts.get_all_artifact_meta(source, storage=storage_of(study))
        if any(meta.filename == "delta.safetensors" for meta in metas):
            _download(where, metas, out)
            return Spec.load(out.path)
    raise InputError(f"trial {trial.number} must have left its files in {folder} or as artifacts, "
                     f"but both lack them; run where {where} can be read, or name it with "
                     "--artifacts")


def sources(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    """The trial, and those that it has taken its score from."""
    by_number = {t.number: t for t in trials_of(study)}
    found = [trial]
    while (number := found[-1].user_attrs.get(REUSED)) in by_number:
        found.append(by_number[number])
    same = [t for t in by_number.values() if root(t) in {root(f) for f in found}]
    return [*found, *(t for t in same if t not in found)]


def _download(where: str, metas: Sequence[Any], out: RunFolder) -> None:
    store = open_store(where)
    out.path.mkdir(parents=True, exist_ok=True)
    for meta in metas:
        if meta.filename in FILES:
            def load(target: Path, name: str = meta.artifact_id) -> None:
                download_artifact(artifact_store=store, artifact_id=name, file_path=str(target))

            try:
                _whole(out.path / meta.filename, load)
            except ArtifactNotFound as error:
                raise InputError(f"artifacts must hold {meta.filename}, but {where} does not; "
                                 "name the right place with --artifacts") from error
            except Exception as error:  # each sort of store has errors of its own
                raise InputError(f"artifacts must be within reach, but {where}: {reason(error)}"
                                 ) from error


def _whole(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    part = target.with_name(f"{target.name}.{os.getpid()}.partial")  # others may write it too
    write(part)
    part.replace(target)
