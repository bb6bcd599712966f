"""The searches on the pages of kinds and strategies run, on a small model and for few steps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from searchpet import cli
from searchpet.spec import Spec
from tests.commands import workplace

DOCS = Path(__file__).parents[1] / "docs"
SMALL = ["--model", "tiny", "--task", "films", "--steps", "4", "--batch-size", "8",
         "--max-length", "16", "--controls", "0", "--quiet"]
BUDGETS = {"sparse_adapter": "10%"}  # of what a tiny model has; its whole spaces are below others


def searches() -> Iterator[tuple[str, str]]:
    """(page, command) of every search."""
    for page in sorted([*DOCS.glob("kinds/*.md"), *DOCS.glob("strategies/*.md")]):
        for line in re.findall(r"^searchpet search .*$", page.read_text(encoding="utf-8"),
                               re.MULTILINE):
            yield page.relative_to(DOCS).as_posix(), line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """The current folder has `tiny`, `films`, and the space file that a page speaks of."""
    folder = tmp_path_factory.mktemp("examples")
    with workplace(folder, tiny_folder):
        text = (DOCS / "kinds/matrix.md").read_text(encoding="utf-8")
        (toml,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
        (folder / "sparse_updates.toml").write_text(toml)
        yield folder


def test_every_strategy_has_a_search_that_runs() -> None:
    pages = {page for page, _ in searches()}
    assert pages >= {f"strategies/{page.name}" for page in DOCS.glob("strategies/*.md")
                     if page.stem != "index"}


@pytest.mark.parametrize(("page", "command"), list(searches()))
def test_a_search_of_a_page_runs(page: str, command: str, place: Path, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    strategy = words[words.index("--strategy") + 1] if "--strategy" in words else "bilevel"
    budget = BUDGETS.get(strategy, "60%")
    out = tmp_path / "run"
    assert cli.main([*words, *SMALL, "--budget", budget, "--out", str(out)]) == 0
    spec = Spec.load(out)
    assert spec.provenance["strategy"] == strategy
    assert spec.entries
