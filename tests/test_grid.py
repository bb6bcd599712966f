"""A tiny grid: every line there, the same after a kill, and settings that do not drift."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from searchpet.cli import main
from searchpet.errors import InputError
from searchpet.grid import run_grid
from searchpet.gridcells import cells_of
from searchpet.gridfile import GridFile, read_grid
from searchpet.ledger import RESULT_KEY, Ledger, claim, write_table
from searchpet.session import Session
from searchpet.spec import Spec
from tests.commands import cut_off, write_task

GRID = """
tasks = ["films"]
budgets = ["1%", 40]
seeds = [0, 1]
taus = [0.1, 1]
steps = 8
batch_size = 16
max_length = 16
model = "{model}"
methods = ["head", {{ name = "random:unit", structures = 2 }}, "default"]
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process that is killed: the numbers must be the same
    yield
    torch.set_num_threads(threads)


def lines(folder: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    """Lines of a ledger without the times."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


@pytest.fixture(scope="module")
def home(_one_thread: None, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with a task and a grid.toml."""
    folder = tmp_path_factory.mktemp("grid")
    write_task(folder / "films")
    (folder / "grid.toml").write_text(GRID.format(model=tiny_folder))
    return folder


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The grid, run without interruption."""
    said: list[str] = []
    run_grid(home / "grid.toml", data=str(home), out=home / "whole", say=said.append)
    assert any("min left" in line for line in said)
    return home / "whole"


def test_every_training_has_a_line(whole: Path) -> None:
    rows = lines(whole)
    cells = [("head", 0.0, 1), *(
        (name, budget, count) for budget in (0.01, 40 / 25408)
        for name, count in (("random:unit", 2), ("default", 1)))]
    expected = {("films", budget, name, s, seed, 1.0) for name, budget, count in cells
                for s in range(count) for seed in (0, 1)}
    assert set(Ledger(whole / "results.jsonl", RESULT_KEY).rows()) == expected
    assert not any("keep" in row for row in rows)
    assert len(rows) == len(expected)
    assert {row["split"] for row in rows} == {"test"}
    sweep = lines(whole, "sweep.jsonl")
    assert {row["split"] for row in sweep} == {"validation"}
    assert len(sweep) == 2 * len(cells)
    for name, budget, _ in cells:
        mine = [r for r in [*sweep, *rows] if (r["method"], r["budget"]) == (name, budget)]
        tried = {r["tau"]: r["score"] for r in mine if r["split"] == "validation"}
        (tau,) = {r["tau"] for r in mine if r["split"] == "test"}
        assert tau == max(tried, key=lambda t: tried[t])
    for row in rows:
        assert row["trainable"] <= row["budget"] * 25408 + 1e-6


def test_a_line_says_which_structure_was_trained(whole: Path) -> None:
    rows = lines(whole)
    structures = {(r["method"], r["budget"], r["structure_seed"]): r.get("structure")
                  for r in rows}
    assert len({(r["method"], r["budget"], r["structure_seed"], r.get("structure"))
                for r in rows}) == len(structures)
    for folder in whole.glob("work/films/*/*/structure-*"):
        if (folder / "spec.json").is_file():
            assert Spec.load(folder).hash[:12] in structures.values()
    assert [name for (name, *_), found in structures.items() if found is None] == ["head"]


def test_the_sweeps_own_training_counts_as_if_trained_again(
    whole: Path, home: Path
) -> None:
    """Its tensors, loaded and tested after the choice, score what a training with test would."""
    session = Session(read_grid(home / "grid.toml").settings("films", str(home)))
    spec = Spec.load(whole / "work/films/1pc/default/structure-0")
    (row,) = [r for r in lines(whole) if (r["method"], r["budget"], r["seed"]) == (
        "default", 0.01, 0)]
    outcome = session.fit(spec, None, 0, tau=row["tau"], test=True)
    assert outcome.test is not None
    assert outcome.test["accuracy"] == row["score"]


def test_a_grid_prunes_and_distils(home: Path, tiny_folder: Path) -> None:
    text = GRID.format(model=tiny_folder).replace('["1%", 40]', '["2%"]').replace(
        "taus = [0.1, 1]", 'taus = [0.5]\nkeep_flops = ["60%", "80%"]')
    text = text[: text.index("methods =")] + '''
[[methods]]
name = "full"
[[methods]]
name = "joint"
strategy = "bilevel"
[[methods]]
name = "dense"
strategy = "bilevel"
masks = ""
[[methods]]
name = "taught"
strategy = "apt"
distill = true
recovery = { logits = 0.9, hidden = 1, supervised = 0.1, temperature = 3 }
inherit = true
[[methods]]
name = "layers"
strategy = "prune_first"
set = { score = "top" }
masks = "prune/layers"
space = "lora_ranks"
'''
    (home / "prune.toml").write_text(text)
    said: list[str] = []
    table = run_grid(home / "prune.toml", data=str(home), out=home / "pruned", say=said.append)
    rows = lines(home / "pruned")
    found = [(r["method"], r.get("keep"), r["seed"]) for r in rows]
    pruned = ["joint", "taught", "layers"]
    cells = [("full", None), ("joint", 0.6), ("dense", None), ("taught", 0.6), ("layers", 0.6),
             *((name, 0.8) for name in pruned)]
    assert found == [(*cell, seed) for cell in cells for seed in (0, 1)]
    for keep in ("60", "80"):
        spec = Spec.load(home / f"pruned/work/films/2pc/keep-{keep}pc/layers/structure-0")
        assert spec.keep and spec.keep.used <= float(keep) / 100 * spec.keep.dense
        assert spec.provenance["space"] == "lora_ranks"
    assert "| keep | method |" in table and "| 0.6 | taught |" in table
    assert (home / "pruned/work/films/teacher/teacher.safetensors").is_file()
    changed = home / "prune2.toml"
    for before, now in (("temperature = 3", "temperature = 4"), ("inherit = true", "")):
        changed.write_text(text.replace(before, now))
        with pytest.raises(InputError, match="method taught was .*inherit.* and is "):
            run_grid(changed, data=str(home), out=home / "pruned", say=said.append)
    assert "16/16" in said[-1] and said[-1].startswith("[16")


def test_a_grid_inherits_and_contrasts(
    home: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each structure's trainings begin with what its own search has left; one search serves all
    methods that ask for the same.
    """
    text = GRID.format(model=tiny_folder).replace('["1%", 40]', '["2%"]').replace(
        "taus = [0.1, 1]", "taus = [0.5]")
    text = text[: text.index("methods =")] + '''
[[methods]]
name = "fresh"
strategy = "bilevel"
[[methods]]
name = "inherited"
strategy = "bilevel"
structures = 2
inherit = true
recovery = { ce = 1, unsupervised = 0.3 }
'''
    (home / "inherit.toml").write_text(text)
    fit, seen = Session.fit, list[Any]()

    def noted(self: Session, *args: Any, **options: Any) -> Any:
        seen.append((options["start"], self.teaching))
        return fit(self, *args, **options)

    monkeypatch.setattr(Session, "fit", noted)
    said: list[str] = []
    run_grid(home / "inherit.toml", data=str(home), out=home / "inherit", say=said.append)
    work = home / "inherit/work/films/2pc"
    left = [load_file(work / f"fresh/structure-{i}/inherit.safetensors") for i in (0, 1)]
    assert [start for start, _ in seen[:2]] == [None, None]
    for (start, _), own in zip(seen[2:], [left[0], left[0], left[1], left[1]], strict=True):
        assert start.keys() == own.keys()
        assert all(torch.equal(start[name], own[name]) for name in own)
    assert [teaching is None for _, teaching in seen] == [True, True, *[False] * 4]
    assert not (home / "inherit/work/films/teacher").exists()
    assert not list(work.glob("inherited/structure-?"))
    searches = [line.partition("] ")[2] for line in said if line.endswith("search")]
    assert searches == ["films 2% fresh structure 0: search",
                        "films 2% inherited structure 1: search"]


@pytest.mark.parametrize(("method", "keep", "inherits"), [
    ("default", "", True), ("default", "60%", False), ("bilevel", "", False), ("s3pet", "", False),
    ({"name": "x", "strategy": "bilevel", "inherit": True}, "60%", True),
    ({"name": "default", "inherit": False}, "", False), ("full", "", False)])
def test_default_begins_as_the_command_line_does(
    tmp_path: Path, method: Any, keep: str, inherits: bool
) -> None:
    grid = GridFile.model_validate({"tasks": ["films"], "methods": [method], "keep_flops":
                                    [keep] if keep else []})
    cells = list(cells_of(grid, tmp_path, "films", lambda: pytest.fail("a session is opened")))
    assert [cell.inherits for cell in cells] == [inherits]
    # a grid that trained in the other way is not continued
    assert ("inherit" in grid.methods[0].beside()) == (
        inherits or (method, keep) == ("default", "60%"))


def test_a_method_may_have_a_budget_of_its_own(home: Path, tiny_folder: Path) -> None:
    text = GRID.format(model=tiny_folder).split("methods")[0] + (
        'methods = [{ name = "random:unit" }, { name = "small", strategy = "random:unit", '
        'budget = 20 }]\n')
    folder = home / "own"
    folder.mkdir()
    (folder / "grid.toml").write_text(text)
    said: list[str] = []
    run_grid(folder / "grid.toml", data=str(home), say=said.append)
    rows = lines(folder)
    spent = {(row["method"], row["trainable"] <= 20) for row in rows}
    assert ("small", True) in spent and ("small", False) not in spent
    assert len([row for row in rows if row["method"] == "small"]) == 2  # one budget, two seeds
    assert len([row for row in rows if row["method"] == "random:unit"]) == 4
    done = len(rows) + len(lines(folder, "sweep.jsonl"))
    assert any(line.startswith(f"[{done}/{done}") for line in said)  # the count was right


def test_paired_trainings_have_a_structure_each(home: Path, tiny_folder: Path) -> None:
    text = GRID.format(model=tiny_folder).split("methods")[0].replace('["1%", 40]', "[40]") + (
        'paired = true\nmethods = ["head", "random:unit", '
        '{ name = "many", strategy = "random:unit", structures = 3 }]\n')
    (home / "paired.toml").write_text(text)
    said: list[str] = []
    run_grid(home / "paired.toml", data=str(home), out=home / "paired", say=said.append)
    rows = lines(home / "paired")
    pairs = {name: sorted((r["structure_seed"], r["seed"]) for r in rows if r["method"] == name)
             for name in ("head", "random:unit", "many")}
    assert pairs == {"head": [(0, 0), (0, 1)], "random:unit": [(0, 0), (1, 1)],
                     "many": [(0, 0), (1, 1), (2, 0)]}
    specs = {path.read_text() for path in (home / "paired/work").rglob("spec.json")}
    assert len(specs) > 1  # not one structure three times
    done = len(rows) + len(lines(home / "paired", "sweep.jsonl"))
    assert any(line.startswith(f"[{done}/{done}") for line in said)  # the count was right


@pytest.mark.parametrize(("best", "tried", "taken"), [
    (0.1, [0.1, 0.3, 0.033], 0.1), (0.03, [0.1, 0.3, 0.033, 0.011], 0.033),
    (9.0, [0.1, 0.3, 0.9, 2.7], 2.7)])
def test_taus_go_on_beyond_the_end_where_the_best_is(
    home: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, best: float,
    tried: list[float], taken: float,
) -> None:
    """Two at most; the count of trainings follows."""
    text = GRID.format(model=tiny_folder).split("methods")[0].replace('["1%", 40]', "[40]")
    text = text.replace("[0.1, 1]", "[0.1, 0.3]") + 'stretch = 2\nmethods = ["random:unit"]\n'
    (home / "stretch.toml").write_text(text)
    row = {"trainable": 40, "train_seconds": 1.0}
    monkeypatch.setattr("searchpet.grid.once.train", lambda *_, tau, **__: {
        **row, "tau": tau, "score": -abs(math.log(tau / best))})
    said: list[str] = []
    out = home / f"stretch-{best}"
    run_grid(home / "stretch.toml", data=str(home), out=out, say=said.append)
    assert [r["tau"] for r in lines(out, "sweep.jsonl")] == tried
    assert {r["tau"] for r in lines(out)} == {taken}
    done = len(tried) + 2
    assert any(line.startswith(f"[{done}/{done}") for line in said)


def test_structures_of_one_task_are_trained_on_others(home: Path, tiny_folder: Path) -> None:
    write_task(home / "plays", rows=40)
    text = GRID.format(model=tiny_folder).replace('["films"]', '["films", "plays"]').replace(
        '["1%", 40]', "[40]").replace("taus = [0.1, 1]", "taus = [0.5]")
    text = text[: text.index("methods =")] + """
methods = ["bilevel", { name = "from", strategy = "bilevel", on = "films" },
           { name = "both", strategy = "bilevel", on = "films,plays" }]
"""
    (home / "across.toml").write_text(text)
    said: list[str] = []
    run_grid(home / "across.toml", data=str(home), out=home / "across", say=said.append)
    work = home / "across/work"
    found = sorted(str(path.relative_to(work)) for path in work.rglob("spec.json"))
    assert found == ["films,plays/40/bilevel/structure-0/spec.json",
                     "films/40/bilevel/structure-0/spec.json",
                     "plays/40/bilevel/structure-0/spec.json"]  # `both` has it there
    assert [Spec.load(work / path).provenance["task"] for path in found] == [
        "films,plays", "films", "plays"]
    rows = lines(home / "across")
    scores = {(r["task"], r["method"], r["seed"]): r["score"] for r in rows}
    assert len(scores) == len(rows) == 12
    assert scores["films", "from", 1] == scores["films", "bilevel", 1]
    assert any("both structure 0: search on films,plays" in line for line in said)


def test_a_killed_grid_goes_on_to_the_same_lines(whole: Path, home: Path) -> None:
    words = ["grid", "grid.toml", "--data", ".", "--out", "killed", "--quiet"]
    # the head has 4 trainings of at most 8 steps; the 40th step is in a later cell
    done = cut_off(words, "SIGKILL train 40", home)
    assert done.returncode == -9, done.stderr
    before = (home / "killed/results.jsonl").read_text()
    assert before
    (home / "killed/results.jsonl").write_text(before + '{"task": "films", "bud')  # torn
    run_grid(home / "grid.toml", data=str(home), out=home / "killed", say=lambda line: None)
    assert (home / "killed/results.jsonl").read_text().startswith(before)
    assert lines(home / "killed") == lines(whole)
    assert lines(home / "killed", "sweep.jsonl") == lines(whole, "sweep.jsonl")
    assert not list((home / "killed").rglob("*.checkpoint.safetensors"))


def test_a_finished_grid_trains_nothing(
    whole: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("searchpet.session.Session.fit", None)
    before = lines(whole)
    run_grid(home / "grid.toml", data=str(home), out=whole, say=lambda line: None)
    assert lines(whole) == before


def test_the_table_has_mean_and_spread(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_table(whole)
    assert (whole / "table.md").read_text() == text
    scores = torch.tensor([r["score"] for r in lines(whole) if (r["method"], r["budget"]) == (
        "random:unit", 0.01)])
    assert f"| random:unit | {scores.mean():.4f} | {scores.std():.4f} | 4 |" in text
    assert main(["grid", "grid.toml", "--table", "--out", str(whole)]) == 0
    assert capsys.readouterr().out == text


def test_a_grid_does_not_mix_settings(whole: Path, home: Path) -> None:
    changed = home / "changed.toml"
    changed.write_text((home / "grid.toml").read_text().replace("steps = 8", "steps = 9"))
    with pytest.raises(InputError, match="steps was 8 in .* and is 9 now"):
        run_grid(changed, data=str(home), out=whole)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("methods", '["bilevle"]', "did you mean 'bilevel'"),
    ("methods", '["uniform:x"]', "uniform:NAME must be one of bias"),
    ("methods", '["head", "head"]', "must be distinct"),
    ("methods", '[{ name = "a", strategy = "bilevel", set = { x = 1 } }]', "alpha_lr"),
    ("methods", '[{ name = "bilevel", distill = true, recovery = { logit = 1 } }]', "'logits'"),
    ("methods", '[{ name = "bilevel", recovery = { hidden = 1 } }]', "must have a teacher"),
    ("methods", '[{ name = "random:unit", inherit = true }]', "learns nothing"),
    ("methods", '[{ name = "bilevel", inherit = true, on = "trec6" }]', "but has both"),
    ("methods", "[]", "at least 1 item"),
    ("budgets", '["2"]\nbudget = 3', "Extra inputs are not permitted"),
    ("budgets", '["x%"]', "budget must be a share"),
    ("taus", "[0]", "--tau must be a finite number > 0"),
    ("steps", "0", "--steps must be >= 1"),
    ("seeds", "oops", "must be TOML"),
])
def test_a_wrong_grid_is_one_line(
    home: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    text = "".join(f"{key} = {value}\n" if line.startswith(f"{key} =") else f"{line}\n"
                   for line in (home / "grid.toml").read_text().splitlines())
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_grid(tmp_path / "grid.toml")
    assert "\n" not in str(caught.value)


def test_the_grids_of_the_evidence_are_read() -> None:
    files = sorted((Path(__file__).parents[1] / "experiments").rglob("run.toml"))
    assert len(files) >= 10
    for file in files:
        assert read_grid(file).methods, file


def test_a_ledger_survives_torn_lines_and_names_bad_ones(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.jsonl", ("name",))
    ledger.add({"name": "x"})
    with ledger.path.open("a") as file:
        file.write('{"name": "y')
    assert set(ledger.rows()) == {("x",)}
    ledger.add({"name": "z"})
    assert set(ledger.rows()) == {("x",), ("z",)}
    ledger.path.write_text("oops\n")
    with pytest.raises(InputError, match="one result per line"):
        ledger.rows()


def test_a_claim_has_one_holder(tmp_path: Path) -> None:
    with claim(tmp_path) as mine, claim(tmp_path) as other:
        assert mine and not other
    with claim(tmp_path) as mine:
        assert mine
