"""The outer loop: trials, workers that die, what a study leaves behind; real processes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

import searchpet
from searchpet import cli, views
from searchpet.errors import InputError, shown
from searchpet.failures import explain
from searchpet.propose import command
from searchpet.question import duration, limits_of, rungs
from searchpet.roster import (
    GRACE,
    VERSION,
    WORKER,
    again,
    place_of,
    root,
    standing,
    take_back,
    trials_of,
    unclaimed,
)
from searchpet.run import RunFolder
from searchpet.spec import Spec
from searchpet.study import join, open_storage, sampler
from searchpet.worker import REUSED, Worker
from tests.commands import ROOT, workplace

SMALL = ["--model", "tiny", "--task", "films", "--budget", "5%", "--steps", "80",
         "--batch-size", "8", "--device", "cpu"]
JOB = ["tune", *SMALL]
FAST = '''description = "two strategies without a search, three rates"
base = "nano"
[[knob]]
name = "strategy"
choices = ["random:unit", "uniform:bias"]
[[knob]]
name = "tau"
choices = [0.1, 0.3, 0.03]
'''
QUICK = [*JOB, "--steps", "20", "--knobs", "fast.toml"]  # a trial takes about a second


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tune")
    with workplace(folder, tiny_folder):
        (folder / "fast.toml").write_text(FAST)
        yield folder


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """A study of seven trials, the default knobs, all alone."""
    assert cli.main([*JOB, "--trials", "7", "--out", "done", "--quiet"]) == 0
    return place / "done"


def trials(out: str | Path, storage: str | None = None) -> list[optuna.trial.FrozenTrial]:
    return trials_of(join(storage or f"sqlite:///{out}/study.db", None))


def outcome(study: list[optuna.trial.FrozenTrial]) -> list[tuple[Any, ...]]:
    """What every trial came to, repetitions in the place of what they repeat."""
    latest = {root(t): t for t in study}
    return [(t.state.name, t.values, t.params, t.user_attrs.get("spec_hash"))
            for _, t in sorted(latest.items())]


def spawn(words: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "searchpet", *words], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment})


def wait_for(storage: str, finished: int, name: str | None = None, seconds: float = 300,
             ) -> str:
    """Until so many trials have ended and a worker has said that it has one under way: that one.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            study = join(storage, name)
            named = [t.user_attrs[WORKER] for t in trials_of(study)
                     if t.state.name == "RUNNING" and WORKER in t.user_attrs]
            if standing(study).finished >= finished and named:
                return str(named[0])
        except InputError:  # not made yet
            pass
        time.sleep(0.1)
    pytest.fail(f"{storage} did not get to {finished} trials")


# --- one process ---


