"""The page of a run: what it says, that it is whole, that nothing in it is markup by chance."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import searchpet
from searchpet import cli, report
from searchpet.recall import command_of
from searchpet.run import RunFolder
from tests.commands import workplace, write_task

TASK = "it's <b>$x$ & \"films\""
JOB = ["--model", "tiny", "--steps", "8", "--batch-size", "8", "--max-length", "16", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with runs on a task whose name is hostile: `found`, `pruned`, `full`, `bare`."""
    folder = tmp_path_factory.mktemp("reports")
    with workplace(folder, tiny_folder) as patch:
        patch.setattr(report, "write", WRITE)
        write_task(folder / TASK)
        task = ["--task", TASK]
        for words in (
                ["search", *JOB, *task, "--budget", "1%", "--out", "found", "--full",
                 "--set", "bilevel.alpha_lr=0.2"],
                ["search", *JOB, *task, "--budget", "5%", "--space", "wide", "--keep-flops", "60%",
                 "--controls", "0", "--out", "pruned"],
                ["train", "found/spec.json", "--seed", "1", "--steps", "4", "--out", "bare",
                 "--quiet"],
                ["transfer", "found", *JOB, *task, "--budget", "0.5%", "--out", "moved"],
                ["train", *JOB, *task, "--full", "--out", "full"]):
            patch.setattr(sys, "argv", ["searchpet", *words])
            assert cli.main(words) == 0
        yield folder


WRITE = report.write


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.codes: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "code":
            self.codes.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.texts.append(data)
        if "code" in self._open:
            self.codes[-1] += data


def page(run: str) -> Page:
    return Page(Path(run, "report.html").read_text())


def test_every_run_has_a_page_that_answers(place: Path) -> None:
    found, result = page("found"), json.loads(Path("found/result.json").read_text())
    best = max(result["controls"], key=lambda c: c["score"])
    assert f"accuracy {result['score']:.4f}" in found.text
    ahead = 100 * (result["score"] - best["score"])
    word = "ahead of" if ahead > 0 else "behind" if ahead < 0 else "level with"
    assert f"{word} {best['name']} ({best['score']:.4f})" in found.text
    assert "one seed" in found.text
    assert "--seed 1" in found.text
    for control in result["controls"]:
        assert f"{control['score']:.4f}" in found.text
    assert f"{result['full_finetune']:.4f}" in found.text
    assert f"{result['budget_limit']:,}" in found.text
    assert result["spec_hash"] in found.text


@pytest.mark.parametrize(("run", "figures"), [
    ("found", ["cost", "structure", "parameters", "search", "shares", "learning"]),
    ("pruned", ["structure", "parameters", "search", "shares", "learning"]),
    ("bare", ["structure", "parameters", "learning"]),
    ("full", ["learning"])])
def test_a_page_has_the_figures_that_its_run_has_something_for(
        place: Path, run: str, figures: list[str]) -> None:
    tags = page(run).tags
    assert [a["id"] for tag, a in tags if tag == "figure"] == figures
    assert len([tag for tag, a in tags if tag == "svg" and a.get("role") == "img"]) == len(figures)


@pytest.mark.parametrize("run", ["found", "pruned", "bare", "full"])
def test_a_page_is_whole_and_runs_nothing(place: Path, run: str) -> None:
    found = page(run)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "b", "image", "img"}
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    ids = [a["id"] for _, a in found.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    text = Path(run, "report.html").read_text()
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert set(used) <= set(ids)
    assert not re.search(r"url\((?!#)", text)
    assert "http-equiv=\"Content-Security-Policy\"" in text


def test_a_hostile_name_is_text(place: Path) -> None:
    raw = Path("found/report.html").read_text()
    assert "<b>" not in raw
    assert "&lt;b&gt;" in raw
    assert TASK in page("found").text


def test_hostile_results_are_text_or_refused(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree("bare", run)
    values = json.loads((run / "result.json").read_text())
    evil = "<script>alert(1)</script>"
    changed = {**values, "task": evil, "metric": evil, "strategy": evil, "warnings": [evil],
               "controls": [{"name": evil, "score": 0.5, "trainable": 3}]}
    (run / "result.json").write_text(json.dumps(changed))
    text = WRITE(run).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for name, value in (("score", "0.5"), ("trainable", None), ("fraction", True)):
        (run / "result.json").write_text(json.dumps({**values, name: value}))
        with pytest.raises(searchpet.InputError, match="must have numbers"):
            WRITE(run)


@pytest.mark.parametrize(("run", "verb"), [
    ("found", "search"), ("pruned", "search"), ("bare", "train"), ("full", "train"),
    ("moved", "transfer")])
def test_the_command_runs_as_it_stands(place: Path, run: str, verb: str) -> None:
    (line,) = [c for c in page(run).codes if c.startswith(f"searchpet {verb} ")
               and c == command_of(RunFolder(run))]
    words = shlex.split(line)[1:]
    assert not {"--out", "--resume"} & set(words)
    again = f"again-{run}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda run: None)
        assert cli.main([*words, "--out", again, "--quiet"]) == 0
    before, now = (json.loads(Path(r, "settings.json").read_text()) for r in (run, again))
    assert now == before
    if verb in ("search", "transfer"):
        assert searchpet.Spec.load(again).hash == searchpet.Spec.load(run).hash


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(
        {"command": "search", "model": "https://me:secret@host/model", "task": "t"}))
    line = command_of(RunFolder(tmp_path))
    assert line is not None
    assert "secret" not in line
    assert "me:***@host" in line


@pytest.mark.parametrize("asked", [
    {"recovery": {"ce": 0.5, "logits": 0.5, "hidden": 0.0, "temperature": 4.0}},
    {"strategy": "uniform:lora_qv", "space": "uniform/lora_qv", "inherit": True},
    {"prune": {"measure": "weights", "text": "50%", "masks": "prune/weights"}, "controls": 0}])
def test_settings_become_options_that_mean_the_same(
        tmp_path: Path, asked: dict[str, Any]) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(
        {"command": "search", "model": "m", "task": "t", "budget": "1%", **asked}))
    words = shlex.split(command_of(RunFolder(tmp_path)) or "")
    text = " ".join(words)
    expected = {
        "recovery": "--recovery ce=0.5 --recovery logits=0.5 --recovery temperature=4.0",
        "strategy": "--strategy uniform:lora_qv --budget 1%",
        "prune": "--keep-weights 50% --masks prune/weights --controls 0"}[next(iter(asked))]
    assert expected in text
    assert ("--inherit" in words) == bool(asked.get("inherit"))


