"""The command line as people meet it: output, exit codes, one-line errors, resuming."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import searchpet
from searchpet import cli, engine, failures
from searchpet.ask import STRATEGY
from searchpet.commands import jobs
from searchpet.commands import tune as outer
from searchpet.settings import TAU, Settings
from searchpet.spec import Spec
from tests.commands import ROOT, cut_off, write_task


class Said(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are killed: the numbers must be the same
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(_one_thread: None, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with the task `films` and the backbone `tiny`."""
    folder = tmp_path_factory.mktemp("home")
    write_task(folder / "films")
    (folder / "tiny").symlink_to(tiny_folder)
    (folder / "new.csv").write_text("text\ngood film\nbad film\n")
    return folder


JOB = ["--model", "tiny", "--task", "films", "--budget", "1%", "--steps", "12", "--batch-size",
       "8", "--max-length", "16", "--tau", "0.5"]


@pytest.fixture
def say(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line in `home`."""
    monkeypatch.chdir(home)
    monkeypatch.delenv("SEARCHPET_DATA", raising=False)

    def run(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["searchpet", *words])
        code = cli.main()
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def done(home: Path) -> Path:
    """A finished run: `searchpet search` with controls, full fine-tuning, and test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.delenv("SEARCHPET_DATA", raising=False)
        patch.setattr(sys, "argv", ["searchpet", "search", *JOB, "--full", "--test"])
        assert cli.main(["search", *JOB, "--full", "--test", "--out", "done", "--quiet"]) == 0
    return home / "done"


def test_help_is_fast_and_light() -> None:
    code = ("import sys\nfrom searchpet.cli import main\nassert main(['--help']) == 0\n"
            "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.returncode == 0, found.stderr
    assert all(verb in found.stdout for verb in ("search", "train", "evaluate", "show", "grid"))
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 0.6  # processor seconds: other work on the machine does not count


def test_the_module_runs() -> None:
    found = subprocess.run([sys.executable, "-m", "searchpet", "search", "--budgte", "1"],
                           capture_output=True, text=True, check=False, cwd=ROOT)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: No such option: --budgte")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(("verb", "command", "python"), [
    ("search", jobs.search, engine.search), ("train", jobs.train, engine.train),
    ("tune", outer.tune, searchpet.tune)])
def test_defaults_are_those_of_python(verb: str, command: Any, python: Any) -> None:
    given = {name.rstrip("_"): p.default for name, p in
             inspect.signature(command).parameters.items()}
    for field in dataclasses.fields(Settings):
        if not (verb == "train" and field.name in ("model", "task")):  # those of the spec
            assert given[field.name] == field.default
    own = inspect.signature(python).parameters
    lists = {"set", "recovery", "limit", "must", "forbid"}  # [] there, nothing here
    for name in given.keys() & own.keys() - {"spec", "full", *lists}:
        assert given[name] == own[name].default
    assert verb == "train" or given["strategy"] == STRATEGY


def test_search_ends_with_the_comparison(done: Path, say: Any) -> None:
    said = say("search", *JOB, "--full", "--test", "--out", "done", "--resume", "--quiet")
    assert (said.code, said.err) == (0, "")
    values = json.loads((done / "result.json").read_text())
    assert [c["name"] for c in values["controls"]] == ["random", "random:unit"]
    for word in (f"{STRATEGY} (found)", "random:unit", "full fine-tuning", "accuracy on test",
                 f"{values['score']:.4f}", "done/spec.json", "done/delta.safetensors",
                 "next: searchpet show done"):
        assert word in said.out
    assert values["trainable"] <= values["budget_limit"] == 254


def test_json_is_the_result_and_nothing_else(done: Path, say: Any) -> None:
    said = say("search", *JOB, "--full", "--test", "--out", "done", "--resume", "--json")
    assert json.loads(said.out) == json.loads((done / "result.json").read_text())
    said = say("search", *JOB, "--controls", "0", "--out", "json", "--json")
    values = json.loads(said.out)
    assert said.code == 0
    assert values["controls"] == [] and values["full_finetune"] is None
    assert values == json.loads(Path("json/result.json").read_text())
    assert f"{STRATEGY} search 12/12" in said.err and "entropy" in said.err
    assert not [line for line in said.err.splitlines()
                if not line.startswith((STRATEGY, "warning: training ended at"))]