def test_a_study_leaves_a_run_behind(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((done / "result.json").read_text())
    spec = Spec.load(done)
    assert result["spec_hash"] == spec.hash
    assert result["trainable"] == spec.budget.used <= spec.budget.limit == result["budget_limit"]
    assert result["study"]["trials"] == 7
    best = max(t.value for t in trials(done) if t.value is not None)
    assert result["score"] == best
    capsys.readouterr()
    assert cli.main(["evaluate", str(done), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(result["score"])
    assert cli.main(["verify", str(done)]) == 0


def test_a_study_from_python_leaves_its_page_too(place: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Path] = []
    monkeypatch.setattr("searchpet.report.write", pages.append)
    settings = {"model": "tiny", "task": "films", "device": "cpu"}
    result = searchpet.tune(trials=2, knobs="fast.toml", budget="5%", steps=20, batch_size=8,
                            out="python", say=lambda line: None, **settings)
    assert isinstance(result.spec, Spec) and pages == [result.path] == [Path("python")]


def test_known_good_settings_come_first_and_run_to_the_end(done: Path) -> None:
    found = trials(done)
    assert [t.params["strategy"] for t in found[:5]] == [
        "bilevel", "uniform:bias", "uniform:norm", "uniform:lora_qv", "random:unit"]
    assert all(t.state.name == "COMPLETE" and set(t.intermediate_values) == {20, 80}
               for t in found[:5])
    names = {row["name"] for row in json.loads((done / "result.json").read_text())["controls"]}
    assert names <= {"defaults", "uniform:bias", "uniform:norm", "uniform:lora_qv", "random:unit"}
    assert len(names) >= 4


def test_the_winner_is_at_least_as_good_as_the_defaults(done: Path) -> None:
    assert json.loads((done / "result.json").read_text())["score"] >= trials(done)[0].value


def test_the_default_trial_is_the_search_itself(done: Path) -> None:
    """Trials train from the start, as `--fresh` does."""
    words = ["search", *SMALL, "--fresh", "--controls", "0", "--out", "plain", "--quiet"]
    assert cli.main(words) == 0
    assert Spec.load("plain").hash == trials(done)[0].user_attrs["spec_hash"]
    score = json.loads(Path("plain/result.json").read_text())["score"]
    assert score == trials(done)[0].value


def test_attributes_of_a_trial_can_be_read(done: Path) -> None:
    for trial in trials(done):
        if trial.state.name == "COMPLETE":
            assert {"spec_hash", "score", "trainable", "head", "seconds", "version"} <= set(
                trial.user_attrs)
    assert join(f"sqlite:///{done}/study.db", None).user_attrs["searchpet"]["version"]


def test_the_best_trials_space_lies_beside_its_spec(done: Path) -> None:
    provenance = Spec.load(done).provenance
    own = provenance["space"] == "space.toml"
    assert (done / "space.toml").is_file() == own  # a form has a space by name
    if own:
        words = ["search", *SMALL, "--space", str(done / "space.toml"), "--strategy",
                 provenance["strategy"], "--tau", str(json.loads(
                     (done / "result.json").read_text())["tau"]), "--controls", "0", "--quiet",
                 "--out", "again"]
        for key, value in provenance["hyperparameters"].items():
            if key != "variant":
                words += ["--set", f"{provenance['strategy']}.{key}={value}"]
        assert cli.main(words) == 0
        assert Spec.load("again").hash == Spec.load(done).hash


def test_the_same_settings_are_not_run_twice(place: Path) -> None:
    assert cli.main([*QUICK, "--trials", "10", "--sampler", "random", "--out", "twice", "-q"]) == 0
    found = trials("twice")
    settings = [tuple(t.params.values()) for t in found]
    assert len(found) == 10
    assert len(set(settings)) < 10  # there are six
    again = [t for t in found if "reused" in t.user_attrs]
    assert len(again) == 10 - len(set(settings))
    for trial in again:
        source = found[trial.user_attrs["reused"]]
        assert (trial.value, trial.params) == (source.value, source.params)
        assert not (place / "twice" / "trials" / f"{trial.number:04d}").exists()


def test_a_structure_is_not_trained_twice(place: Path, capsys: pytest.CaptureFixture[str],
                                          ) -> None:
    (place / "shares.toml").write_text(FAST.replace("[0.1, 0.3, 0.03]", "[0.1]") + '''
[[knob]]
name = "layers"
choices = ["0%-100%", "first 100%"]
when = { strategy = "random:unit" }
[[first]]
layers = "first 100%"
''')
    words = [*JOB, "--steps", "20", "--knobs", "shares.toml", "--trials", "2", "--out", "same"]
    assert cli.main([*words, "-q"]) == 0
    first, second = trials("same")
    assert first.params != second.params
    assert first.user_attrs["spec_hash"] == second.user_attrs["spec_hash"]
    assert second.user_attrs["reused"] == 0
    assert first.value == second.value
    assert not list((place / "same" / "trials" / "0001").rglob("delta.safetensors"))
    assert Spec.load("same").hash == first.user_attrs["spec_hash"]
    capsys.readouterr()
    assert cli.main(["trials", "same", "--out", "same-figures"]) == 0
    assert "complete, as trial 0" in capsys.readouterr().out
    assert not Path("same-figures/rungs.png").exists()  # there was one rung alone


def test_a_score_taken_over_before_the_last_rung_is_no_reuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same structure after 20 steps, another after 80."""
    spec = Spec.load("searchpet:minilm-agreement-0.01")
    study = optuna.create_study()
    first, second = study.ask(), study.ask()
    first.set_user_attr(f"{spec.hash[:16]} tau 0.1 steps 20", 0.7)
    monkeypatch.setattr("searchpet.worker.once.find", lambda *_: (spec, 0.0))
    monkeypatch.setattr("searchpet.worker.once.train", lambda *_: {"validation_score": 0.9})
    session: Any = SimpleNamespace(settings=SimpleNamespace(seed=0, tau=0.1, steps=20))
    nothing: Any = None
    asked: Any = SimpleNamespace(rungs=(20, 80))
    worker = Worker(asked, study, session, tmp_path)
    assert worker._rung(second, RunFolder(tmp_path), nothing)[1] == 0.7
    assert second.user_attrs[REUSED] == 0
    session.settings.steps = 80
    first.set_user_attr(f"{spec.hash[:16]} tau 0.1 steps 80", 0.8)  # it has not stored its files
    assert worker._rung(second, RunFolder(tmp_path), nothing)[1] == 0.9
    assert second.user_attrs[REUSED] is None


def test_worse_trials_are_pruned_after_few_steps(place: Path) -> None:
    steep = FAST.replace("[0.1, 0.3, 0.03]", "[0.00001, 0.3, 1.0]")  # the first changes nothing
    (place / "steep.toml").write_text(steep)
    words = [*JOB, "--knobs", "steep.toml", "--trials", "8", "--sampler", "random"]
    assert cli.main([*words, "--out", "halved", "-q"]) == 0
    pruned = [t for t in trials("halved") if t.state.name == "PRUNED"]
    whole = [t for t in trials("halved") if t.state.name == "COMPLETE"]
    assert pruned
    assert all(set(t.intermediate_values) == {20} for t in pruned)
    assert all(set(t.intermediate_values) == {20, 80} for t in whole)
    for trial in pruned:
        if "reused" not in trial.user_attrs:
            assert trial.intermediate_values[20] <= max(t.intermediate_values[20] for t in whole)
            folder = place / "halved" / "trials" / f"{trial.number:04d}"
            assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["20"]


def test_several_metrics_give_a_front(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*JOB, "--steps", "20", "--metric", "score,trainable,flops", "--trials", "8"]
    assert cli.main([*words, "--sampler", "random", "--out", "front", "-q"]) == 0
    assert "the Pareto front's structures  front/front" in capsys.readouterr().out
    result = json.loads((place / "front" / "result.json").read_text())
    front = result["study"]["front"]
    assert front[0]["score"] == result["score"] == max(row["score"] for row in front)
    for row in front:
        assert not any(other["score"] >= row["score"] and other["trainable"] <= row["trainable"]
                       and other["flops"] <= row["flops"] and other != row for other in front)
        spec = Spec.load(place / "front" / "front" / f"{row['trial']:04d}")
        assert spec.budget.used == row["trainable"]
    capsys.readouterr()
    assert cli.main(["trials", "front", "--out", "drawn", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["front"] == [row["trial"] for row in front]
    files = {p.name for p in (place / "drawn").iterdir()}
    assert files >= {"history.png", "front.png", "hypervolume.png", "study.html"}
    page = (place / "drawn" / "study.html").read_text()
    assert page.count("data:image/png;base64,") == len(files) - 1
    assert "http" not in page.replace("http-equiv", "")


def test_the_knobs_can_be_the_structure(place: Path) -> None:
    words = [*JOB, "--steps", "20", "--strategy", "tpe", "--trials", "5", "--out", "tpe", "-q"]
    assert cli.main(words) == 0
    found = trials("tpe")
    assert {t.params["strategy"] for t in found} == {"uniform"}
    assert len({t.user_attrs.get("spec_hash") for t in found}) > 1
    for trial in found:
        if trial.state.name == "COMPLETE":
            assert trial.user_attrs["trainable"] <= 1270


def test_a_study_with_pruning_keeps_to_both_budgets(place: Path) -> None:
    words = [*JOB, "--steps", "20", "--budget", "3%", "--keep-flops", "60%", "--trials", "4"]
    assert cli.main([*words, "--out", "pruned", "-q"]) == 0
    spec = Spec.load("pruned")
    assert spec.keep is not None
    assert spec.keep.used <= 0.6 * spec.keep.dense
    assert cli.main(["verify", "pruned"]) == 0


def test_trials_show_a_study(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["trials", str(done)]) == 0
    text = capsys.readouterr().out
    assert "complete" in text and "importance" in text and "strategy" in text
    assert cli.main(["trials", str(done), "--out", "figures"]) == 0
    png = Path("figures/history.png").read_bytes()
    assert png.startswith(b"\x89PNG")


# --- going on, and dying ---


def test_a_finished_study_goes_on_when_more_trials_are_asked_for(place: Path) -> None:
    words = [*QUICK, "--out", "more", "-q"]
    assert cli.main([*words, "--trials", "2"]) == 0
    assert cli.main([*words, "--trials", "4"]) == 2  # without --resume
    assert cli.main([*words, "--trials", "4", "--resume"]) == 0
    assert len(trials("more")) == 4
    assert cli.main([*words, "--trials", "4", "--resume", "--seed", "3"]) == 2


def test_a_killed_study_goes_on_to_the_same_result(place: Path) -> None:
    words = [*QUICK, "--trials", "8", "--quiet"]
    assert cli.main([*words, "--out", "uncut"]) == 0
    for finished in (1, 2):  # the later ones end before they are seen
        process = spawn([*words, "--out", "cut", *(["--resume"] if finished > 1 else [])])
        wait_for("sqlite:///cut/study.db", finished)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert cli.main([*words, "--out", "cut", "--resume"]) == 0
    assert outcome(trials("cut")) == outcome(trials("uncut"))
    for name in ("delta.safetensors", "space.toml"):
        ours, theirs = Path("cut") / name, Path("uncut") / name
        assert ours.exists() == theirs.exists()
        assert not ours.exists() or ours.read_bytes() == theirs.read_bytes()
    assert Spec.load("cut").hash == Spec.load("uncut").hash


def test_ctrl_c_gives_the_running_trial_back(place: Path) -> None:
    process = spawn([*QUICK, "--trials", "6", "--out", "stopped"])
    wait_for("sqlite:///stopped/study.db", 2)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "to continue: searchpet tune" in text and "Traceback" not in text
    now = standing(join("sqlite:///stopped/study.db", None))
    assert now.running == 0
    assert cli.main([*QUICK, "--trials", "6", "--out", "stopped", "--resume", "-q"]) == 0
    assert standing(join("sqlite:///stopped/study.db", None)).finished == 6


@pytest.mark.parametrize("where", [
    "optuna.study.Study.ask", "optuna.study._optimize._tell_with_warning",
    "optuna.storages._heartbeat.HeartbeatThread.start", "searchpet.worker.admit",
    "searchpet.worker.again"])
def test_ctrl_c_between_two_trials_loses_none(
    where: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While Optuna writes down that a trial begins or ends, or we that it is to be repeated."""
    out, before = where.rpartition(".")[2], resolve_name(where)
    strikes = iter([False, True])

    def struck(*args: Any, **kwargs: Any) -> Any:
        found = before(*args, **kwargs)
        if next(strikes, False):
            signal.raise_signal(signal.SIGINT)
        return found

    words = [*QUICK, "--trials", "4", "--out", out, "-q"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(where, struck)
            if out == "again":  # of a trial that is cut off
                strikes = iter([True])
                patch.setattr("searchpet.worker.once.train", interrupt)
            assert cli.main(words) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "to continue: searchpet tune" in capsys.readouterr().err
    assert standing(join(f"sqlite:///{out}/study.db", None)).running == 0
    assert cli.main([*words, "--resume"]) == 0
    now = standing(join(f"sqlite:///{out}/study.db", None))
    assert (now.finished, now.fresh, now.failed) == (4, 4, 0)


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_study_whose_time_is_over_says_so_and_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK, "--trials", "4", "--out", "late"]
    capsys.readouterr()
    assert cli.main([*words, "--timeout", "0.001s"]) == 2
    said = capsys.readouterr().err
    assert "0 of 4 trials have ended within --timeout 0.001s; repeat the command with" in said
    assert "error: a study must have a finished trial, but late has none yet; go on with" in said
    assert cli.main([*words, "--resume"]) == 0
    assert "trials have ended" not in capsys.readouterr().err
    assert standing(join("sqlite:///late/study.db", None)).finished == 4


def test_a_full_store_costs_no_trial(place: Path, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*QUICK, "--trials", "3", "-q"]
    assert cli.main([*words, "--out", "roomy"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        def fail(**_: Any) -> None:
            raise error

        patch.setattr("searchpet.collect.optuna.artifacts.upload_artifact", fail)
        error: Exception = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert cli.main([*words, "--out", "full"]) == 2
        said = capsys.readouterr().err
        error = RuntimeError("the bucket does not exist")  # each store has errors of its own
        assert cli.main([*words, "--out", "full", "--resume"]) == 2
    assert re.match("error: .*/artifacts must take the files of a trial, but: the bucket does not "
                    "exist; what was", capsys.readouterr().err)
    assert re.fullmatch("error: No space left on device: .*/full/artifacts; free some disk space; "
                        "what was written before is kept; to continue: .* --resume\n", said)
    assert standing(join("sqlite:///full/study.db", None)).waiting == 1
    assert cli.main([*words, "--out", "full", "--resume"]) == 0
    assert outcome(trials("full")) == outcome(trials("roomy"))


@pytest.mark.parametrize("storage", ["sqlite:///jobs/study.db", pytest.param(
    "journal:jobs/study.log", marks=pytest.mark.slow)])
def test_killed_workers_lose_no_trial(place: Path, storage: str) -> None:
    (place / "jobs").mkdir(exist_ok=True)
    (place / "jobs" / "settings.json").unlink(missing_ok=True)
    out = f"jobs-{storage.partition(':')[0]}"
    process = spawn([*QUICK, "--trials", "8", "--jobs", "2", "--out", out, "--storage", storage,
                     "--study", "killed"])
    worker = int(wait_for(storage, 1, "killed").split("/")[1])
    os.kill(worker, signal.SIGKILL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    study = join(storage, "killed")
    now = standing(study)
    assert (now.finished, now.running, now.waiting) == (8, 0, 0)
    tries = [root(t) for t in trials_of(study) if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(tries) == len(set(tries))  # none to its end twice
    assert Spec.load(out).hash == json.loads((place / out / "result.json").read_text())[
        "spec_hash"]


def test_a_journals_lock_points_to_the_file(place: Path) -> None:
    """Else the lock of a process that was killed is waited for without end."""
    (place / "locks").mkdir()
    storage: Any = open_storage("journal:locks/study.log")
    lock = storage._backend._lock
    lock.acquire()
    assert Path(lock._lock_file).resolve() == (place / "locks" / "study.log").resolve()
    assert Path(lock._lock_file).exists()
    lock.release()


def test_a_trial_given_up_without_being_repeated_is_found(done: Path) -> None:
    study = optuna.create_study(storage="sqlite:///orphan.db")
    study.add_trial(optuna.create_trial(
        state=optuna.trial.TrialState.FAIL, params={}, distributions={}))
    take_back(study)
    assert standing(study).failed == 1  # somebody may be about to repeat it
    old = optuna.create_study(storage="sqlite:///old.db")
    trial = optuna.create_trial(state=optuna.trial.TrialState.FAIL)
    trial.datetime_complete = trial.datetime_start = datetime(2020, 1, 1)
    old.add_trial(trial)
    take_back(old)
    assert standing(old).waiting == 1
    take_back(old)
    assert len(old.trials) == 2


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_trial_cut_off_between_two_knobs_gets_those_that_it_would_have_had(given: int) -> None:
    names = ("rank", "tau")

    def asked(study: optuna.Study) -> optuna.Trial:
        study.sampler = sampler("tpe", 7, 20)
        return study.ask()

    uncut = asked(optuna.create_study())
    wanted = [uncut.suggest_float(name, 0, 1) for name in names]
    study = optuna.create_study()
    cut = asked(study)
    for name in names[:given]:
        cut.suggest_float(name, 0, 1)
    if given == len(names):
        cut.set_user_attr(VERSION, "1")
    again(study, trials_of(study)[0])
    repeated = asked(study)
    assert root(trials_of(study)[1]) == 0 and repeated.number == 1
    assert [repeated.suggest_float(name, 0, 1) for name in names] == wanted


def test_a_trial_whose_worker_died_before_it_could_say_who_it_is_is_repeated(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study()
    study.ask()
    take_back(study)
    assert [unclaimed(t) for t in trials_of(study)] == [True]  # it may still say so
    now = time.time()
    monkeypatch.setattr("searchpet.roster.time.time", lambda: now + GRACE + 1)
    take_back(study)
    assert [t.state.name for t in trials_of(study)] == ["FAIL", "WAITING"]
    take_back(study)
    assert len(study.trials) == 2


def test_repetitions_do_not_move_the_trials_after_them() -> None:
    """A trial samples by its place, which must be that of a study that was never cut off."""
    study = optuna.create_study()
    for _ in range(2):  # trials 0 and 2 are cut off; 1 and 3 repeat them
        study.ask()
        study.tell(trials_of(study)[-1].number, state=optuna.trial.TrialState.FAIL)
        again(study, trials_of(study)[-1])
        study.tell(study.ask(), 0.0)
    study.ask()
    trials = trials_of(study)
    assert [root(t) for t in trials] == [0, 0, 2, 2, 4]
    assert [place_of(t, trials) for t in trials] == [0, 0, 1, 1, 2]


# --- workers and collecting elsewhere ---


def test_a_worker_joins_and_another_place_collects(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*QUICK, "--trials", "2", "--out", "parent", "-q"]) == 0
    study = join("sqlite:///parent/study.db", None)
    study.set_user_attr("trials", 4)
    words = ["tune", "--worker", "--storage", "sqlite:///parent/study.db", "--device", "cpu"]
    assert cli.main([*words, "--out", "elsewhere", "-q"]) == 0
    assert standing(study).finished == 4
    assert list((place / "elsewhere" / "trials").iterdir())
    words = ["tune", "--collect", "--storage", "sqlite:///parent/study.db", "--device", "cpu"]
    assert cli.main([*words, "--out", "collected", "-q"]) == 0
    assert "searchpet trials parent --storage ADDRESS" in capsys.readouterr().out
    best = max(t.value for t in trials("parent") if t.value is not None)
    assert json.loads(Path("collected/result.json").read_text())["score"] == best
    assert cli.main(["verify", "collected"]) == 0


# --- wrong input ---


@pytest.mark.parametrize(("words", "message"), [
    (["--trials", "0"], "--trials must be >= 1"),
    (["--jobs", "0"], "--jobs must be >= 1"),
    (["--timeout", "soon"], "--timeout must be a time such as 90s"),
    (["--metric", "accuracy"], "--metric must be one of"),
    (["--metric", "flops"], "--metric must be score, or score and others"),
    (["--metric", "score,score"], "each once"),
    (["--sampler", "tpee"], "--sampler must be one of .*did you mean 'tpe'"),
    (["--pruner", "half"], "--pruner must be one of"),
    (["--limit", "score=1"], "--limit must be of trainable, flops or latency"),
    (["--limit", "flops"], "--limit must read METRIC=MOST, such as flops=1e9"),
    (["--limit", "flops=0"], "must be above 0, which nothing undercuts"),
    (["--knobs", "nothing"], "tuning space must be one of"),
    (["--storage", "mysterydb://x"], "--storage must be sqlite"),
    (["--storage", "postgresql://me:secret@127.0.0.1:1/x"], "--storage must be"),
    (["--storage", "grpc://nowhere"], "grpc://HOST:PORT"),
    (["--artifacts", "gs://bucket"], "--artifacts must be a folder or s3://BUCKET, but got gs:"),
    (["--artifacts", "films/train.jsonl"], "must be a folder that can be written here, but film"),
    (["--worker"], "--storage must say where the study is"),
    (["--worker", "--collect", "--storage", "sqlite:///x.db"], "give one of them"),
    (["--worker", "--storage", "sqlite:///empty.db"], "--study must say which of no studies"),
    (["--budget", "0.0001%"], "must buy at least one|budget"),
    (["--budget", "0"], r"^error: budget must buy .* costs 1 parameter \(.* got 0 parameters"),
    (["--task", "flms"], "did you mean 'films'|task must be"),
    (["--strategy", "bilevle"], "did you mean 'bilevel'"),
])
def test_wrong_input_is_one_line(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main([*QUICK, "--trials", "1", "--out", f"wrong/{words}", "-q", *words]) == 2
    text = capsys.readouterr().err
    assert len(text.strip().splitlines()) == 1, text
    assert re.search(message, text), text
    assert "secret" not in text


def test_limits_that_nobody_meets_say_what_was_reached(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK, "--trials", "2", "--limit", "trainable=3", "--out", "tight", "-q"]
    assert cli.main(words) == 2
    text = capsys.readouterr().err
    assert "a trial must meet trainable <= 3, but the least that 2 trials came to is" in text
    assert len(trials("tight")) == 2


def test_another_question_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = f"sqlite:///{done}/study.db"
    for words, message in (
            ([], "study done|--study must be a new name"),
            (["--resume", "--metric", "score,trainable"], "1 objective "),
            (["--resume", "--tau", "0.2"], "but tau was 0.05 and is 0.2 now"),
            (["--resume", "--knobs", "fast.toml"], "but its knobs differ")):
        capsys.readouterr()
        job = [*JOB, "--trials", "7", "--storage", storage, "--study", "done", "-q"]
        assert cli.main([*job, "--out", f"other{len(words)}{words[-1:]}", *words]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (Path(f"other{len(words)}{words[-1:]}") / "artifacts").exists()  # free again


def test_a_study_of_another_version_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*QUICK, "--trials", "1", "--out", "older", "-q"]) == 0
    study = join("sqlite:///older/study.db", None)
    study.set_user_attr("searchpet", {**study.user_attrs["searchpet"], "version": "0.0"})
    words = ["tune", "--worker", "--storage", "sqlite:///older/study.db", "-q"]
    assert cli.main(words) == 2
    assert "was made by 0.0" in capsys.readouterr().err


def test_a_foreign_study_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optuna.create_study(study_name="theirs", storage="sqlite:///foreign.db")
    for words in (["trials", "theirs", "--storage", "sqlite:///foreign.db"],
                  ["tune", "--worker", "--storage", "sqlite:///foreign.db"],
                  [*QUICK, "--storage", "sqlite:///foreign.db", "--study", "theirs", "--resume",
                   "--out", "foreign"]):
        capsys.readouterr()
        assert cli.main(words) == 2
        assert "must be one that `searchpet tune` made" in capsys.readouterr().err


# --- small parts ---


@pytest.mark.parametrize(("steps", "expected"), [
    (300, (75, 300)), (1600, (100, 400, 1600)), (100, (25, 100)), (60, (60,)), (1, (1,))])
def test_rungs_fall_by_four_and_stay_meaningful(steps: int, expected: tuple[int, ...]) -> None:
    assert rungs(steps) == expected


def test_times_and_limits_are_read() -> None:
    assert [duration(text) for text in ("90", "90s", "1.5m", "2h", None)] == [
        90, 90, 90, 7200, None]
    assert limits_of({"flops": "1e9"}) == {"flops": 1e9}


def test_passwords_are_not_shown() -> None:
    assert shown("postgresql://me:pa:ss@host/db") == "postgresql://me:***@host/db"
    assert shown("sqlite:///a/b.db") == "sqlite:///a/b.db"
    assert shown("postgresql://me@host/db") == "postgresql://me@host/db"
    assert shown("postgresql://h/db?user=me&password=s%20cret&a=b") == (
        "postgresql://h/db?user=me&password=***&a=b")
    url = "postgresql://me:pass@host/db"
    line = explain(MemoryError(), ["tune", "--storage", url, "--study", "x"])
    assert line and "pass" not in line and "--storage 'postgresql://me:***@host/db'" in line
    for words in (["--storage", url], [f"--storage={url}"]):
        text = command(["searchpet", "tune", *words, "--study", "x"])
        assert "pass" not in text and "me:***@host/db" in text and "--study x" in text


def test_the_table_says_why_a_trial_failed() -> None:
    row = {"state": "fail", "score": None, "steps": None, "seconds": 0.2, "reused": None}
    found = {"study": "s", "complete": 0, "pruned": 0, "failed": 2, "running": 0, "wanted": 3,
             "metrics": ["score"], "limits": {}, "front": [], "importances": {},
             "trials": [
                 {**row, "number": 0, "failure": "no budget"},
                 {**row, "number": 1, "failure": None}]}
    assert [line for line in views.study(found) if line == "trial 0 failed: no budget"]
    assert not [line for line in views.study(found) if str(line).startswith("trial 1")]


@pytest.mark.slow
def test_what_the_loop_costs_can_be_measured_anew(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    subprocess.run([sys.executable, str(ROOT / "experiments/outer_loop/scaling.py"), "--storage",
                    storage, "--workers", "2", "--samplers", "random", "--each", "2", "--out",
                    str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert {line["by"] for line in lines} == {"optuna", "searchpet"}
    assert all(line["workers"] == 2 and line["trials"] == 4 for line in lines)
