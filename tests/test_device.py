"""On an accelerator nothing in a step's loop asks for a number; on the CPU everything may."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import searchpet
from searchpet import budget, catalog, cli, run
from searchpet.budget import shift
from searchpet.device import free, has_bf16, sent
from searchpet.errors import InputError
from searchpet.run import StageLoop
from tests.laws import families as tiny
from tests.laws.problems import classified

COUNTS = "/torch/optim/"  # an optimizer's steps are counted on the CPU
OURS = str(Path(searchpet.__file__).parent)
# what an accelerator cannot answer before it has come to it
LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2"}


class Watch(TorchDispatchMode):
    """Counts looks at values that the package's own code takes, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.seen = 0, Counter[tuple[int, str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in LOOKS:
            frame, through = sys._getframe(1), ""
            while "/torch/" in (name := frame.f_code.co_filename) and frame.f_back:
                frame, through = frame.f_back, through + name
            if name.startswith(OURS) and COUNTS not in through:
                self.seen[self.step, f"{frame.f_code.co_name} {frame.f_lineno}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all tensors were on an accelerator."""
    for room in (budget, run):
        monkeypatch.setattr(room, "free", lambda tensor: False)


def looks(strategy: str, steps: int = 9, **more: Any) -> Watch:
    given, watch = classified(tiny.every_kind(), 300, steps=steps), Watch()
    plain = given.loop

    def loop(steps: int, **state: Any) -> StageLoop:
        made: StageLoop = plain(steps, **state)
        made.folder, made.every = None, 1e9
        made.listener = lambda event: setattr(watch, "step", event.step)
        return made

    given.loop = loop
    with watch:
        catalog.get("strategies", strategy)(given, **more)
    return watch


@pytest.mark.parametrize(("strategy", "more"), [
    ("bilevel", {}), ("bilevel", {"levels": 1, "rows": True}), ("progressive", {"rounds": 1})])
@pytest.mark.usefixtures("away")
def test_no_step_of_a_search_waits(strategy: str, more: dict[str, Any]) -> None:
    """Beside the first, the last, and each tenth, whose figures are read, and what is done once:
    `bilevel` sets prune units on their way, `progressive` switches units off in so many rounds.
    """
    watch = looks(strategy, **more)
    assert watch.step == 9
    assert not [name for step, name in watch.seen
                if 1 <= step <= 5 and not name.startswith("_start ")]
    assert watch.seen  # those steps' own


def test_the_watch_sees_what_is_asked() -> None:
    """The same on the CPU, where looks are free, and taken."""
    seen = {name.split()[0] for step, name in looks("bilevel").seen if 1 <= step <= 6}
    assert {"_newton", "shift"} <= seen


@pytest.mark.usefixtures("away")
def test_the_budget_holds_without_a_look() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n = int(torch.randint(2, 2000, (1,), generator=generator))
        share, tail, scale = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        cost = (1 / torch.rand(n, generator=generator, dtype=torch.float64)) ** (3 * tail)
        limit = 10 ** (-4 * share) * float(cost.sum())
        alpha = 10 ** (2 * scale) * torch.randn(n, generator=generator, dtype=torch.float64)
        p = shift(alpha, cost, limit)
        assert float((p * cost).sum()) == pytest.approx(limit, rel=1e-9)
    many = torch.randn(50_000, generator=generator, dtype=torch.float64)
    assert float(shift(many, torch.ones(50_000), 5.0).sum()) == pytest.approx(5, rel=1e-9)


@pytest.mark.usefixtures("away")
def test_all_gates_are_open_above_the_total_without_a_look() -> None:
    alpha = torch.tensor([-5.0, 0.0, 5.0], requires_grad=True)
    p = shift(alpha, torch.tensor([100, 13, 1]), 114)
    p.sum().backward()
    assert torch.equal(p, torch.ones(3).double()) and not alpha.grad.any()


def broken(loop: StageLoop, value: Tensor | None = None) -> None:
    """Steps of which the fifth has no loss; value counts them."""
    for step in loop:
        if value is not None:
            value += 1
        loop.report(loss=torch.tensor(1.0 if step < 4 else float("nan")))


@pytest.mark.usefixtures("away")
def test_a_loss_that_is_not_finite_is_noticed_at_the_next_look() -> None:
    loop = StageLoop(None, "search", 30, 0, torch.Generator())
    with pytest.raises(InputError, match="must stay finite, but step 9 of search gave nan"):
        broken(loop)


@pytest.mark.usefixtures("away")
def test_no_checkpoint_is_written_of_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    folder = run.RunFolder(tmp_path)
    value = torch.zeros(1)
    loop = StageLoop(folder, "search", 30, 0, torch.Generator(), state={"x": value}, every=0.0)
    with pytest.raises(InputError, match="must stay finite, but step 4 of search"):
        broken(loop, value)
    again = StageLoop(folder, "search", 30, 0, torch.Generator(), state={"x": value})
    assert next(iter(again)) == 4 and float(value) == 4


def test_what_is_sent_arrives() -> None:
    x: Tensor = torch.arange(3)
    assert free(x) and sent(x, torch.device("cpu")) is x
    assert sent(x, torch.device("meta")).device.type == "meta" and not free(x.to("meta"))


@pytest.mark.parametrize("units", [True, False])
def test_bf16_that_is_emulated_is_told_of(
        units: bool, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    class Ops:
        @staticmethod
        def _is_mkldnn_bf16_supported() -> bool:
            return units

    monkeypatch.setattr(torch.ops, "mkldnn", Ops)
    assert has_bf16(torch.device("cpu")) == units and has_bf16(torch.device("meta"))
    words = ["search", "-m", str(tiny_folder), "-t", "agreement", "--budget", "5%", "--no-train",
             "--steps", "1", "--batch-size", "2", "--device", "cpu", "--precision", "bf16",
             "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == (not units)
    assert units or "has none and takes many times as long" in said[0]
