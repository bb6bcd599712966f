"""Several processes give what one gives: losses and gradients, searches, trainings, errors."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from searchpet import cli, launch, processes
from searchpet.errors import InputError
from searchpet.spec import Spec
from searchpet.strategies import Problem
from tests.commands import DRIVER, ROOT, workplace

JOB = ["--model", "tiny", "--task", "films", "--steps", "24", "--batch-size", "7",
       "--max-length", "16", "--tau", "0.5", "--quiet"]  # 24 rows a half: the last batch has 3
SEARCH = ["search", *JOB, "--tau", "0.3", "--budget", "1%", "--controls", "1"]
PRUNE = ["search", *JOB, "--budget", "2%", "--keep-flops", "60%", "--controls", "0"]
TRAIN = ["train", "one/spec.json", *JOB, "--seed", "1"]
WEIGHTS = ["search", *JOB, "--budget", "2%", "--controls", "0", "--strategy", "prune_first",
           "--keep-weights", "50%", "--masks", "prune/weights"]

# what each process does: laws in small, then commands; what came of it in said-RANK.*
WORKER = """
import contextlib, io, json, os, sys
import torch
from searchpet import cli, launch, processes
from tests.test_processes import small

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
launch.start()
with processes.joined(rank, 2):
    torch.save(small(), f"said-{rank}.pt")
