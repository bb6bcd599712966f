"""The documentation keeps up with the code: every member has its page, every example is valid."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

import searchpet
from searchpet import catalog
from searchpet.apply import Trained
from searchpet.cli import app
from searchpet.gridfile import GridFile, Method, read_grid
from searchpet.schema import Recipe, recipe
from searchpet.space import Space
from searchpet.spacefile import Rule, Select, SpaceFile, read_space
from searchpet.spec import BackboneId, BudgetUse, Entry, KeepUse, MaskRef, Ratio, Spec
from searchpet.tunefile import Knob, TuneFile, read_tune

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
FOLDERS = {"deltas": ("kinds", "kind"), "strategies": ("strategies", "strategy")}
MEMBERS = [(family, name) for family in FOLDERS for name in catalog.names(family)]


def blocks(language: str) -> list[Any]:
    """Fenced blocks of a language in all pages, named by page and number."""
    return [pytest.param(text, id=f"{page}-{i}") for page, content in TEXTS.items()
            for i, text in enumerate(
                re.findall(rf"^```{language}\n(.*?)^```", content, re.MULTILINE | re.DOTALL))]


def nav(node: Any) -> Iterator[str]:
    """Pages of the navigation."""
    if isinstance(node, str):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(
            node, list) else ():
        yield from nav(child)


@pytest.fixture(scope="module")
def hooks() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "make"))
        yield importlib.import_module("hooks")


# --- what there is has its place ----------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_every_kind_and_strategy_has_its_page(family: str, name: str) -> None:
    folder, marker = FOLDERS[family]
    page = f"{folder}/{name}.md"
    assert page in TEXTS, f"{family}/{name}.py needs a page: add docs/{page}, and to mkdocs.yml"
    assert f"{{{{ {marker} {name} }}}}" in TEXTS[page], f"docs/{page} must say {marker} {name}"
    assert "## When to use it" in TEXTS[page]


@pytest.mark.parametrize(("family", "page"), [
    ("grains", "choices/grains.md"), ("scores", "choices/scores.md"),
    ("tasks", "choices/tasks.md"), ("deltas", "kinds/index.md"),
    ("strategies", "strategies/index.md")])
def test_every_member_has_its_row(hooks: ModuleType, family: str, page: str) -> None:
    text = hooks.filled(TEXTS[page])
    assert all(f"`{name}`" in text for name in catalog.names(family))


def test_what_must_be_written_by_hand_is_there() -> None:
    grains, costs = TEXTS["choices/grains.md"], TEXTS["strategies/index.md"].split("## What a")[1]
    for name in catalog.names("grains"):
        assert f"| `{name}` |" in grains, f"docs/choices/grains.md must say what {name} is for"
    for name in catalog.names("strategies"):
        assert f"[{name}]({name}.md)" in costs, (
            f"docs/strategies/index.md must say what a step of {name} costs")


def test_scores_of_units_are_those_that_there_are() -> None:
    from searchpet.importance import names

    alone = set(names()) - set(catalog.names("scores"))
    assert all(f"`{name}`" in TEXTS["choices/scores.md"] for name in alone)


def test_every_page_is_in_the_navigation() -> None:
    assert sorted(nav(CONFIG["nav"])) == sorted(TEXTS)


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_options_are_read_with_their_reasons(hooks: ModuleType, family: str, name: str) -> None:
    member = catalog.get(family, name)
    parameters = inspect.signature(member.__init__ if family == "deltas" else member).parameters
    wanted = {key: repr(p.default) for key, p in parameters.items()
              if p.kind is p.KEYWORD_ONLY and key not in ("channels", "variant")}
    found = hooks.members.options(family, name)
    assert {o.name: o.default for o in found} == wanted
    for option in found:
        assert option.reason, f"{family}/{name}.py: a reason must stand beside {option.name}"


def test_the_command_line_is_described_whole(hooks: ModuleType) -> None:
    text = hooks.filled(TEXTS["reference/commands.md"])
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        part = text.split(f"## {name}\n")[1].split("\n## ")[0]
        assert all(f"`{opt}`" in part for p in command.params
                   for opt in p.opts if opt.startswith("-"))


@pytest.mark.parametrize("name", sorted(set(searchpet.__all__) - {"__version__"}))
def test_every_public_name_is_described(name: str) -> None:
    home = getattr(searchpet, name).__module__
    assert f"::: {home}.{name}\n" in TEXTS["reference/python.md"], (
        f"docs/reference/python.md must have a line ::: {home}.{name}")


MODELS = {
    "files/spec.md": [Spec, BackboneId, Entry, MaskRef, BudgetUse, KeepUse, Ratio],
    "files/tensors.md": [Trained], "files/space.md": [SpaceFile, Rule, Select],
    "files/task.md": [Recipe], "files/tune.md": [TuneFile, Knob],
    "files/grid.md": [GridFile, Method],
}


@pytest.mark.parametrize(("page", "model"), [(p, m) for p, found in MODELS.items() for m in found])
def test_every_key_of_a_file_is_described(page: str, model: type[BaseModel]) -> None:
    rows = "\n".join(re.findall(r"^\| (`[^|]*`) \|", TEXTS[page], re.MULTILINE))
    missing = [name for name in model.model_fields if f"`{name}`" not in rows]
    assert not missing, f"docs/{page} must have a row on {missing}"


# --- examples are valid -------------------------------------------------------------------------


@pytest.mark.parametrize("text", blocks("toml"))
def test_every_toml_is_what_the_program_reads(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    content = tomllib.loads(text)
    if "rule" in content:
        space = read_space(str(file))
        assert len(Space(space.description, _sites(), space.rule, space.share)) or _bulk(space)
    elif "knob" in content:
        assert read_tune(str(file)).starts()
    elif "tasks" in content:
        assert read_grid(file).methods
    else:
        assert recipe(content, "task.toml").label


def _sites() -> Any:
    from transformers import BertConfig, BertModel

    from searchpet.discover import discover

    return discover(BertModel(BertConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=8)))


def _bulk(space: SpaceFile) -> bool:
    """Whether a space is of single weights, which are no units."""
    return all(rule.kind in ("blocks", "n_m", "weights") for rule in space.rule)


@pytest.mark.parametrize("text", blocks("json"))
def test_every_json_is_what_the_program_reads(text: str) -> None:
    content = json.loads(text)
    if "searchpet_spec" in content:
        assert Spec.parse(content).entries
    else:
        assert Trained.model_validate(content).outputs == 2


@pytest.mark.parametrize("text", blocks("bash"))
def test_every_command_parses(text: str) -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    for line in text.splitlines():
        program, name, *words = shlex.split(line, comments=True)
        assert program == "searchpet"
        context = commands[name].make_context(name, words)
        if strategy := context.params.get("strategy"):
            from searchpet.ask import hyperparameters
            from searchpet.options import assignments

            hyperparameters(strategy, assignments(context.params.get("set_") or [], strategy))


# --- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_is_made_whole(hooks: ModuleType, page: str) -> None:
    text = hooks.filled(TEXTS[page])
    assert text.startswith(("# ", "---\n"))
    assert "{{ " not in text
    places = re.findall(r"(?<![\w./])/(?:work|home|root|tmp|mnt|Users)/\S*", text)
    assert not places, "a page must not name a place on somebody's machine"


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(hooks: ModuleType, page: str) -> None:
    """Files that are linked exist, anchors are checked by `mkdocs build --strict`; addresses are
    well formed.
    """
    for target in re.findall(r"\]\(([^)\s]+)\)", hooks.filled(TEXTS[page])):
        address = urlsplit(target)
        if address.scheme:
            assert address.scheme == "https" and "." in address.netloc, target
            assert address.netloc != "arxiv.org" or re.fullmatch(
                r"/abs/\d{4}\.\d{4,5}", address.path), target
        elif address.path.startswith("rooms/"):  # made while the site is built
            assert address.path[6:-3] in hooks.rooms()
        elif address.path:
            assert (DOCS / page).parent.joinpath(address.path).is_file(), target


def test_the_picture_is_the_one_that_is_drawn(hooks: ModuleType) -> None:
    drawn = importlib.import_module("picture").picture()
    assert (DOCS / "assets/searchpet.svg").read_text(encoding="utf-8") == drawn, (
        "run python docs/make/picture.py")


@pytest.mark.parametrize(("source", "wanted"), [
    ("What.\n\nx: (n,), the\ninput.\nRaises InputError.", "- `x`: (n,), the\n  input.\n\nRaises"),
    ("Two:\n- one,\n  more\n- two", "Two:\n\n- one,\n  more\n- two"),
    ("As so:\n\n    a = 1\n      b", "```text\na = 1\n  b\n```"),
    ("Hu 2021, arXiv:2106.09685, eq. 3.", "[arXiv:2106.09685](https://arxiv.org/abs/2106.09685)"),
])
def test_docstrings_become_markdown(hooks: ModuleType, source: str, wanted: str) -> None:
    assert wanted in importlib.import_module("texts").as_markdown(source)
