"""What a search has learned, as the start of a training: the same function, at the size left."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import searchpet
from searchpet import cli, inherit, report, session
from searchpet.apply import apply, trained_tensors, write_tensors
from searchpet.backbone import config_hash
from searchpet.discover import discover
from searchpet.engine import search
from searchpet.limits import Limits
from searchpet.pruning import Prune, keep_of
from searchpet.recall import command_of
from searchpet.run import RunFolder
from searchpet.space import Space
from searchpet.spec import BackboneId, BudgetUse, Spec
from searchpet.supernet import Supernet
from tests.commands import cut_off, workplace
from tests.laws import families as tiny
from tests.test_pruning import spec_for

JOB = ["search", "--model", "tiny", "--task", "films", "--budget", "2%", "--steps", "10",
       "--batch-size", "8", "--max-length", "16", "--tau", "0.5", "--controls", "0", "--quiet"]
PRUNED = ["--keep-flops", "60%"]
KINDS = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel"),
         tiny.rule("scale", "module"), tiny.rule("adapter", "atom", {"bottleneck": 2}),
         tiny.rule("lowrank_adapter")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with a task and a backbone."""
    folder = tmp_path_factory.mktemp("inherit")
    with workplace(folder, tiny_folder):
        yield folder


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt_neox", "t5"])
@pytest.mark.parametrize("share", ["40%", "70%", ""])
def test_inherited_deltas_compute_what_the_supernet_did(family: str, share: str) -> None:
    """Under the kept gates, masked and removed; with nothing pruned as well."""
    net_model, start = tiny.model(family), tiny.model(family)
    space = Space("test", discover(net_model), [*KINDS, *(
        tiny.every_mask(neurons={"most": 6, "multiple": 2}) if share else [])])
    keep = keep_of(Prune("flops", share), net_model, space) if share else None
    limits = Limits(space, space.total // 2, keep)
    head = tiny.head_of(net_model)
    net = Supernet(net_model, space, head, 0)
    tiny.perturb(net.grafts.deltas.parameters(), 0.3, 1)
    tiny.perturb(net.head, 0.3, 2)
    chosen = limits.fill(torch.rand(len(space), generator=torch.Generator().manual_seed(3)))
    spec = (spec_for(start, limits, chosen) if keep else plain_spec(start, limits, chosen))
    net.z = chosen.float()
    batch = tiny.inputs(family)
    expected = tiny.logits(net_model, batch)
    tensors = inherit.inherited(net, spec) | {
        f"head/{n}": p.detach() for n, p in net_model.named_parameters() if n in head}
    net.remove()
    for remove in (False, True) if share else (False,):
        model = tiny.model(family)
        apply(model, spec, head=head, remove=remove)
        fresh = tiny.logits(model, batch)
        write_tensors(model, head, tensors, "test")
        torch.testing.assert_close(tiny.logits(model, batch), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(fresh, expected, atol=1e-2)
        own = trained_tensors(model, head)
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in tensors.items()}


def plain_spec(model: Any, limits: Limits, chosen: torch.Tensor) -> Spec:
    """A spec that prunes nothing."""
    used, count = limits.parameters(chosen), sum(p.numel() for p in model.parameters())
    return Spec(
        backbone=BackboneId(name="tiny", revision=None, config_hash=config_hash(model.config),
                            parameters=count), entries=limits.entries(chosen),
        budget=BudgetUse(text=str(used), limit=used, used=used, slack=0, denominator=count))


@pytest.mark.parametrize("words", [
    ["--strategy", "bilevel"], ["--strategy", "bilevel", *PRUNED],
    ["--strategy", "prune_first", *PRUNED], ["--strategy", "pet_first", *PRUNED],
    ["--strategy", "apt", *PRUNED],
    ["--strategy", "prune_first", "--keep-weights", "60%", "--masks", "prune/weights"],
], ids=lambda given: " ".join(given) if isinstance(given, list) else str(given))
def test_the_training_begins_where_the_search_ended(
    home: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 0 of the real command: the model that trains against the supernet's own logits."""
    seen: dict[str, torch.Tensor] = {}
    batch = {"input_ids": torch.arange(5, 29).view(3, 8)}
    kept: list[torch.Tensor] = []
    original_fill, remove, fit = Limits.fill, Supernet.remove, session.fit

    def fill(self: Limits, *args: Any, **options: Any) -> torch.Tensor:
        kept.append(original_fill(self, *args, **options))
        return kept[-1]

    def at_the_end(net: Supernet) -> None:
        net.z = kept[-1].float()  # the last choice is the structure
        seen["search"] = tiny.logits(net.model.eval(), batch)
        remove(net)

    def first(model: Any, *args: Any, **more: Any) -> Any:
        seen["training"] = tiny.logits(model.eval(), batch)
        return fit(model, *args, **more)

    monkeypatch.setattr(Limits, "fill", fill)
    monkeypatch.setattr(Supernet, "remove", at_the_end)
    monkeypatch.setattr(session, "fit", first)
    for name, more in (("inherited", ["--inherit"]), ("fresh", ["--fresh"])):
        assert cli.main([*JOB, *words, *more, "--out", str(tmp_path / name)]) == 0
        same = torch.allclose(seen["training"], seen["search"], rtol=1e-4, atol=1e-4)
        assert same == (name == "inherited")
    one, other = tmp_path / "inherited", tmp_path / "fresh"
    assert (one / inherit.FILE).read_bytes() == (other / inherit.FILE).read_bytes()
    assert Spec.load(one).hash == Spec.load(other).hash


def test_what_is_inherited_is_a_delta_file(home: Path) -> None:
    """Renamed it loads as a run: the structure with what its search has learned, untrained."""
    assert cli.main([*JOB, *PRUNED, "--out", "run"]) == 0
    learned, trained = (load_file(f"run/{name}.safetensors") for name in ("inherit", "delta"))
    assert {n: t.shape for n, t in learned.items()} == {n: t.shape for n, t in trained.items()}
    assert any(not torch.equal(t, trained[n]) for n, t in learned.items())
    Path("run/inherit.safetensors").rename("run/delta.safetensors")
    model = searchpet.load("run")
    own = model.searchpet.tensors()
    assert own and all(torch.equal(t, learned[n]) for n, t in own.items())


def test_an_inherited_training_survives_a_kill(home: Path) -> None:
    words = [*JOB, *PRUNED, "--inherit"]
    assert cli.main([*words, "--out", "whole"]) == 0
    killed = cut_off([*words, "--out", "cut"], "SIGKILL train 5", home)
    assert killed.returncode == -9, killed.stderr
    assert cli.main([*words, "--out", "cut", "--resume"]) == 0
    for name in ("delta", "inherit"):
        assert Path(f"cut/{name}.safetensors").read_bytes() == Path(
            f"whole/{name}.safetensors").read_bytes()


def test_data_and_rates_are_those_of_a_fresh_training(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    fit = session.fit

    def noted(model: Any, groups: Any, batches: Any, *args: Any, **more: Any) -> Any:
        seen.append([[g["lr"] for g in groups], [batches[i] for i in range(10)]])
        return fit(model, groups, batches, *args, **more)

    monkeypatch.setattr(session, "fit", noted)
    common = {"model": "tiny", "task": "films", "budget": "2%", "steps": 6, "batch_size": 8,
              "max_length": 16, "controls": 0}
    for name in (False, True):
        search(**common, inherit=name, out=f"same-{name}")  # type: ignore[arg-type]
    (rates, batches), (other, others) = seen
    assert rates == other
    for one, two in zip(batches, others, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_controls_start_afresh_and_settings_remember(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for w in JOB if w not in ("--controls", "0")]
    assert cli.main([*words, "--inherit", "--out", "with"]) == 0
    assert RunFolder("with").has("inherit.safetensors")
    assert not list(Path("with/controls").rglob("inherit.safetensors"))
    assert json.loads(Path("with/settings.json").read_text())["inherit"] is True
    assert "the controls' from untrained ones." in capsys.readouterr().out
    values = json.loads(Path("with/result.json").read_text())
    said = " ".join(report.answer({"study": None, **values}))
    assert "2 controls under the same budget and with as long a training" in said
    assert "has learned for longer" in said
    assert cli.main([*words, "--fresh", "--out", "with", "--resume"]) == 2
    assert "inherit was True" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "begins"), [
    ([], True), (["--fresh"], False), (["--strategy", "s3pet"], False), (PRUNED, False),
    (["--strategy", "lagrangian"], False), (["--strategy", "lagrangian", "--inherit"], True),
], ids=lambda given: " ".join(given) if isinstance(given, list) else str(given))
def test_where_nobody_says_bilevel_alone_begins_with_what_it_has_learned(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], words: list[str], begins: bool,
) -> None:
    """And the command that a run remembers does the same."""
    starts, fit = [], session.Session.fit

    def train(self: Any, *args: Any, start: Any = None, **more: Any) -> Any:
        starts.append(start is not None)
        return fit(self, *args, start=start, **more)

    monkeypatch.setattr(session.Session, "fit", train)
    out = tmp_path / "run"
    assert cli.main([*JOB, *words, "--out", str(out)]) == 0
    command = command_of(RunFolder(out))
    assert command is not None
    assert ("--fresh" in command, "--inherit" in command) == (
        words == ["--fresh"], "--inherit" in words)
    assert cli.main([*shlex.split(command)[1:], "--quiet", "--out", str(tmp_path / "again")]) == 0
    assert starts == [begins, begins]
    values = json.loads((out / "result.json").read_text())
    assert values["inherited"] is begins
    said = capsys.readouterr().out
    assert said.count("Its training went on from the modules that the search had trained.") == (
        2 if begins else 0)


def test_several_budgets_are_trained_from_the_start(home: Path, tmp_path: Path) -> None:
    words = [*JOB, "--budget", "1%,2%", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["inherited"] is False


@pytest.mark.parametrize("strategy", ["random", "random:unit", "uniform:bias", "sparse_adapter"])
def test_a_strategy_that_learns_nothing_leaves_nothing(
    home: Path, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*JOB, "--strategy", strategy, "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--inherit"]) == 2
    said = capsys.readouterr().err
    assert f"but {strategy} learns nothing; drop --inherit" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert cli.main(words) == 0
    assert not (tmp_path / "run/inherit.safetensors").exists()