said = []
for words in json.loads(os.environ["JOBS"]):
    sys.argv, out, err = ["searchpet", *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    said.append([code, out.getvalue(), err.getvalue()])
with open(f"said-{rank}.json", "w") as file:
    json.dump(said, file)
"""


def small() -> dict[str, Any]:
    """Losses and gradients of a small model on batches of 5, 3 and 1 rows; what is agreed on."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight, unused, alpha = draw(3, 2), draw(2), draw(3)
    leaves = [t.requires_grad_() for t in (weight, unused, alpha)]
    found: dict[str, Any] = {"none": []}
    for count in (5, 3, 1):
        batch = {"x": draw(count, 3), "y": draw(count, 2), "task": torch.tensor(4)}
        z = torch.sigmoid(alpha)  # not a leaf: its gradient goes on to alpha

        def loss(batch: dict[str, Tensor], z: Tensor = z) -> Tensor:
            assert int(batch["task"]) == 4
            return ((batch["x"] * z) @ weight - batch["y"]).square().mean()

        value = processes.mean_loss(loss, batch, [z, weight, unused])
        slopes = torch.autograd.grad(2 * value, leaves, allow_unused=True)
        found[str(count)] = [value.detach(), slopes[0], slopes[2]]
        found["none"].append(slopes[1] is None)
        with torch.no_grad():
            found[f"value {count}"] = processes.mean_loss(loss, batch, [z, weight])
        rows = torch.sigmoid(alpha + draw(count, 3))  # gates of each row for itself
        net = SimpleNamespace(z=rows, trained=[weight])

        def gated(batch: dict[str, Tensor], net: SimpleNamespace = net) -> Tensor:
            return ((batch["x"] * net.z) @ weight - batch["y"]).square().mean()

        value = Problem.spread(SimpleNamespace(net=net, loss=gated), batch)  # type: ignore[arg-type]
        found[f"rows {count}"] = [value.detach(), *torch.autograd.grad(value, [weight, alpha])]
        assert net.z is rows
    found["average"] = processes.average(torch.tensor(float(processes.rank())))
    found["first"] = processes.from_first(processes.rank)
    return found


def port() -> str:
    """A free one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def environment(rank: int, at: str, **more: str) -> dict[str, str]:
    """What torchrun sets for one of two processes."""
    return {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": at,
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def pair(code: str, words: list[str], cwd: Path, **more: str) -> list[tuple[int, str]]:
    """Exit code and stderr of two processes that run `code` together."""
    at = port()
    both = [subprocess.Popen([sys.executable, "-c", code, *words], cwd=cwd, text=True,
                             env=environment(rank, at, **more), stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=1800)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    return [(p.returncode, err) for p, err in zip(both, said, strict=True)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with a task and a backbone that learns it soon and has no dropout."""
    still = tmp_path_factory.mktemp("backbones") / "still"
    shutil.copytree(tiny_folder, still)
    config = transformers.BertConfig.from_pretrained(
        tiny_folder, initializer_range=0.3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(still)
    folder = tmp_path_factory.mktemp("processes")
    with workplace(folder, still):
        yield folder


def logged(run: str) -> list[float]:
    """Losses of a run's search and training."""
    lines = Path(run, "log.jsonl").read_text().splitlines()
    return [loss for line in lines if (loss := json.loads(line).get("loss")) is not None]


def alone(words: list[str], out: str) -> None:
    """A command by this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["searchpet", *words])
        assert cli.main([*words, "--out", out]) == 0


@pytest.fixture(scope="module")
def together(home: Path) -> list[list[Any]]:
    """What two processes said to `jobs`, [code, stdout, stderr] each; first the runs by one."""
    for words, out in ((SEARCH, "one"), (PRUNE, "one-pruned"), (WEIGHTS, "one-weights"),
                       (TRAIN, "one-trained")):
        alone(words, out)
    jobs = [[*SEARCH, "--json", "--out", "two"], [*PRUNE, "--out", "two-pruned"],
            [*WEIGHTS, "--out", "two-weights"], [*TRAIN, "--out", "two-trained"],
            ["evaluate", "one"]]
    ends = pair(WORKER, [], home, JOBS=json.dumps(jobs))
    assert [code for code, _ in ends] == [0, 0], ends
    return [json.loads((home / f"said-{rank}.json").read_text()) for rank in (0, 1)]


def test_losses_and_gradients_are_those_of_the_whole_batch(
    home: Path, together: list[list[Any]]
) -> None:
    whole = small()
    for rank in (0, 1):
        found = torch.load(home / f"said-{rank}.pt", weights_only=True)
        for name in ("5", "3", "1", "value 5", "value 3", "value 1", "rows 5", "rows 3", "rows 1"):
            torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-6)
        assert found["none"] == whole["none"] == [True] * 3
        assert (float(found["average"]), found["first"]) == (0.5, 0)


@pytest.mark.parametrize("name", ["", "-pruned", "-weights", "-trained"])
def test_two_processes_find_and_train_what_one_does(
    home: Path, together: list[list[Any]], name: str
) -> None:
    one, two = (json.loads(Path(f"{run}{name}", "result.json").read_text())
                for run in ("one", "two"))
    assert two["spec_hash"] == one["spec_hash"]
    assert name or one["score"] > 0.7  # it has learned, so there is something to compare
    assert two["score"] == pytest.approx(one["score"], abs=1e-3)
    assert [c["score"] for c in two["controls"]] == pytest.approx(
        [c["score"] for c in one["controls"]], abs=1e-3)
    assert logged(f"two{name}") == pytest.approx(logged(f"one{name}"), abs=1e-4)
    # losses, not weights: a bias of all keys changes nothing, so Adam makes steps of its rounding
    assert load_file(f"two{name}/delta.safetensors").keys() == load_file(
        f"one{name}/delta.safetensors").keys()


def test_the_first_process_alone_writes_and_speaks(
    home: Path, together: list[list[Any]]
) -> None:
    first, second = together
    assert [code for code, _, _ in first] == [code for code, _, _ in second] == [0, 0, 0, 0, 2]
    assert json.loads(first[0][1])["score"] == json.loads(
        Path("two/result.json").read_text())["score"]
    assert all(out == "" for _, out, _ in second)
    errors = [err for said in together for _, _, err in said
              if err and not err.startswith("warning: training ended at")]
    assert errors == ["error: evaluate takes one process, but 2 were started; run it without "
                      "torchrun, which is for search and train\n"]
    names = [{str(file.relative_to(run)) for file in Path(run).rglob("*")
              if file.is_file() and file.name != "report.html"}  # off in this process
             for run in ("one", "two")]
    assert names[0] == names[1]
    assert len(logged("two")) == len(logged("one"))  # nobody else wrote


@pytest.mark.slow
def test_torchrun_starts_a_search(home: Path, together: list[list[Any]]) -> None:
    words = [*SEARCH[:-1], "0", "--out", "run"]
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         port(), "-m", "searchpet", *words], cwd=home, capture_output=True, text=True,
        check=False, timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stderr
    assert Spec.load("run").hash == Spec.load("one").hash
    assert Path("run/delta.safetensors").read_bytes() == Path(
        "two/delta.safetensors").read_bytes()
    assert found.stdout.count("bilevel") == 1


@pytest.mark.slow
def test_a_killed_group_continues_to_the_same_end(
    home: Path, together: list[list[Any]]
) -> None:
    words = [*SEARCH[:-1], "0", "--out", "cut"]
    killed = pair(DRIVER, words, home, SIGNAL="SIGKILL search 6")
    assert -9 in [code for code, _ in killed]
    assert Path("cut/search.checkpoint.safetensors").is_file()
    ended = pair(DRIVER, [*words, "--resume"], home, SIGNAL="SIGKILL never 0")
    assert [code for code, _ in ended] == [0, 0], ended
    assert Spec.load("cut").hash == Spec.load("two").hash
    assert Path("cut/delta.safetensors").read_bytes() == Path(
        "two/delta.safetensors").read_bytes()


ENTRY = """
import json, os, runpy, sys
sys.argv = ["searchpet", *sys.argv[1:], *json.loads(os.environ["MORE"])[int(os.environ["RANK"])]]
runpy.run_module("searchpet", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("more", "error"), [
    ([["--out", "films"]] * 2, "error: --out must be a new or empty folder"),
    ([["--out", "left"], ["--steps", "0"]], "error: --steps must be >= 1"),  # one goes, one waits
])
def test_wrong_input_is_said_once_and_ends_all(home: Path, more: Any, error: str) -> None:
    ended = pair(ENTRY, SEARCH, home, MORE=json.dumps(more))
    assert [code for code, _ in ended] == [2, 2], ended
    said = "".join(err for _, err in ended)
    assert said.startswith(error) and said.count("\n") == 1


def test_rows_are_shared_out() -> None:
    batch = {"x": torch.arange(5), "task": torch.tensor(1)}
    parts = []
    for rank in range(3):
        with processes.joined(rank, 3):
            own = processes.shard(batch)
            assert int(own["task"]) == 1
            parts.append(own["x"].tolist())
    assert parts == [[0, 3], [1, 4], [2]] and processes.rows(batch) == 5


def test_each_process_must_have_rows_and_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with processes.joined(1, 3):
        launch.check_rows(3)
        with pytest.raises(InputError, match="at least the number of processes, 3, but got 2"):
            launch.check_rows(2)
        with pytest.raises(InputError, match="a device each"):
            launch.device("cuda:0")
        assert launch.device("cpu") == torch.device("cpu")
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert launch.device("auto") == launch.device("cuda") == torch.device("cuda", 1)
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(InputError, match="has 2 and was given more processes"):
            launch.device("cuda")
    assert launch.device("cpu") == torch.device("cpu")


def test_one_process_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not launch.several() and launch.leader() and processes.first()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert launch.several() and not launch.leader()
