"""Knobs and tuning spaces: what an outer loop may turn, and what a search becomes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from searchpet.ask import Ask
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.knobs import ask_of, narrowed
from searchpet.pruning import Prune
from searchpet.settings import TAU
from searchpet.site import Site
from searchpet.space import Space
from searchpet.spacefile import SpaceFile, read_space, toml, tune_names
from searchpet.tunefile import Knob, TuneFile, read_tune
from tests.laws import families as tiny

BASE = SpaceFile(description="a base", rule=(
    tiny.rule("lora", "atom", {"rank": 1}), tiny.rule("bias", "channel"),
    tiny.rule("adapter", "atom", {"bottleneck": 2})))


@pytest.fixture(scope="module")
def sites() -> tuple[Site, ...]:
    return discover(tiny.model("bert"))


def placed(sites: tuple[Site, ...], **values: Any) -> list[tuple[str, str, int, dict[str, Any]]]:
    """(kind, role, layer, options) of what the knobs leave of BASE."""
    file = narrowed({k.replace("__", "."): v for k, v in values.items()}, BASE, sites)
    space = Space("test", sites, file.rule, file.share)
    return [(p.kind, p.site.role, p.site.layer, p.options) for p in space.placements]


def test_no_knobs_leave_the_base_as_it_is(sites: tuple[Site, ...]) -> None:
    before = Space("test", sites, BASE.rule)
    assert placed(sites) == [(p.kind, p.site.role, p.site.layer, p.options)
                             for p in before.placements]


def test_kinds_roles_and_layers_narrow_it(sites: tuple[Site, ...]) -> None:
    assert {kind for kind, *_ in placed(sites, kinds="lora+bias")} == {"lora", "bias"}
    found = placed(sites, roles="attention.*", layers="last 50%")
    assert {role.split(".")[0] for _, role, *_ in found} == {"attention"}
    assert {layer for _, _, layer, _ in found} == {1}


def test_options_go_to_the_roles_that_they_name(sites: tuple[Site, ...]) -> None:
    found = placed(sites, option__lora__rank=4, option__lora__rank__ffn=0,
                   option__lora__rank__attention__query=2)
    ranks = {role: options["rank"] for kind, role, _, options in found if kind == "lora"}
    assert ranks == {"attention.query": 2, "attention.key": 4, "attention.value": 4,
                     "attention.output": 4}
    assert any(kind == "bias" and role == "ffn.in" for kind, role, *_ in found)


def test_depths_are_switched_one_by_one(sites: tuple[Site, ...]) -> None:
    assert {layer for *_, layer, _ in placed(sites, depth__0=False, depth__1=True)} == {1}
    assert {layer for *_, layer, _ in placed(sites, depth__0=True, depth__1=True)} == {0, 1}


def test_shares_go_to_kinds_that_are_there(sites: tuple[Site, ...]) -> None:
    values = {"share.lora": 0.5, "share.bias": 0.0}
    assert narrowed(values, BASE, sites).share == {"lora": 0.5}
    assert narrowed({**values, "kinds": "bias+adapter"}, BASE, sites).share == {}
    assert narrowed({**values, "kinds": "lora"}, BASE, sites).share == {}


def test_a_narrowed_space_is_a_space_file(sites: tuple[Site, ...], tmp_path: Path) -> None:
    file = narrowed({"option.lora.rank": 3, "share.lora": 0.5, "layers": "last 50%"}, BASE, sites)
    path = tmp_path / "mine.toml"
    path.write_text(toml(file))
    assert read_space(str(path)) == file


def test_what_leaves_nothing_is_one_line(sites: tuple[Site, ...]) -> None:
    with pytest.raises(InputError, match="kinds=scale leave nothing of the base space"):
        narrowed({"kinds": "scale"}, BASE, sites)
    fixed = SpaceFile(description="d", rule=(tiny.rule("lora", layers="last 1"),))
    with pytest.raises(InputError, match="needs a base space whose rules select no layers"):
        narrowed({"layers": "first 50%"}, fixed, sites)


def ask(values: dict[str, Any], sites: tuple[Site, ...], **given: Any) -> Ask:
    return ask_of(values, BASE, Ask(**{"budget": "10%", **given}), sites, limit=1000)


def test_a_strategy_brings_its_own_settings(sites: tuple[Site, ...]) -> None:
    values = {"strategy": "bilevel", "bilevel.cold": 0.5, "robust.warmup": 0.1}
    found = ask(values, sites, set={"warmup": 0.2})
    assert (found.strategy, found.set) == ("bilevel", {"warmup": 0.2, "cold": 0.5})
    assert ask({"strategy": "random:unit"}, sites, set={"warmup": 0.2}).set == {}
    form = ask({"strategy": "uniform:bias", "kinds": "lora"}, sites)
    assert form.file is None
    assert form.named_space == "uniform/bias"


def test_spend_is_a_share_of_what_the_deltas_may_cost(sites: tuple[Site, ...]) -> None:
    assert ask({"spend": 0.25}, sites).budget == "250"
    assert ask({"spend": 1.0}, sites).budget == "10%"
    assert ask_of({"spend": 0.5}, BASE, Ask(count_head=True), sites, 1000, 66).budget == "566"


def test_pruning_is_turned_by_its_share_and_its_masks(sites: tuple[Site, ...]) -> None:
    assert ask({"keep_flops": 0.6}, sites).prune == Prune("flops", "60%", "prune/structured")
    assert ask({"keep_flops": 1.0}, sites).prune is None
    fixed = Prune("flops", "50%", "prune/structured")
    assert ask({"masks": "prune/layers"}, sites, prune=fixed).prune == Prune(
        "flops", "50%", "prune/layers")
    assert ask({}, sites, prune=fixed).prune == fixed


# --- tuning spaces ---

HEAD = 'description = "d"\n'


@pytest.mark.parametrize("name", tune_names())
def test_every_tuning_space_can_be_read_and_starts_with_the_defaults(
    name: str, sites: tuple[Site, ...]
) -> None:
    space = read_tune(name)
    assert 6 <= len(space.knob) <= 16
    assert len(space.description.split()) >= 3
    for start in space.starts():
        asked = ask_of(start, read_space(space.base), Ask(
            prune=Prune("flops", "60%") if name == "prune" else None), sites, 10_000)
        assert asked.strategy in (start.get("strategy"), "bilevel")
        if asked.file:
            asked.units(tiny.model("bert"))


def test_the_defaults_are_those_of_the_command_line() -> None:
    start = read_tune("default").starts()[0]
    assert start["strategy"] == "bilevel"
    assert start["tau"] == TAU
    assert start["kinds"] == "+".join(rule.kind for rule in read_space("nano").rule)
    assert start["option.lora.rank"] == 1
    assert (start["layers"], start["roles"]) == ("all", "*")


def test_what_does_not_count_is_not_turned() -> None:
    space = read_tune("default")
    starts = {str(start["strategy"]): set(start) for start in space.starts()}
    assert starts["uniform:bias"] == {"strategy", "tau"}
    assert "bilevel.cold" not in starts["random:unit"]
    assert "bilevel.cold" in starts["bilevel"]
    bias = space.settled({"kinds": "bias+scale"})
    assert "option.lora.rank" not in bias


def test_a_tuning_space_extends_another_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + 'extends = "default"\n[[knob]]\nname = "spend"\nlow = 0.1\nhigh = 1.0\n'
                    'default = 1.0\n[[first]]\nspend = 0.5\n')
    found, base = read_tune(str(path)), read_tune("default")
    assert found.knob[:-1] == base.knob
    assert found.base == base.base
    assert len(found.starts()) == len(base.starts()) + 1


@pytest.mark.parametrize(("value", "allowed"), [
    (1, True), (4, True), (5, False), (1.5, False), (True, False), ("1", False)])
def test_a_range_of_whole_numbers_takes_those_alone(value: Any, allowed: bool) -> None:
    assert Knob(name="option.lora.rank", low=1, high=4).allows(value) is allowed


KNOB = HEAD + "[[knob]]\n"
RANGE = "low = 0.1\nhigh = 1.0\n"


@pytest.mark.parametrize(("text", "message"), [
    (KNOB + 'name = "tauu"\n' + RANGE, "knob must be one of .*did you mean 'tau'"),
    (KNOB + 'name = "bilevel.heat"\n' + RANGE, "hyperparameter of bilevel must be one of"),
    (KNOB + 'name = "bilvel.cold"\n' + RANGE, "strategy must be one of .*did you mean 'bilevel'"),
    (KNOB + 'name = "share.lorra"\n' + RANGE, "kind must be one of .*did you mean 'lora'"),
    (KNOB + 'name = "tau"\nlow = 1.0\nhigh = 0.1\n', "low < high must hold for tau"),
    (KNOB + 'name = "tau"\nlow = 0.0\nhigh = 1.0\nlog = true\n', "low > 0 must hold for tau"),
    (KNOB + 'name = "tau"\nlow = 0.0\n', "low < high must hold for tau"),
    (KNOB + 'name = "tau"\n', "tau must have choices, or low and high"),
    (KNOB + 'name = "tau"\nchoices = [0.1]\n' + RANGE, "tau must have choices, or low and high"),
    (KNOB + 'name = "tau"\nchoices = [0.1, 0.1]\n', "choices of tau must be distinct"),
    (KNOB + 'name = "tau"\ndefault = 2.0\n' + RANGE, "default of tau must be a value"),
    (KNOB + 'name = "tau"\nwhen = { kinds = "lora" }\n' + RANGE, "must name a knob before it"),
    (KNOB + 'name = "tau"\n' + RANGE + '[[knob]]\nname = "tau"\n' + RANGE,
     r"mine.toml: knobs must be distinct, but tau stands twice$"),
    (KNOB + 'name = "strategy"\nchoices = ["bilevel", "random:unit"]\n' + KNOB[len(HEAD):]
     + 'name = "tau"\nwhen = { strategy = "bilvel" }\n' + RANGE,
     "when of tau must match a choice of strategy, bilevel, random:unit, but got 'bilvel'$"),
    (KNOB + 'name = "strategy"\nchoices = ["bilevle"]\n', "strategy must be one of"),
    (KNOB + 'name = "tau"\n' + RANGE + "[[first]]\ntau = 3.0\n",
     r"first must set a knob to a value that it can have, but got tau = 3\.0$"),
    (KNOB + 'name = "tau"\nstep = 2\n' + RANGE, "knob.0.step: Extra inputs"),
    (HEAD, "knob: Field required"),
    (HEAD + 'base = "nanno"\n[[knob]]\nname = "tau"\n' + RANGE, "space must be one of"),
    (HEAD + 'extends = "defalt"\n', "tuning space must be one of .*did you mean 'default'"),
    ("description =", "must be TOML"),
])
def test_a_wrong_tuning_space_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_tune(str(path))
    assert "\n" not in str(caught.value)


def test_a_tuning_space_that_extends_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + f'extends = "{path}"\n')
    with pytest.raises(InputError, match="must not extend itself"):
        read_tune(str(path))
    with pytest.raises(InputError, match=r"absent\.toml does not"):
        read_tune("absent.toml")
    assert isinstance(read_tune("default"), TuneFile)
