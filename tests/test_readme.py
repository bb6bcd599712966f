"""The README's snippets run and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from searchpet.source import DEFAULT, locate

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


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
    lines = re.findall(r"^    (?:.*&& )?(searchpet .*?)(?:\s+#.*)?$", README, re.MULTILINE)
    lines += re.findall(r"`(searchpet [a-z]+ [^`|]*)`", README)
    assert len(lines) > 7
    for line in lines:
        name, *words = shlex.split(line)[1:]
        verb = command.commands[name]  # type: ignore[attr-defined]
        words = [w if w != "SPEC" else "spec.json" for w in words]
        verb.make_context(name, words, resilient_parsing=False)
