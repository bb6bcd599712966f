"""The house has storeys, and arrows point down: read from the source, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "searchpet"

# Storey -> rooms.  A fraction is a landing: its rooms stand on others of the same storey.
# `package/*` is every member of a package: what the catalog finds never needs an entry here.
STOREYS: dict[float, list[str]] = {
    0: ["errors", "interrupts", "page"],
    0.5: ["catalog", "families", "site", "spec"],
    0.8: ["spacefile"],
    1: ["device", "deltas/*", "grains/*", "tasks/*", "patterns", "roles", "slices"],
    2: ["allocate", "budget", "gates", "knee", "landing", "masks", "metrics", "probe", "processes",
        "roster", "rows", "scores/*", "source", "space", "sublayers"],
    2.2: ["knapsack", "study"],
    2.3: ["hosts", "settings"],
    2.5: ["discover", "factors", "inference", "prices", "schema"],
    2.7: ["cuts", "limits"],
    2.8: ["anatomy", "settle"],
    3: ["adversary", "backbone", "batch", "card", "flops", "hooks", "run", "stats", "task"],
    3.2: ["grafts"],
    3.3: ["calibrate", "linear_probe", "mixed", "onnx_file"],
    3.5: ["removal", "supernet", "train"],
    3.6: ["contrast", "outside"],
    3.7: ["importance", "latency", "recovery", "slopes", "updates"],
    3.8: ["bulk"],
    3.9: ["tickets"],
    4: ["strategies/*"],
    4.2: ["choose", "sparse"],
    4.3: ["realise"],
    4.4: ["saving"],
    4.45: ["stored"],
    4.5: ["apply", "inherit", "merge", "pruning"],  # parts of the engine
    4.55: ["learned"],
    4.6: ["outline", "scored", "trace"],
    4.7: ["finished", "plain", "portable", "serve"],
    4.8: ["ask"],
    4.85: ["searched"],
    4.87: ["diff"],
    4.88: ["explain"],
    4.9: ["knobs"],
    4.95: ["apportion", "oneshot", "tunefile"],
    4.97: ["counterpart"],
    4.99: ["relocate"],
    5: ["launch"],
    5.1: ["session"],
    5.2: ["halving", "measures", "multitask"],
    5.3: ["propose", "teach", "verify"],
    5.4: ["once"],
    5.45: ["curve"],
    5.5: ["engine"],
    5.6: ["canvas"],
    5.7: ["board", "charts", "curves"],
    5.8: ["maps"],
    6: ["export", "gridfile", "ledger", "plan", "question", "shelf", "survey",
        "transfer", "vote"],
    6.1: ["recall", "versus", "worker"],
    6.2: ["collect", "workers"],
    6.3: ["gridcells", "tune"],
    6.5: ["grid", "trials"],
    6.6: ["plot"],
    7: ["failures", "options", "views"],
    7.2: ["carriedviews", "insightviews", "report"],
    7.3: ["jobs"],
    7.5: ["progress"],
    8: ["commands/*"],
    8.2: ["cli"],
    8.5: ["__main__"],
}
ENGINE = 5.0  # from here up, a room may read the environment

# library -> the only rooms that may import it
LIBRARIES = {
    "accelerate": {"launch", "processes"},
    "transformers": {"apply", "backbone", "engine", "merge", "removal", "saving", "session"},
    "huggingface_hub": {"shelf", "source", "task"},
    "datasets": {"task"},
    "optuna": {"collect", "question", "roster", "study", "trials", "tune", "worker", "workers"},
    "matplotlib": {"canvas", "trials"},
    "peft": {"export", "outside"},
    "onnxruntime": {"onnx_file"},
}
# room -> what of this project it may import, at most
ONLY = {"budget": {"device", "errors"}, "gates": {"device", "errors"}}
# room -> what it must never import, wherever the storeys allow it
NEVER = {
    "strategies/*": {"deltas", "discover", "site", "backbone", "transformers"},
    "grafts": {"budget", "gates"},
    "supernet": {"budget", "gates"},
}
# may import by a name that is only known at run time
IMPORTERS = {"__init__", "catalog", "commands/__init__"}
LONGEST, LONG, LONG_FUNCTION = 450, 300, 40  # lines

FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
ROOMS = [name for name in FILES if name != "__init__"]  # the front door has a test of its own


def room(name: str) -> str:
    """`deltas/lora` and `deltas/__init__` -> `deltas/*`; `spec` -> `spec`."""
    return f"{name.split('/')[0]}/*" if "/" in name else name


def storey(name: str) -> float:
    for number, rooms in STOREYS.items():
        if room(name) in rooms:
            return number
    pytest.fail(f"searchpet/{name}.py is on no storey: add it to STOREYS in tests/test_layers.py")


def imports(name: str) -> Iterator[str]:
    """Dotted names of everything that a file imports, at any depth, for types as well."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"searchpet/{name}.py:{node.lineno} imports relatively"
            module = str(node.module)
            for alias in node.names:  # `from package import member` is an arrow to the member
                member = f"{module}.{alias.name}"
                yield member if own(member) in FILES else module