def test_how_to_load_it_is_true(place: Path) -> None:
    codes = page("found").codes
    (code,) = [c for c in codes if "searchpet.load" in c]
    names: dict[str, Any] = {}
    exec(compile(code, "page", "exec"), names)
    assert hasattr(names["model"], "searchpet")
    (line,) = [c for c in codes if c.startswith("searchpet predict")]
    Path("new.csv").write_text("text\ngood film\n")
    assert cli.main(shlex.split(line)[1:]) == 0


def test_an_older_transfer_has_no_command(place: Path, tmp_path: Path) -> None:
    shutil.copytree("moved", tmp_path / "old")
    (tmp_path / "old/source.json").unlink()
    assert command_of(RunFolder("moved")) is not None
    assert command_of(RunFolder(tmp_path / "old")) is None


def test_an_older_run_gets_its_page(place: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree("found", old)
    for name in ("report.html", "probabilities.json", "log.jsonl", "training.json",
                 "settings.json"):
        (old / name).unlink()
    assert cli.main(["report", str(old)]) == 0
    text = Page((old / "report.html").read_text()).text
    assert "What came out" in text
    assert "The command" not in text


def test_python_leaves_a_page_too(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", WRITE)
        searchpet.train("found/spec.json", model="tiny", task=TASK, steps=2,
                        batch_size=8, max_length=16, out="python")
    assert "What came out" in page("python").text


def test_a_transfer_says_what_became_of_its_source(place: Path) -> None:
    text = page("moved").text
    report = json.loads((place / "moved/transfer.json").read_text())
    assert "What was carried over" in text and "What was carried over" not in page("found").text
    for entry in report["entries"]:
        assert entry["verdict"] in text and (entry["why"] or "same role and kind") in text
    assert all(note in text for note in report["notes"])
    assert f"made for {report['source']['backbone']} is carried over" in text
    assert "searchpet transfer --controls 1 trains some" in text


def test_a_page_that_fails_costs_no_run(place: Path) -> None:
    def broken(run: Any) -> None:
        raise ValueError("no ink")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", broken)
        assert cli.main(["train", "found/spec.json", "--steps", "2", "--out", "inkless",
                         "--quiet"]) == 0
    assert Path("inkless/result.json").is_file()
    assert "no ink" in Path("inkless/log.jsonl").read_text()


def test_a_tuned_run_says_which_trial_it_is(place: Path) -> None:
    Path("own.toml").write_text('description = "mine"\nbase = "wide"\n[[knob]]\nname = "layers"\n'
                                'choices = ["all", "last 50%"]\n')
    words = ["tune", *JOB, "--task", TASK, "--budget", "2%", "--trials", "2",
             "--knobs", "own.toml", "--metric", "score,flops", "--out", "tuned"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", WRITE)
        assert cli.main(words) == 0
    found = page("tuned")
    assert "best of 2 trials" in found.text
    (line,) = [c for c in found.codes if c.startswith("searchpet tune ")]
    assert "--knobs tuned/knobs.toml" in line
    assert "--trials 2 --metric score,flops" in line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda run: None)
        assert cli.main([*shlex.split(line)[1:], "--out", "tuned-again", "--quiet"]) == 0
    before, now = (json.loads(Path(r, "settings.json").read_text()) for r in ("tuned",
                                                                               "tuned-again"))
    assert now == before
    assert cli.main(["plot", "tuned", "--figure", "front", "--out", "front.svg"]) == 0


@pytest.mark.parametrize(("run", "line"), [
    ("nowhere", "must hold result.json"), (TASK, "must hold result.json")])
def test_a_folder_without_a_result_has_no_page(
        place: Path, capsys: pytest.CaptureFixture[str], run: str, line: str) -> None:
    assert cli.main(["report", run]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said
