"""Understanding a result: `diff`, `explain`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from searchpet import options as o
from searchpet.commands import Plugin, answer
from searchpet.errors import InputError

All = Annotated[bool, typer.Option("--all", help="Every row, not only the first ones.")]


def diff(
    a: Annotated[Path, typer.Argument(help="A spec, searchpet:NAME, or the folder of a run.")],
    b: Annotated[Path, typer.Argument(help="Another one, on the same backbone.")],
    all_: All = False, json_: o.Json = False,
    plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006  typer copies it
) -> None:
    """Compare two structures: what only one keeps, and how far that is from chance."""
    from searchpet import insightviews
    from searchpet.diff import diff as compare

    found = compare(o.at(a), o.at(b))
    answer(dataclasses.asdict(found), json_,
           lambda _: insightviews.difference(found, str(a), str(b), all_),
           [found.note] if found.note else [])


def explain(
    spec: Annotated[Path, typer.Argument(help="A run, or a spec.")],
    others: Annotated[list[Path], typer.Option(
        "--with", metavar="RUN", help="A run of the same search with another seed, to count how "
        "often units are kept; repeatable.")] = [],  # noqa: B006  typer copies it
    all_: All = False, json_: o.Json = False,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="File for the whole of it as JSON.")] = None,
    plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Explain a structure: why each unit is kept, what comes next, what goes first."""
    from searchpet import insightviews
    from searchpet.explain import explain as account

    if out is not None and out.exists():
        raise InputError(f"--out must be a new file, but {out} is there; name another")
    found = account(o.at(spec), [o.at(other) for other in others])
    values = dataclasses.asdict(found)
    if out is not None:
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        partial.replace(out)
    answer(values, json_, lambda _: insightviews.explained(found, all_), found.notes)