def own(dotted: str) -> str | None:
    """`searchpet.deltas.lora` -> `deltas/lora`, a package -> its `__init__`; None: not ours."""
    first, *rest = dotted.split(".")
    if first != "searchpet":
        return None
    name = "/".join(rest)
    return name if name in FILES else f"{name}/__init__" if name else "__init__"


def targets(name: str) -> set[str]:
    return {target for target in map(own, imports(name)) if target is not None}


def libraries(name: str) -> set[str]:
    return {dotted.split(".")[0] for dotted in imports(name)} - {"searchpet"}


def test_there_is_a_house() -> None:
    assert {"errors", "site", "spec", "deltas/__init__"} <= set(FILES)


@pytest.mark.parametrize("name", ROOMS)
def test_arrows_point_down(name: str) -> None:
    for target in targets(name):
        if target == "__init__":
            continue  # the version: nothing else stands there, see below
        if target == f"{name.split('/')[0]}/__init__" != name:
            continue  # a member and its own package
        assert target in FILES, f"searchpet/{name}.py imports {target}, which does not exist"
        assert storey(target) < storey(name), (
            f"arrows must point down, but {name} (storey {storey(name)}) imports "
            f"{target} (storey {storey(target)})"
        )


def test_there_is_no_cycle() -> None:
    TopologicalSorter({name: targets(name) - {"__init__"} for name in ROOMS}).prepare()


def test_the_front_door_imports_nothing_of_ours_before_it_is_asked() -> None:
    at_once = [node for node in TREES["__init__"].body if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in at_once if str(node.module).startswith("searchpet")]


@pytest.mark.parametrize("name", ROOMS)
def test_the_front_door_is_for_visitors(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module == "searchpet":
            taken = {a.name for a in node.names if own(f"searchpet.{a.name}") not in FILES}
            assert taken <= {"__version__"}, f"{name} must import {taken} from the defining module"


@pytest.mark.parametrize("name", ROOMS)
def test_libraries_stay_in_their_rooms(name: str) -> None:
    for library in libraries(name) & set(LIBRARIES):
        assert name in LIBRARIES[library], (
            f"{library} may be imported in {sorted(LIBRARIES[library])} only, but {name} does"
        )
    assert not (storey(name) < 1 and "torch" in libraries(name)), f"{name} must not need torch"


@pytest.mark.parametrize("name", ROOMS)
def test_some_never_meet(name: str) -> None:
    met = {target.split("/")[0] for target in targets(name)} | libraries(name)
    assert not met & NEVER.get(room(name), set())
    if room(name) in ONLY:
        assert {target.split("/")[0] for target in targets(name)} <= ONLY[room(name)]


@pytest.mark.parametrize("name", [name for name in FILES if name not in IMPORTERS])
def test_only_the_catalog_imports_by_name(name: str) -> None:
    called = {ast.unparse(n.func) for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)}
    assert not called & {"importlib.import_module", "import_module", "__import__", "exec", "eval"}


@pytest.mark.parametrize("name", ROOMS)
def test_below_the_engine_nobody_reads_the_environment(name: str) -> None:
    if storey(name) < ENGINE:
        used = {ast.unparse(n) for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)}
        assert not used & {"os.environ", "os.getenv", "sys.argv"}


def test_files_are_short() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    functions = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    long = {k: n for k, n in lines.items() if n > LONG}
    long |= {k: n for k, n in functions.items() if n > LONG_FUNCTION}
    if long:
        warnings.warn(f"longer than they should be: {long}", stacklevel=1)
    assert not {name: n for name, n in lines.items() if n > LONGEST}


@pytest.mark.parametrize("module", ["searchpet", "searchpet.cli"])
def test_the_command_line_starts_light(module: str) -> None:
    heavy = {"torch", "transformers", "datasets", "optuna", "matplotlib", "sklearn", "scipy"}
    code = f"import {module}, sys; print(*set(sys.modules) & {heavy})"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == []
