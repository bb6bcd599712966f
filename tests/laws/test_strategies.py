"""Laws of every strategy, on a space of its own or on a mixed one: a new file is tested too."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from searchpet import catalog
from searchpet.discover import discover
from searchpet.space import Space, build_space
from searchpet.spacefile import space_names
from searchpet.strategies import Ranking
from tests.laws import families as tiny
from tests.laws.problems import problem

MIXED = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel"),
         tiny.rule("scale", "module", form="norm"), tiny.rule("lowrank_adapter")]


def cases() -> list[tuple[str, str]]:
    """(strategy, variant): a strategy's spaces name its variants; `random` has two."""
    own = [name.split("/") for name in space_names() if "/" in name]
    return [
        (name, variant) for name in catalog.names("strategies")
        for variant in [v for s, v in own if s == name] or
        (["module", "unit"] if name == "random" else [""])
        if not special(name)  # their laws are in test_pruning and test_sparse
    ]


def special(name: str) -> bool:
    """Whether a strategy works with prune masks alone, or keeps single parameters, not units."""
    module = importlib.import_module(f"searchpet.strategies.{name}")
    return hasattr(module, "PRUNES") or hasattr(module, "SPARSE")


every_strategy = pytest.mark.parametrize(
    ("name", "variant"), cases(), ids=[f"{n}:{v}" if v else n for n, v in cases()])


def space_for(name: str, variant: str, model: nn.Module) -> Space:
    if f"{name}/{variant}" in space_names():
        return build_space(f"{name}/{variant}", discover(model))
    return tiny.space(model, *MIXED)


def run(name: str, variant: str, limit: float, *, seed: int = 0, **more: Any,
        ) -> tuple[Ranking, Space, nn.Module]:
    """limit: a count, or a share of the space's total."""
    model = tiny.model("bert")
    space = space_for(name, variant, model)
    count = int(limit * space.total) if isinstance(limit, float) else limit
    asked = problem(model, space, count, seed=seed, **more)
    search = catalog.get("strategies", name)
    ranking = search(asked, **{"variant": variant} if variant else {})
    asked.net.remove()
    return ranking, space, model


@every_strategy
@pytest.mark.parametrize("limit", [0.02, 0.5, 1.0, 3.0])
def test_never_above_the_budget(name: str, variant: str, limit: float) -> None:
    ranking, space, _ = run(name, variant, limit, steps=2)
    assert ranking.keep.dtype == torch.bool and ranking.keep.shape == (len(space),)
    assert ranking.score.is_floating_point() and ranking.score.shape == (len(space),)
    assert bool(ranking.score.isfinite().all())
    assert ranking.keep.device.type == ranking.score.device.type == "cpu"
    assert space.parameters(ranking.keep) <= int(limit * space.total)
    assert limit < 1 or bool(ranking.keep.all())


@every_strategy
def test_a_budget_of_the_cheapest_unit_buys_at_most_that(name: str, variant: str) -> None:
    model = tiny.model("bert")
    cheapest = int(space_for(name, variant, model).cost.min())
    ranking, space, _ = run(name, variant, cheapest, steps=2)
    assert space.parameters(ranking.keep) in (0, cheapest)
    # whole modules only: a single channel is none
    assert ranking.keep.any() or (name, variant) == ("random", "module")


@every_strategy
def test_the_same_seed_keeps_the_same_units(name: str, variant: str) -> None:
    (first, _, _), (again, _, _) = (run(name, variant, 0.3, steps=3) for _ in range(2))
    assert torch.equal(first.score, again.score) and torch.equal(first.keep, again.keep)


@every_strategy
def test_the_backbone_is_untouched_and_no_hook_stays(name: str, variant: str) -> None:
    fresh, batch = tiny.model("bert"), tiny.inputs("bert")
    _, _, model = run(name, variant, 0.3, steps=3)
    head = tiny.head_of(model)
    for (label, p), old in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert label in head or torch.equal(p, old), label
    model.load_state_dict(fresh.state_dict())
    assert tiny.hooks(model) == tiny.hooks(fresh)
    assert torch.equal(tiny.logits(model, batch), tiny.logits(fresh, batch))


@every_strategy
def test_a_delta_that_no_example_reaches_is_no_error(name: str, variant: str) -> None:
    model = tiny.model("bert")
    space = space_for(name, variant, model)
    asked = problem(model, space, space.total // 3)
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    search = catalog.get("strategies", name)
    ranking = search(asked, **{"variant": variant} if variant else {})
    assert space.parameters(ranking.keep) <= space.total // 3


@pytest.mark.parametrize("name", catalog.names("strategies"))
def test_hyperparameters_are_keywords_with_plain_defaults(name: str) -> None:
    first, *rest = inspect.signature(catalog.get("strategies", name)).parameters.values()
    assert first.name == "problem"
    for p in rest:
        assert p.kind is p.KEYWORD_ONLY, p.name
        assert isinstance(p.default, bool | int | float | str), p.name  # what `--set` can write
    assert catalog.describe("strategies", name)


def test_random_draws_differ_by_seed_and_modules_stay_whole() -> None:
    (first, space, _), (other, _, _) = (run("random", "module", 0.4, seed=s) for s in (0, 1))
    assert not torch.equal(first.keep, other.keep)
    for number, placement in enumerate(space.placements):
        kept = first.keep[space.owner == number]
        assert placement.atoms or bool(kept.all()) or not bool(kept.any())


def test_uniform_gives_every_site_one_atom_before_any_gets_two() -> None:
    ranking, space, _ = run("uniform", "lora_all", 0.1)
    first, second = ranking.keep[space.first == 0], ranking.keep[space.first == 1]
    assert (bool(first.all()) and bool(second.any())) or not bool(second.any())


def test_uniform_fills_from_the_last_layer_down() -> None:
    ranking, space, _ = run("uniform", "bias", 0.6)
    layer = torch.tensor([p.site.layer for p in space.placements])[space.owner]
    assert int(layer[ranking.keep].min()) >= 0 and bool(ranking.keep[layer == layer.max()].all())
