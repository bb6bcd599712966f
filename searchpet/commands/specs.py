"""Shelves of specs: `specs list`, `specs find`, `specs add`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from searchpet import options as o
from searchpet.commands import answer

specs = typer.Typer(no_args_is_help=True, help="Specs on a shelf: a folder, the hub, or what "
                    "comes with searchpet.")

On = Annotated[str | None, typer.Option(
    "--on", help="The shelf: a folder, searchpet, or hf:OWNER/REPOSITORY. "
    "[default: $SEARCHPET_SPECS or ~/.searchpet/specs, and searchpet]")]


@specs.command("list")
def list_(on: On = None, json_: o.Json = False, debug: o.Debug = False) -> None:
    """List the specs of a shelf."""
    _answer(on, json_)


@specs.command()
def find(
    on: On = None,
    backbone: Annotated[str | None, typer.Option(
        "--backbone", help="Part of the backbone's name.")] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Part of the task's name.")] =
    None,
    budget: Annotated[str | None, typer.Option(
        "--budget", "-b", help="At most so many parameters, or such a share of the backbone.")] =
    None,
    json_: o.Json = False, debug: o.Debug = False,
) -> None:
    """Find specs by backbone, task and budget, the best scores first."""
    _answer(on, json_, backbone, task, budget)


@specs.command()
def add(
    source: Annotated[Path, typer.Argument(
        help="A run, a spec, searchpet:NAME, or hf:OWNER/REPOSITORY/NAME.")],
    to: Annotated[str | None, typer.Option(
        "--to", help="The shelf: a folder, or hf:OWNER/REPOSITORY to push. "
        "[default: $SEARCHPET_SPECS or ~/.searchpet/specs]")] = None,
    name: Annotated[str | None, typer.Option(
        "--name", help="Its name there; by default that of its folder.")] = None,
    private: Annotated[bool, typer.Option(
        "--private", help="A repository that is made for it is private.")] = False,
    json_: o.Json = False, debug: o.Debug = False,
) -> None:
    """Put a spec on a shelf with its score and provenance; from the hub, pull it."""
    from searchpet import carriedviews, shelf

    card = shelf.add(source, to, name, private)
    where = to if to else str(shelf.folder_of(None))
    answer(card.model_dump(), json_, lambda _: carriedviews.shelved([(where, card)]))


def _answer(on: str | None, as_json: bool, backbone: str | None = None, task: str | None = None,
            budget: str | None = None) -> None:
    """The cards that are asked for; damaged ones are named on stderr."""
    from searchpet import carriedviews, shelf
    from searchpet.budget import Budget

    found, notes = [], []
    for where in [on] if on else [None, "searchpet"]:
        own, problems = shelf.cards(where)
        notes += problems
        shown = where or str(shelf.folder_of(None))
        found += [(shown, card) for card in shelf.find(own, backbone, task) if budget is None
                  or card.used <= Budget.parse(budget, card.parameters).limit]
    answer([{"on": where, **card.model_dump()} for where, card in found], as_json,
           lambda _: carriedviews.shelved(found), notes)
