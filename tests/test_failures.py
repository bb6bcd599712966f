"""A full or read-only disk, and processes that end: one line that names the place and the way on.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from searchpet import failures, shelf
from searchpet.onnx_file import write_onnx
from searchpet.run import RunFolder
from searchpet.spec import Spec

FULL, LOCKED = (OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EROFS))


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is written arrives."""
    whole = Path.write_bytes

    def half(path: Path, content: bytes) -> None:
        whole(path, content[: len(content) // 2])
        raise FULL

    monkeypatch.setattr(Path, "write_bytes", half)
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: half(path, text.encode()))


def shipped() -> Spec:
    return Spec.load("searchpet:minilm-agreement-0.01")


@pytest.mark.parametrize("write", [
    lambda folder: shipped().save(folder / "a"),
    lambda folder: RunFolder(folder).write_text("a", "some text"),
    lambda folder: RunFolder(folder).write_bytes("a", b"some bytes"),
])
def test_a_full_disk_leaves_nothing_behind_and_is_named(
    write: Any, tmp_path: Path, no_room: None
) -> None:
    with pytest.raises(OSError) as caught:
        write(tmp_path)
    line = failures.explain(caught.value, ["vote", "a", "b"])
    assert line == (f"No space left on device: {tmp_path / 'a'}; free some disk space; what was "
                    "written before is kept")
    assert not list(tmp_path.iterdir())


def test_where_nothing_may_be_written_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: Any, **__: Any) -> None:
        raise OSError(LOCKED.errno, LOCKED.strerror, "another")

    for name in ("write_bytes", "write_text", "unlink"):
        monkeypatch.setattr(Path, name, locked)
    for write in (shipped().save, lambda path: RunFolder(path.parent).write_text(path.name, "")):
        with pytest.raises(OSError) as caught:
            write(tmp_path / "a.json")
        assert caught.value.filename == str(tmp_path / "a.json")


def test_a_shelf_that_is_full_keeps_no_half_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    monkeypatch.setattr("searchpet.shelf.shutil.copyfile", full)
    with pytest.raises(OSError) as caught:
        shelf.add("searchpet:minilm-agreement-0.01", str(tmp_path / "shelf"), "mine")
    line = failures.explain(caught.value, ["specs", "add"])
    assert line and "No space left on device: " in line and "shelf/.mine.partial/" in line
    assert not list((tmp_path / "shelf").iterdir())


def test_a_graph_that_does_not_fit_on_the_disk_is_no_fault_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.laws import families as tiny

    def full(*_: Any, **__: Any) -> None:
        raise FULL

    monkeypatch.setattr("torch.onnx.export", full)
    with pytest.raises(OSError, match="No space left"):
        write_onnx(tiny.model("bert"), tiny.inputs("bert"), tmp_path)


def test_what_libraries_in_rust_say_of_a_full_disk_is_understood() -> None:
    """safetensors has an error of its own, tokenizers a plain Exception."""
    for error in (Exception("No space left on device (os error 28)"),
                  RuntimeError("Error: I/O error: No space left on device (os error 28)")):
        line = failures.explain(error, ["export", "run"])
        assert line and line.startswith("No space left on device; free some disk space")
    assert failures.explain(Exception("a bug (os error)"), []) is None


@pytest.mark.parametrize(("world", "here", "words"), [
    ("2", "2", "torchrun --nproc-per-node 2 -m searchpet train run --resume"),
    ("4", "2", "torchrun ... -m searchpet train run --resume"),
    ("1", "1", "searchpet train run --resume"),
])
def test_several_processes_go_on_as_several(
    world: str, here: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", here), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert failures.continuation(["train", "run"]) == f"; to continue: {words}"