def test_progress_names_the_control(home: Path, say: Any) -> None:
    said = say("search", *JOB, "--steps", "2", "--full", "--out", "progress")
    lines = [line for line in said.err.splitlines() if not line.startswith("warning: training")]
    assert [line.split(" 2/2")[0] for line in lines] == [
        f"{STRATEGY} search", f"{STRATEGY} train", "random train", "random:unit train",
        "full train"]


def test_a_folder_is_not_overwritten(done: Path, say: Any) -> None:
    wrong(say("search", *JOB, "--out", "done"), "not empty; add --resume")
    wrong(say("search", *JOB, "--out", "done", "--resume", "--seed", "1"),
          "--resume must continue the same run, but")
    wrong(say("search", *JOB, "--out", "films", "--resume"), "films holds other files")
    wrong(say("search", *JOB, "--out", "new.csv"), "--out must be a folder")
    wrong(say("search", *JOB, "--budget", "x", "--out", "typo"), "budget must be")
    assert say("search", *JOB, "--steps", "1", "--controls", "0", "--out", "typo").code == 0


@pytest.mark.parametrize("more", [
    ["--strategy", "sparse_adapter", "--space", "adapters", "--budget", "300"],
    ["--strategy", "prune_first", "--keep-weights", "50%", "--masks", "prune/weights"],
])
def test_dry_run_knows_structures_with_masks(home: Path, say: Any, more: list[str]) -> None:
    said = say("search", *JOB, "--dry-run", *more)
    assert said.code == 0 and "Traceback" not in said.err


def test_dry_run_writes_nothing(home: Path, say: Any) -> None:
    words = ["search", *JOB, "--steps", "1000", "--controls", "2", "--out", "dry", "--dry-run"]
    said = say(*words)
    assert said.code == 0 and not Path("dry").exists()
    for word in ("units", "254 parameters", "about", "5 × training", "memory", "disk"):
        assert word in said.out
    plan = json.loads(say(*words, "--json").out)
    assert plan["limit"] == 254 and plan["seconds"] > plan["train_seconds"] > 0
    assert plan["disk_peak_bytes"] > plan["disk_bytes"] >= 4 * 254 * 5


def test_show_draws_layers_and_roles(done: Path, say: Any) -> None:
    said = say("show", "done")
    spec = Spec.load(done)
    assert said.code == 0 and spec.hash[:12] in said.out
    assert "coordinates" in said.out and "█" in said.out
    for entry in spec.entries:
        assert entry.role in said.out and entry.kind in said.out
    assert json.loads(say("show", "done/spec.json", "--json").out)["hash"] == spec.hash


def test_train_takes_model_and_task_from_the_run(done: Path, say: Any) -> None:
    short = ["--steps", "6", "--batch-size", "8", "--max-length", "16", "--quiet", "--json"]
    values = json.loads(say("train", "done", *short, "--sweep", "--out", "again").out)
    assert values["spec_hash"] == Spec.load(done).hash and values["task"] == "films"
    assert {p.name for p in Path("again").iterdir()} >= {f"sweep-{TAU}", "delta.safetensors"}
    base = ["--model", "tiny", "--task", "films", *short]
    full = json.loads(say("train", "--full", *base, "--out", "full").out)
    assert full["trainable"] == full["backbone"] and full["score"] == full["full_finetune"]
    head = json.loads(say("train", "--head-only", *base, "--out", "head").out)
    assert head["trainable"] == 0 and head["head"] == 66


def test_compare_ranks_runs(done: Path, say: Any) -> None:
    say("search", *JOB, "--steps", "1", "--controls", "0", "--out", "worse", "--strategy",
        "random")
    said = say("compare", "worse", "done")
    assert said.code == 0 and "bilevel" in said.out and "worse" in said.out
    assert [row["run"] for row in json.loads(say("compare", "worse", "done", "--json").out)] == [
        "worse", "done"]


@pytest.mark.parametrize("content", ["{}", "[1]", "{"])
def test_compare_says_what_is_no_result(content: str, done: Path, say: Any) -> None:
    Path("damaged").mkdir(exist_ok=True)
    Path("damaged/result.json").write_text(content)
    said = say("compare", "done", "damaged")
    assert said.code == 2 and said.err.count("\n") == 1
    assert "damaged/result.json must be" in said.err


