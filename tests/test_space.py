"""Spaces: rules and selectors, units and prices, and an error that names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.site import Site
from searchpet.space import Space, build_space
from searchpet.spacefile import Rule, Select, read_space, space_names
from tests.laws import families as tiny


@pytest.fixture(scope="module")
def sites() -> tuple[Site, ...]:
    return discover(tiny.model("bert"))


@pytest.fixture(scope="module")
def both() -> tuple[Site, ...]:
    """T5: an encoder and a decoder."""
    return discover(tiny.model("t5"))


def chosen(sites: tuple[Site, ...], kind: str = "bias", **select: Any) -> set[tuple[str, int]]:
    placed = Space("test", sites, [tiny.rule(kind, **select)]).placements
    return {(p.site.role, p.site.layer) for p in placed}


# --- selectors ---


def test_a_rule_applies_wherever_its_kind_fits(sites: tuple[Site, ...]) -> None:
    assert chosen(sites, "lora") == {(s.role, s.layer) for s in sites if s.form == "linear"}
    assert chosen(sites, "adapter") == {(s.role, s.layer) for s in sites if s.form == "block"}


def test_roles_are_globs(sites: tuple[Site, ...]) -> None:
    assert {r for r, _ in chosen(sites, role="attention.*")} == {
        "attention.query", "attention.key", "attention.value", "attention.output"}
    assert {r for r, _ in chosen(sites, role=["*.in", "norm.ffn"])} == {"ffn.in", "norm.ffn"}
    assert {r for r, _ in chosen(sites, form="norm")} == {
        "norm.embedding", "norm.attention", "norm.ffn"}


def test_parts_and_paths_are_globs(both: tuple[Site, ...]) -> None:
    only = Space("test", both, [tiny.rule("lora", part="decoder")]).placements
    assert {p.site.part for p in only} == {"decoder"}
    one = Space("test", both, [tiny.rule("lora", path="*.encoder.block.1.*.q")]).placements
    assert [p.site.path for p in one] == ["transformer.encoder.block.1.layer.0.SelfAttention.q"]


@pytest.mark.parametrize(("layers", "expected"), [
    ("0", {0}), ("1", {1}), ("0-1", {0, 1}), ("1-9", {1}), ("first 1", {0}), ("first 9", {0, 1}),
    ("last 1", {1}), ("last 2", {0, 1}), ("", {-1, 0, 1}), ("first 50%", {0}), ("last 50%", {1}),
    ("last 100%", {0, 1}), ("0%-50%", {0}), ("40%-80%", {1}),
])
def test_layers_are_a_number_a_range_or_an_end(
    layers: str, expected: set[int], sites: tuple[Site, ...]
) -> None:
    assert {layer for _, layer in chosen(sites, layers=layers)} == expected


def test_the_last_layers_of_each_stack_count_with_the_norm_after_them(
    both: tuple[Site, ...]
) -> None:
    last = Space("test", both, [tiny.rule("scale", layers="last 1", form="norm")]).placements
    assert {(p.site.part, p.site.layer) for p in last} == {
        (part, layer) for part in ("encoder", "decoder") for layer in (1, 2)}


# --- units ---


@pytest.mark.parametrize("grain", ["module", "atom", "channel", "layer", "role"])
def test_units_costs_owners_and_firsts_agree(grain: str, sites: tuple[Site, ...]) -> None:
    rules = [tiny.rule("lora", grain, {"rank": 3}), tiny.rule("scale", grain)]
    space = Space("test", sites, rules)
    assert space.total == sum(
        3 * (p.site.d_in + p.site.d_out) if p.kind == "lora" else p.site.d_out
        for p in space.placements)
    assert sorted(set(space.unit.tolist())) == list(range(len(space)))
    for unit in range(len(space)):
        where = int((space.unit == unit).nonzero()[0])
        owner = space.placements[int(space.owner[unit])]
        assert owner.start + int(space.first[unit]) == where
        assert owner.start <= where < owner.start + owner.width


def test_a_tied_unit_costs_all_its_coordinates(sites: tuple[Site, ...]) -> None:
    space = Space("test", sites, [tiny.rule("lora", "role", role="attention.query")])
    assert space.cost.tolist() == [2 * (16 + 16)]


def test_the_entries_of_a_choice_cost_what_the_choice_costs(sites: tuple[Site, ...]) -> None:
    space = Space("test", sites, tiny.every_kind(lora={"rank": 2}))
    per = {(p.site.path, p.site.role, p.kind): p for p in space.placements}
    prices = {
        key: int(space.cost[space.unit[p.start]]) for key, p in per.items()}  # all atoms alike
    for seed in range(5):
        keep = tiny.some(len(space), seed)
        entries = space.entries(keep)
        assert space.parameters(keep) == sum(
            prices[e.path, e.role, e.kind] * len(e.kept) for e in entries)
        assert sum(len(e.kept) for e in entries) == int(keep[space.unit].sum())
    assert space.entries(torch.zeros(len(space), dtype=torch.bool)) == ()


def test_building_a_space_draws_no_random_numbers(sites: tuple[Site, ...]) -> None:
    before = torch.get_rng_state()
    Space("test", sites, tiny.every_kind())
    assert torch.equal(torch.get_rng_state(), before)


# --- errors ---


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


LORA = 'description = "d"\n[[rule]]\nkind = "lora"\ngrain = "atom"\n'


def test_a_file_of_ones_own_builds(tmp_path: Path, sites: tuple[Site, ...]) -> None:
    text = LORA + 'options = {rank = 2}\nselect = {role = "ffn.in", layers = "last 1"}\n'
    space = build_space(toml(tmp_path, text), sites)
    assert [(p.site.role, p.site.layer, p.width) for p in space.placements] == [("ffn.in", 1, 2)]


@pytest.mark.parametrize(("text", "message"), [
    (LORA.replace("lora", "lorra"), "rule.0.kind: .*did you mean 'lora'"),
    (LORA.replace("atom", "atoms"), "rule.0.grain: .*did you mean 'atom'"),
    (LORA + 'select = {layers = "all"}', 'rule.0.select.layers: .*"3", "0-5", "first 2"'),
    (LORA + "select = {layers = 3}", "rule.0.select.layers"),
    (LORA + 'select = {roles = "x"}', "rule.0.select.roles: Extra inputs"),
    (LORA + 'select = {form = "conv"}', "rule.0.select.form.*'norm', 'block' or 'layer'"),
    (LORA + "ranks = 2", "rule.0.ranks: Extra inputs"),
    (LORA + "options = {rank = [1]}", "rule.0.options"),
    (LORA + "[share]\nbias = 0.5", "share must name a kind of the rules, but got 'bias'"),
    (LORA + "[share]\nlora = 0", r"share.lora must be in \(0, 1\], but got 0"),
    (LORA + '[[rule]]\nkind = "bias"\ngrain = "channel"\n[share]\nlora = 0.7\nbias = 0.4',
     "shares must add up to at most 1"),
    ('description = "d"\nrules = []', "rule: Field required"),
    ('description = "d"\nrule = []', "rule: "),
    ('[[rule]]\nkind = "lora"\ngrain = "atom"', "description: Field required"),
    ("description =", "must be TOML"),
    ("", "description: Field required"),
])
def test_a_wrong_file_is_one_line_with_file_and_key(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_space(toml(tmp_path, text))
    assert "\n" not in str(caught.value) and "mine.toml" in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    (LORA + "options = {rnk = 2}", "option of kind lora must be .*did you mean 'rank'"),
    (LORA + "options = {rank = 0}", "kind lora: rank must be in"),
    (LORA + "options = {alpha = nan}", "kind lora: alpha must be"),
    (LORA + LORA.replace('description = "d"', ""), "two rules put lora on bert"),
    (LORA + 'select = {role = "nothing.*"}', r"rule 0 \(lora\) matches none"),
    (LORA + 'select = {layers = "7"}', r"rule 0 \(lora\) matches none"),
    (LORA + 'select = {layers = "3-1"}', r"rule 0 \(lora\) matches none"),
    (LORA + 'select = {form = "norm"}', r"rule 0 \(lora\) matches none"),
])
def test_a_rule_that_does_not_work_here_is_one_line(
    text: str, message: str, tmp_path: Path, sites: tuple[Site, ...]
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_space(toml(tmp_path, text), sites)
    assert "\n" not in str(caught.value)


def test_an_unknown_space_lists_those_that_are() -> None:
    with pytest.raises(InputError, match="space must be one of .*did you mean 'nano'"):
        read_space("nanno")
    with pytest.raises(InputError, match=r"absent\.toml does not"):
        read_space("absent.toml")
    assert "nano" in space_names()


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="must be TOML"):
        read_space(str(path))


def test_rules_are_values() -> None:
    assert Rule(kind="lora", grain="atom") == Rule(kind="lora", grain="atom", select=Select())
