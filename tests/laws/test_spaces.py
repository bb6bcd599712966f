"""Laws of every space file that comes with the package."""

from __future__ import annotations

import pytest
import torch

from searchpet.discover import discover
from searchpet.space import build_space
from searchpet.spacefile import read_space, space_names
from tests.laws import families as tiny


@pytest.mark.parametrize("name", space_names())
def test_every_space_says_what_it_is(name: str) -> None:
    assert len(read_space(name).description.split()) >= 3


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("name", space_names())
def test_every_space_builds_on_every_family(name: str, family: str) -> None:
    model = tiny.model(family)
    space = build_space(name, discover(model))
    assert len(space) + len(space.bulk) >= 1 and torch.equal(space.cost > 0, ~space.prunes)
    assert len(space.unit) == sum(p.width for p in space.placements)
    assert space.parameters(torch.ones(len(space), dtype=torch.bool)) == space.total
    assert {p.site.part for p in space.placements} <= {"encoder", "decoder"}


def test_the_papers_space_has_the_papers_units() -> None:
    model = tiny.model("bert")  # 2 blocks of 6 linears, 5 norms
    space = build_space("s3pet_mix", discover(model))
    kinds = [p.kind for p in space.placements]
    assert {k: kinds.count(k) for k in set(kinds)} == {
        "lora": 12, "bias": 12 + 5, "scale": 5, "lowrank_adapter": 4}
    assert len(space) == len(kinds)  # whole modules
    assert len(build_space("s3pet_lora", discover(model))) == 12


def test_the_papers_space_leaves_cross_attention_out() -> None:
    roles = {p.site.role for p in build_space("s3pet_mix", discover(tiny.model("t5"))).placements}
    assert not any(role.startswith("cross_attention") for role in roles)
