"""The lines on the error page are those that are really printed."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sqlalchemy.exc import OperationalError

from searchpet import InputError, cli, failures
from searchpet.device import EMULATED
from searchpet.merge import merge
from searchpet.once import _in_vain
from searchpet.removal import removable
from searchpet.run import StageLoop
from tests.docsplace import furnish

PAGE = (Path(__file__).parents[1] / "docs/guide/errors.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (searchpet .*)\n(error: .*)$", PAGE, re.MULTILINE)
QUOTED = re.findall(r"^```text\n(.*)\n```$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[None]:
    """The folder that the page speaks of, and no network."""
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no network")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("errors"))
        patch.delenv("SEARCHPET_DATA", raising=False)
        patch.setattr(huggingface_hub, "snapshot_download", refuse)
        patch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
        furnish(Path.cwd(), tiny_folder)
        yield
    torch.set_num_threads(threads)


def as_said(quoted: str, said: str) -> bool:
    """Whether a line was said, with anything where the page has an ellipsis."""
    return re.fullmatch(".*".join(map(re.escape, quoted.split("…"))), said) is not None


def test_every_command_of_the_page_has_its_line() -> None:
    assert len(COMMANDS) == len(re.findall(r"^\$ ", PAGE, re.MULTILINE)) > 25


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("command", "line"), COMMANDS)
def test_a_command_says_what_the_page_quotes(
    command: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(shlex.split(command)[1:])
    said = capsys.readouterr().err.splitlines()
    assert code == cli.WRONG
    assert as_said(line, said[-1]), said[-1]


def _said() -> list[str]:
    """What is said where no command can be made to fail, in the order of the page."""
    loop = StageLoop(None, "train", 300, 0, torch.Generator())
    loop._step = 37
    with pytest.raises(InputError) as not_finite:
        loop.report(loss=float("nan"))
    row = {"start_score": 0.5012, "validation_score": 0.4812}
    search = ["search", "--out", "runs/mine"]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/mine/delta.safetensors")
    lost = OperationalError("select", {}, Exception("connection to server was lost"))
    model = torch.nn.Linear(2, 2)
    model.config = type("Config", (), {"model_type": "fnet"})()  # type: ignore[assignment]
    with pytest.raises(InputError) as unmerged:
        merge(model)
    return [
        f"error: {not_finite.value}", f"warning: {_in_vain(object(), row)[0]}",  # type: ignore[arg-type]
        f"warning: {EMULATED}", f"error: {failures.explain(MemoryError(), search)}",
        f"error: {failures.explain(full, search)}",
        f"error: {failures.explain(lost, ['tune', '--out', 'runs/tuned'])}",
        str(removable(model)), str(unmerged.value),
    ]


def test_the_other_lines_are_said_so() -> None:
    said = _said()
    assert len(QUOTED) == len(said)
    for quoted, line in zip(QUOTED, said, strict=True):
        assert as_said(quoted, line), line
