"""The notebooks are those of their sources, ran to the end, and show nothing of a machine.

`.ci/full` runs them anew: pytest --nbmake notebooks/*.ipynb
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LARGEST = 1_500_000  # bytes: what a reader waits for
PLACE = re.compile(r"(?<![\w./])/(?:work|home|root|tmp|mnt|Users|opt|usr|var)/\S*")

every = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return found


def code(name: str) -> list[dict[str, Any]]:
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def test_there_are_six_and_each_has_its_source() -> None:
    assert [name[0] for name in NAMES] == list("123456")
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == NAMES


@every
def test_source_and_notebook_are_in_step(name: str) -> None:
    written = jupytext.read(FOLDER / f"{name}.py").cells
    shown = jupytext.read(FOLDER / f"{name}.ipynb").cells
    assert [(c.cell_type, c.source) for c in shown] == [
        (c.cell_type, c.source) for c in written], (
        f"run jupytext --to ipynb --execute {name}.py in notebooks/")


@every
def test_it_ran_to_the_end_without_a_complaint(name: str) -> None:
    cells = code(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    figures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert figures, "a notebook shows at least one figure"


@every
def test_it_names_no_place_on_a_machine_and_is_small(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < LARGEST
    outputs = [o for cell in code(name) for o in cell["outputs"]]
    for output in outputs:
        output.get("data", {}).pop("image/png", None)
    shown = json.dumps([*outputs, *(c["source"] for c in read(name)["cells"])])
    assert not PLACE.findall(shown)


@every
def test_links_lead_somewhere(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https://)([^)\s]+)\)", text):
        assert (FOLDER / target).is_file(), target
    for address in re.findall(r"https://arxiv\.org/\S+?(?=[)>])", text):
        assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", address), address


def test_the_rows_are_those_that_the_script_writes(tmp_path: Path) -> None:
    """And no row of validation or test has an adjective that was trained on."""
    names: dict[str, Any] = {"__name__": "made"}
    exec((FOLDER / "negation/make.py").read_text(encoding="utf-8"), names)
    seen: dict[str, set[str]] = {}
    for split, how in names["SPLITS"].items():
        lines = (FOLDER / f"negation/{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == names["rows"](*how)
        seen[split] = {json.loads(line)["text"].split()[-1] for line in lines}
    assert not seen["train"] & (seen["validation"] | seen["test"])


def test_members_of_your_own_still_fit(tmp_path: Path, tiny_folder: Path) -> None:
    """The last one's code on a tiny backbone: it is written against what every member is given."""
    lines = (FOLDER / "6_your_own.py").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("# %"))
    short = text.replace("searchpet.search(", f"searchpet.search(model={str(tiny_folder)!r}, "
                         ).replace("steps=40", "steps=14")
    assert short.count("steps=14") == 1 and short.count(str(tiny_folder)) == 1
    (tmp_path / "own.py").write_text(short, encoding="utf-8")
    found = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True,
                           text=True, check=False,
                           env={**os.environ, "PYTHONPATH": str(FOLDER.parent)})
    assert found.returncode == 0, found.stderr
    assert "1KB = 250 parameters" in found.stdout
    entries = json.loads((tmp_path / "runs/own/spec.json").read_text())["entries"]
    assert {entry["kind"] for entry in entries} <= {"skip", "bias"} and entries
