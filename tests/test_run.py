"""Run folders: files whole or not at all, and stages that continue to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from searchpet import catalog
from searchpet.errors import InputError
from searchpet.run import Event, RunFolder, StageLoop, pack, unpack
from tests.laws import families as tiny
from tests.laws.problems import problem

# --- files ---


def test_a_run_that_goes_on_writes_nothing_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a finished one can be shown where nothing may be written."""
    folder = RunFolder(tmp_path)
    folder.start({"a": 1}, resume=False)
    folder.write_json("result.json", {})
    monkeypatch.setattr(Path, "write_bytes", None)
    folder.start({"a": 1}, resume=True)
    with pytest.raises(InputError, match="must continue the same run"):
        folder.start({"a": 2}, resume=True)


class Killed(RuntimeError):
    """Stands for whatever ends a process in the middle."""


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("a.json", {"x": 1})
    folder.write_tensors("a.safetensors", {"t": torch.ones(2)})
    with pytest.raises(ValueError, match="JSON"):
        folder.write_json("a.json", {"x": float("nan")})

    def half(partial: Path) -> None:
        partial.write_text('{"x": ')
        raise Killed

    with pytest.raises(Killed):
        folder._replace("a.json", half)
    assert folder.read_json("a.json") == {"x": 1}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_tensors_and_metadata_round_trip(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    shared = torch.arange(6.0)
    tensors = {"a": shared, "b": shared[::2], "c": torch.ones((), dtype=torch.int64)}
    folder.write_tensors("t", tensors, {"what": "this"})
    found, metadata = folder.read_tensors("t")
    assert metadata == {"what": "this"}
    for name, t in tensors.items():
        assert torch.equal(found[name], t) and found[name].dtype == t.dtype


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100])
def test_a_damaged_or_absent_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for read, name in ((folder.read_json, "a.json"), (folder.read_tensors, "a.safetensors")):
        with pytest.raises(InputError, match=f"must hold {name}"):
            read(name)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name) as caught:
            read(name)
        assert "\n" not in str(caught.value)


def test_a_used_folder_is_refused_without_resume_and_continued_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start({"seed": 0, "set": {}}, resume=True)  # absent: starts
    folder.start({"seed": 1, "set": {}}, resume=False)  # nothing has come of it yet
    folder.start({"seed": 0, "set": {}}, resume=False)
    folder.write_json("spec.json", {})
    with pytest.raises(InputError, match="is not empty; add --resume"):
        folder.start({"seed": 0, "set": {}}, resume=False)
    folder.start({"seed": 0, "set": {}}, resume=True)
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").start({}, resume=False)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty" / "photo.jpg").write_text("x")
    (tmp_path / "empty" / "settings.json").unlink()
    with pytest.raises(InputError, match="holds other files"):
        RunFolder(tmp_path / "empty").start({}, resume=True)
    with pytest.raises(InputError, match="must be a folder"):
        RunFolder(tmp_path / "file").start({}, resume=True)


@pytest.mark.parametrize(("now", "key"), [
    ({"seed": 1, "tau": 0.1}, "seed"), ({"seed": 0, "tau": 0.2}, "tau"),
    ({"seed": 0}, "tau"), ({"seed": 0, "tau": 0.1, "more": 1}, "more"),
])
def test_resuming_with_other_settings_names_the_key(
    now: dict[str, Any], key: str, tmp_path: Path
) -> None:
    RunFolder(tmp_path).start({"seed": 0, "tau": 0.1}, resume=False)
    RunFolder(tmp_path).write_json("spec.json", {})
    with pytest.raises(InputError, match=f"{key} was .* and is .* now") as caught:
        RunFolder(tmp_path).start(now, resume=True)
    assert "\n" not in str(caught.value)


# --- state ---


def test_state_round_trips_through_flat_tensors() -> None:
    def state() -> dict[str, Any]:
        weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
        return {"alpha": torch.randn(4, requires_grad=True), "weights": weights,
                "learn": torch.optim.AdamW(weights, lr=0.1), "record": {"best": 1.5, "at": [1]}}

    saved = state()
    for p in saved["weights"]:
        p.grad = torch.randn(p.shape)
    saved["learn"].step()
    tensors, plain = pack(saved)
    assert all(isinstance(t, Tensor) for t in tensors.values())
    fresh = state()
    unpack(fresh, tensors, json.loads(json.dumps(plain)))
    assert fresh["record"] == saved["record"]
    assert torch.equal(fresh["alpha"], saved["alpha"])
    again, _ = pack(fresh)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], t) for name, t in tensors.items())


# --- loops ---


def loop(folder: RunFolder | None, steps: int, every: float = -1.0, **state: Any) -> StageLoop:
    """every < 0: a checkpoint after each step."""
    return StageLoop(folder, "train", steps, 0, torch.Generator(), state=state, every=every)