def test_evaluate_repeats_the_score(done: Path, say: Any) -> None:
    values = json.loads((done / "result.json").read_text())
    found = json.loads(say("evaluate", "done", "--split", "test", "--json").out)
    assert found == values["metrics"]
    assert "accuracy" in say("evaluate", "done").out
    wrong(say("evaluate", "done", "--split", "tset"), "--split must be a labelled split of films")


def test_predict_labels_new_texts(done: Path, say: Any) -> None:
    rows = [json.loads(line) for line in say("predict", "done", "new.csv").out.splitlines()]
    assert [row["text"] for row in rows] == ["good film", "bad film"]
    assert {row["prediction"] for row in rows} <= {"neg", "pos"}
    assert say("predict", "done", "new.csv", "--format", "csv", "--out", "p.csv").out == ""
    table = list(csv.DictReader(io.StringIO(Path("p.csv").read_text())))
    assert [row["prediction"] for row in table] == [row["prediction"] for row in rows]


def test_sites_and_space(home: Path, say: Any) -> None:
    assert "32→64" in say("sites", "--model", "tiny").out
    assert len(json.loads(say("sites", "--model", "tiny", "--json").out)) == 23
    said = say("space", "nano", "--model", "tiny", "--budget", "1%")
    assert "254 parameters" in said.out and "lora" in said.out
    found = json.loads(say("space", "nano", "--model", "tiny", "--budget", "1%", "--json").out)
    assert found["units"] == sum(kind["units"] for kind in found["kinds"])
    assert found["random_parameters"] <= found["limit"] == 254


@pytest.mark.parametrize(("what", "word"), [
    ("kinds", "lora"), ("grains", "channel"), ("strategies", "random:unit"),
    ("spaces", "uniform/bias"), ("tasks", "agreement")])
def test_list_describes_each(say: Any, what: str, word: str) -> None:
    said = say("list", what)
    assert said.code == 0 and word in said.out
    assert all(json.loads(say("list", what, "--json").out).values())


def test_a_plugin_adds_a_strategy(home: Path, say: Any) -> None:
    (home / "mine_first.py").write_text(
        "from searchpet import catalog\n"
        "def search(problem, *, start: int = 0):\n"
        "    '''The first units.'''\n"
        "    return catalog.get('strategies', 'random')(problem, variant='unit')\n"
        "catalog.add('strategies', 'first', search)\n")
    assert "The first units." in say("list", "strategies", "--plugin", "mine_first").out
    said = say("search", *JOB, "--steps", "1", "--plugin", "mine_first", "--strategy", "first",
               "--set", "first.start=3", "--controls", "0", "--out", "plugged")
    assert said.code == 0
    provenance = Spec.load("plugged").provenance
    assert provenance["hyperparameters"] == {"start": 3}
    assert "--plugin mine_first" in provenance["command"] and "--out" not in provenance["command"]


def wrong(said: Said, message: str) -> None:
    """Exit code 2, one line on stderr, no traceback, nothing on stdout."""
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err


