"""Understanding a result: `diff`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from searchpet import options as o
from searchpet.commands import Plugin, answer

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