def trajectory(folder: RunFolder | None, steps: int, stop_at: int = -1) -> list[float]:
    """Train one matrix with AdamW and noise; die before the step `stop_at` is done."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4))
    learn = torch.optim.AdamW([weight], lr=0.1)
    record: dict[str, Any] = {"losses": []}
    stage = loop(folder, steps, weights=[weight], learn=learn, record=record)
    for step in stage:
        noise = torch.randn(4) + torch.rand(4, generator=stage.generator)
        loss = (weight @ noise).square().sum()
        if step == stop_at:
            raise Killed
        learn.zero_grad()
        loss.backward()
        learn.step()
        record["losses"].append(loss.item())
        stage.report(loss=loss)
    return [*record["losses"], *weight.flatten().tolist()]


@pytest.mark.parametrize("stop_at", range(6))
def test_an_interrupted_stage_continues_to_the_same_numbers(stop_at: int, tmp_path: Path) -> None:
    whole = trajectory(None, 6)
    folder = RunFolder(tmp_path)
    with pytest.raises(Killed):
        trajectory(folder, 6, stop_at)
    torch.manual_seed(99)  # another process has drawn other numbers
    assert trajectory(folder, 6) == whole
    assert trajectory(folder, 6) == whole  # killed after the last step


@pytest.mark.parametrize("name", [n for n in catalog.names("strategies")
                                  if n in ("bilevel", "s3pet")])
@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_interrupted_search_continues_to_the_same_ranking(
    name: str, stop_at: int, tmp_path: Path
) -> None:
    search = catalog.get("strategies", name)

    def run(folder: RunFolder | None, stop_at: int = -1) -> Any:
        model = tiny.model("bert").train()  # dropout draws numbers as well
        space = tiny.space(model, tiny.rule("lora"), tiny.rule("bias", "channel"))
        asked = problem(model, space, space.total // 4, steps=5, folder=folder, every=-1.0)
        loss, calls = asked.loss, iter(range(10**6))

        def fatal(batch: dict[str, Tensor]) -> Tensor:
            if next(calls) == stop_at * (1 if name == "bilevel" else 5):
                raise Killed
            return loss(batch)

        asked.loss = fatal
        return search(asked)

    whole = run(None)
    with pytest.raises(Killed):
        run(RunFolder(tmp_path), stop_at)
    assert (tmp_path / "search.checkpoint.safetensors").is_file()
    again = run(RunFolder(tmp_path))
    assert torch.equal(again.score, whole.score) and torch.equal(again.keep, whole.keep)


def test_a_stopped_stage_stays_stopped(tmp_path: Path) -> None:
    def taken() -> list[int]:
        stage = loop(RunFolder(tmp_path), 9, count=torch.zeros(1))
        steps = []
        for step in stage:
            steps.append(step)
            if step == 3:
                stage.stop()
        return steps

    assert taken() == [0, 1, 2, 3]
    assert taken() == []  # killed between the stop and the end of the stage


@pytest.mark.parametrize("paused", [False, True])
def test_a_stage_that_goes_on_knows_what_it_took(paused: bool, tmp_path: Path) -> None:
    """What was paused is counted by whoever paused it."""
    folder, clock = RunFolder(tmp_path), [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("searchpet.run.time.monotonic", lambda: clock[0])
        for part in (1, 2):  # dies twice, each time 3 s after its last checkpoint
            stage = loop(folder, 10)
            for step in stage:
                clock[0] += 10
                stage.report(loss=1.0)
                if paused and step == 2 * part - 1:
                    stage.pause()
                elif step == 2 * part:
                    break
            clock[0] += 3
        again = loop(folder, 10)
        assert next(iter(again)) == 4
    assert again.before == (0 if paused else 40)


def test_a_loss_that_is_not_finite_ends_the_stage_in_one_line() -> None:
    for value in (float("nan"), float("inf"), torch.tensor(float("-inf"))):
        stage = loop(None, 3)
        for _ in stage:
            with pytest.raises(InputError, match=r"step \d of train gave .*smaller --tau"):
                stage.report(loss=value)


def test_listeners_hear_of_every_step() -> None:
    heard: list[Event] = []
    stage = StageLoop(None, "search", 3, 0, torch.Generator(), heard.append)
    for step in stage:
        stage.report(loss=torch.tensor(float(step)), expected=2)
    assert [event.step for event in heard] == [1, 2, 3]
    assert all(e.stage == "search" and e.steps == 3 and e.rate > 0 for e in heard)
    assert heard[-1].left == 0 and heard[-1].figures == {"loss": 2.0, "expected": 2.0}


def test_seeds_of_stages_and_steps_differ() -> None:
    def draws(stage: str, seed: int) -> list[float]:
        return [float(torch.rand(())) for _ in StageLoop(None, stage, 4, seed, torch.Generator())]

    every = draws("search", 0) + draws("train", 0) + draws("train", 1)
    assert len(set(every)) == 12
    assert draws("search", 0) == every[:4]


def test_a_finished_stage_leaves_no_checkpoint(tmp_path: Path) -> None:
    stage = loop(RunFolder(tmp_path), 2, count=torch.zeros(1))
    list(stage)
    assert (tmp_path / stage.file).is_file()
    stage.finish()
    assert not (tmp_path / stage.file).exists()