@pytest.mark.parametrize(("words", "message"), [
    (["--task", "./nowhere"], "task must be"),
    (["--model", "./nowhere"], "backbone must be a local folder"),
    (["--space", "nan"], "space must be one of"),
    (["--space", "nano.toml"], "a space file must exist"),
    (["--strategy", "bilevle"], "did you mean 'bilevel'?"),
    (["--strategy", "uniform:bais"], "did you mean 'bias'?"),
    (["--strategy", "random:x"], "must be one of module, unit"),
    (["--strategy", "bilevel:x"], "has no variants"),
    (["--device", "abacus"], "--device must be"),
    (["--precision", "fp8"], "--precision must be"),
    (["--steps", "0"], "--steps must be >= 1, but got 0"),
    (["--steps", "many"], "'--steps'"),
    (["--batch-size", "0"], "--batch-size must be >= 1, but got 0"),
    (["--accumulate", "0"], "--accumulate must be >= 1"),
    (["--seed", "-1"], "--seed must be"),
    (["--tau", "0"], "--tau must be"),
    (["--lr", "nan"], "--lr must be"),
    (["--max-length", "2"], "max_length must be above 2"),
    (["--max-length", "9999"], "at most 64"),
    (["--controls", "-1"], "--controls must be >= 0"),
    (["--budget", ""], "budget must be a share"),
    (["--budget", "much"], "budget must be a share"),
    (["--budget", "0%"], "budget must be a share in (0%, 100%]"),
    (["--budget", "101%"], "budget must be a share in (0%, 100%]"),
    (["--budget", "1.5"], "write 1.5% for a share"),
    (["--budget", "0.000001%"], "the cheapest costs 1 parameter ("),
    (["--budget", "0"], "ask for at least 1"),
    (["--budget", "50", "--count-head"], "must exceed its 66 parameters"),
    (["--set", "alpha_lr=1"], "--set must read STRATEGY.KEY=VALUE"),
    (["--set", "bilevel.alpha_lr"], "--set must read STRATEGY.KEY=VALUE"),
    (["--set", "random.variant=unit"], "the strategy that runs, bilevel"),
    (["--set", "bilevel.alhpa_lr=1"], "did you mean 'alpha_lr'?"),
    (["--set", "bilevel.alpha_lr=high"], "bilevel.alpha_lr must be a float"),
    (["--set", "bilevel.alpha_lr=nan"], "bilevel.alpha_lr must be a float"),
    (["--set", "bilevel.warmup=7"], "bilevel.warmup must be a share of the steps in [0, 1]"),
    (["--plugin", "no_such_module"], "--plugin must name a module"),
    (["--nonsense"], "No such option: --nonsense"),
    (["extra"], "unexpected extra argument"),
])
def test_wrong_input_is_one_line(home: Path, say: Any, words: list[str], message: str) -> None:
    wrong(say("search", *JOB, "--quiet", *words, "--out", "wrong"), message)
    assert not Path("wrong").exists() or {p.name for p in Path("wrong").iterdir()} == {
        "settings.json"}


@pytest.mark.parametrize(("words", "message"), [
    (["train"], "train takes a spec, --full or --head-only"),
    (["train", "done", "--full"], "exactly one of them"),
    (["train", "nowhere"], "a spec must be a file or a run folder"),
    (["train", "new.csv"], "a spec must be JSON"),
    (["train", "edited.json"], "it was edited or damaged"),
    (["show", "nowhere"], "a spec must be a file or a run folder"),
    (["evaluate", "nowhere"], "delta.safetensors"),
    (["predict", "done", "nowhere.csv"], "nowhere.csv"),
    (["predict", "done", "other.csv"], "'text'"),
    (["predict", "done", "new.csv", "--format", "xml"], "--format must be one of csv, jsonl"),
    (["compare", "films"], "must hold result.json"),
    (["sites", "--model", "./nowhere"], "backbone must be"),
    (["space", "nanno", "--model", "tiny"], "did you mean 'nano'?"),
    (["space", "nano", "--model", "tiny", "--budget", "0.001%"], "the cheapest costs 1"),
    (["list", "kind"], "did you mean 'kinds'?"),
    (["grid", "nowhere.toml"], "a grid must be a readable TOML file"),
    (["grid", "new.csv"], "must be TOML"),
    (["grid", "new.csv", "--table"], "a table needs finished trainings"),
    (["serach"], "No such command"),
])
def test_wrong_arguments_are_one_line(
    done: Path, say: Any, words: list[str], message: str
) -> None:
    Path("other.csv").write_text("sentence\ngood\n")
    Path("edited.json").write_text((done / "spec.json").read_text().replace(
        '"layer":0', '"layer":1'))
    wrong(say(*words), message)


def test_no_labelled_test_split_is_said_at_once(home: Path, say: Any) -> None:
    write_task(home / "untested")
    (home / "untested/test.jsonl").unlink()
    words = [*JOB, "--task", "untested", "--test", "--out", "wrong"]
    wrong(say("search", *words), "--test needs a labelled test split")


