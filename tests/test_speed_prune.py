"""The speed experiment for pruning runs, on a tiny random model; times are not looked at."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.commands import ROOT


@pytest.fixture(scope="module")
def prune() -> Iterator[ModuleType]:
    """The script as a module."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments/speed"))
        yield importlib.import_module("prune")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result(prune: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes."""
    out, said = tmp_path_factory.mktemp("speed"), io.StringIO()
    words = ["prune.py", "--quick", "--rounds", "1", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", words)
        prune.main()
    found: dict[str, Any] = json.loads((out / "prune.json").read_text())
    rows = [line for line in said.getvalue().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * len(found["inference"]) + 2 + 3
    return found


def test_structures_keep_what_they_say(result: dict[str, Any]) -> None:
    rows = result["inference"]
    assert [(row["structure"], row["keep"]) for row in rows] == [
        *(("mixed", s) for s in ("80%", "60%", "40%")),
        *(("even", s) for s in ("80%", "60%", "40%")), ("layers", "60%")]
    for row in rows:
        share = float(row["keep"].removesuffix("%")) / 100
        spec = row["flops"]["spec"]
        assert 0.5 * share < spec <= share
        assert row["flops"]["removed"] == pytest.approx(spec, rel=1e-9)
        assert row["flops"]["merged"] == pytest.approx(spec, rel=1e-9)
        assert row["masked_minus_removed"] < 1e-4 * max(1.0, row["largest_logit"])
    for kind in ("heads", "neurons", "sublayers", "layers"):
        assert min(row["kept"].get(kind, 1.0) for row in rows) < 1


def test_every_contender_is_timed(result: dict[str, Any]) -> None:
    figures = {"wall_min", "wall_median", "cpu_min", "cpu_median"}
    for row in result["inference"]:
        assert [(run["batch"], run["threads"]) for run in row["runs"]] == [(1, 1), (2, 1)]
        for run in row["runs"]:
            assert run["ms"].keys() == {"dense", "masked", "removed", "merged"}
            assert all(times.keys() == figures and min(times.values()) > 0
                       for times in run["ms"].values())
            for name, ratio in run["ratio"].items():
                for key in figures:
                    assert ratio[key] == pytest.approx(
                        run["ms"][name][key] / run["ms"]["dense"][key], abs=1e-3)
    (searched,) = result["search"]
    assert searched["phases"].keys() == {"warm-up", "search", "search, hard gates"}
    for phase in searched["phases"].values():
        assert phase["ms"].keys() == {"with", "without"}
        assert phase["ratio"].keys() == figures


def test_all_contenders_but_the_dense_one_are_one_function(prune: ModuleType) -> None:
    of = prune.base(quick=True)
    batch = {"input_ids": torch.randint(10, 900, (4, 12), generator=torch.manual_seed(0))}
    for name in prune.STRUCTURES:
        models = prune.contenders(of, *prune.choose(of, name, "60%"))
        with torch.no_grad():
            logits = {n: model(**batch).logits for n, model in models.items()}
        torch.testing.assert_close(logits["removed"], logits["masked"], rtol=1e-4, atol=1e-5)
        # what pruning changes is far above that; merged PET was small, but not silent
        assert float((logits["dense"] - logits["masked"]).abs().max()) > 1e-2
        assert 0 < float((logits["merged"] - logits["removed"]).abs().max())
        sizes = {n: sum(p.numel() for p in model.parameters()) for n, model in models.items()}
        assert sizes["merged"] == sizes["removed"] < sizes["masked"] == sizes["dense"]


def test_both_searches_have_the_same_pet_and_one_has_masks(prune: ModuleType) -> None:
    without, into = prune.searching(True, None, prune.QUICK)
    gated, _ = prune.searching(True, prune.Prune("flops", "60%"), prune.QUICK)
    assert not bool(without.space.prunes.any())
    assert bool(gated.space.prunes.any()) and gated.keep is not None
    assert gated.space.total == without.space.total and gated.limit == without.limit
    assert gated.keep.cost.dense == sum(prune.flops(prune.base(quick=True).model).values())
    prune.catalog.get("strategies", "bilevel")(without, **prune.PHASES["search"])
    assert len(into) == prune.BLOCK - 1
