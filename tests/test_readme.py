"""The README's snippets run and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from searchpet.source import DEFAULT, locate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    short = snippet.replace("steps=300", "steps=2, batch_size=4, controls=0, max_length=16")
    short = short.replace('task="agreement", seed=1', 'task="agreement", seed=1, steps=1')
    assert short.count("steps=") == 2
    # what the reader takes from the hub, the test takes from the offline copy
    short = short.replace(f'from_pretrained("{DEFAULT}")',
                          f'from_pretrained({str(locate(DEFAULT).folder)!r})')
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(short, "README.md", "exec"), names)
    assert names["spec"].hash == names["found"].spec.hash  # type: ignore[attr-defined]
    assert (tmp_path / "runs/again/result.json").is_file()
    assert hasattr(names["model"], "searchpet")


def test_every_command_line_parses() -> None:
    from searchpet.cli import app

    command = get_command(app)
    guides = (ROOT / "docs/guide").glob("*.md")
    text = "\n".join([README, *(page.read_text(encoding="utf-8") for page in guides)])
    lines = re.findall(r"^    (?:.*&& )?(searchpet .*?)(?:\s+#.*)?$", text, re.MULTILINE)
    lines += re.findall(r"`(searchpet [a-z]+ [^`|]*)`", README)
    assert len(lines) > 40
    for line in lines:
        name, *words = shlex.split(line)[1:]
        verb = command.commands[name]  # type: ignore[attr-defined]
        words = [w if w != "SPEC" else "spec.json" for w in words]
        verb.make_context(name, words, resilient_parsing=False)


MEASURED = {  # a row of the README -> the method that a table of experiments/ has it of
    "full fine-tuning": "full", "found by default": "default", "S3PET, as a preset here": "s3pet",
    "found, trained from the start": "bilevel:fresh",
    "norms, from the last layer down": "uniform:norm",
    "single channels drawn at random": "random:unit", "LoRA on query and value":
    "uniform:lora_qv", "full fine-tuning, nothing removed": "full",
    "PET first, then prune": "pet_first", "prune first, then PET": "prune_first",
    "one search for both": "joint", "APT-like search": "apt", "pruned by magnitude": "magnitude",
    "both drawn at random": "random:unit", "layers dropped from the top": "layer_drop:top"}


@pytest.mark.parametrize(("place", "tasks", "rows"), [
    ("equal_budget", ["agreement", "trec6"], 7), ("prune", ["trec6"], 8)])
def test_a_score_is_the_one_that_was_measured(place: str, tasks: list[str], rows: int) -> None:
    """Every row of the README's tables, mean and spread of each task, stands in the table that its
    command writes.
    """
    command = f"experiments/{place}/run.toml"
    part = README.split("## What was measured")[1].split("## ")[0].split(command)[1].split(
        "searchpet grid")[0]
    said = [[cell.strip(" *") for cell in line.split("|")[1:-1]]
            for line in part.splitlines() if re.match(r"\| .*\| 0\.\d{3} \|", line)]
    assert len(said) == rows
    table = (ROOT / "experiments" / place / "table.md").read_text(encoding="utf-8")
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    for name, *cells in said:
        for i, task in enumerate(tasks):
            (row,) = [r for r in found if r[0].startswith(task) and MEASURED[name] in r]
            after = row.index(MEASURED[name]) + 1
            numbers = map(float, row[after:after + 2])
            for text, number in zip(cells[2 * i:2 * i + 2], numbers, strict=True):
                assert abs(float(text) - number) < 0.00051, name  # rounded
            for trained in cells[2 * len(tasks):]:  # one number, or one for each task
                assert trained.split(" / ")[i if " / " in trained else 0] in row, name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https://)([^)\s]+)\)", README):
        assert (ROOT / target).is_file(), target