def test_overlap_is_a_warning(home: Path, say: Any) -> None:
    same = write_task(home / "same")
    (same / "test.jsonl").write_text((same / "validation.jsonl").read_text())
    said = say("search", *JOB, "--task", "same", "--steps", "1", "--controls", "0", "--out",
               "same-run", "--json", "--quiet")
    assert said.err.startswith("warning: test equals validation: all 24 rows")
    assert json.loads(said.out)["warnings"]


def test_debug_shows_the_traceback(home: Path, say: Any) -> None:
    said = say("search", *JOB, "--steps", "0", "--debug", "--out", "wrong")
    assert said.code == 2 and "Traceback" in said.err
    assert said.err.splitlines()[-1].startswith("error: --steps must be >= 1")


def test_a_bug_keeps_its_traceback(home: Path, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(engine, "search", broken)
    with pytest.raises(TypeError, match="a bug"):
        say("search", *JOB)


@pytest.mark.parametrize(("error", "shown"), [
    (OSError(28, "No space left on device"), False), (TypeError("a bug"), True)])
def test_a_thread_leaves_what_explains_itself_to_the_main_one(
    error: Exception, shown: bool, home: Path, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beating() -> None:
        raise error

    def broken(**_: Any) -> None:
        thread = threading.Thread(target=beating)
        thread.start()
        thread.join()
        raise OSError(28, "No space left on device")

    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    monkeypatch.setattr(engine, "search", broken)
    wrong(say("search", *JOB), "No space left on device")
    assert [args.exc_value for args in seen] == [error] * shown
    assert threading.excepthook == seen.append


@pytest.mark.parametrize(("error", "message"), [
    (OSError(28, "No space left on device", "a/x"), "No space left on device: a/x; free"),
    (PermissionError(13, "Permission denied", "runs/a"), "Permission denied: runs/a; what was"),
    (MemoryError(), "smaller --batch-size"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "smaller --batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory\nat"), "smaller --batch-size"),
])
def test_what_the_machine_lacks_is_one_line(error: Exception, message: str) -> None:
    line = failures.explain(error, ["search", "--steps", "3"])
    assert line is not None and message in line and "\n" not in line
    assert line.endswith("to continue: searchpet search --steps 3 --resume")


def test_a_bug_is_no_input_error() -> None:
    assert failures.explain(RuntimeError("shapes differ"), []) is None


def test_a_cut_off_run_continues_to_the_same_end(home: Path, say: Any) -> None:
    """kill -9 in the search, Ctrl-C later in it, both kills in the training; then it finishes."""
    words = ["search", *JOB, "--controls", "1", "--test", "--quiet"]
    assert say(*words, "--out", "whole").code == 0
    killed = cut_off([*words, "--out", "cut"], "SIGKILL search 5", home)
    assert killed.returncode == -9, killed.stderr
    assert Path("cut/search.checkpoint.safetensors").is_file()
    stopped = cut_off([*words, "--out", "cut", "--resume"], "SIGINT search 4", home)
    assert stopped.returncode == 130
    assert stopped.stderr.startswith("interrupted; to continue: searchpet search")
    assert stopped.stderr.count("\n") == 1 and "--resume" in stopped.stderr
    asked = cut_off([*words, "--out", "cut", "--resume"], "SIGTERM train 3", home)
    assert asked.returncode == 130 and asked.stderr == stopped.stderr
    killed = cut_off([*words, "--out", "cut", "--resume"], "SIGKILL train 5", home)
    assert killed.returncode == -9 and Path("cut/train.checkpoint.safetensors").is_file()
    wrong(say(*words, "--out", "cut"), "add --resume")
    assert say(*words, "--out", "cut", "--resume").code == 0
    for name in ("spec.json", "delta.safetensors", "controls/random-0/spec.json"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name
    results = [json.loads(Path(run, "result.json").read_text()) for run in ("cut", "whole")]
    assert len({json.dumps({**r, "seconds": None}) for r in results}) == 1
    assert not list(Path("cut").rglob("*.checkpoint.safetensors"))


def test_a_full_disk_is_named(home: Path, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")  # a write's own error names no file

    monkeypatch.setattr(Path, "write_bytes", full)
    said = say("search", *JOB, "--out", "full-disk", "--quiet")
    wrong(said, "No space left on device: full-disk/settings.json; free some disk space")
    assert list(Path("full-disk").iterdir()) == []
