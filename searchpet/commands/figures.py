"""Looking: `plot` draws, `report` writes a run's page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from searchpet import options as o
from searchpet.commands import Plugin


def plot(
    inputs: Annotated[list[Path], typer.Argument(
        help="Specs, folders of runs, or tables of results.")],
    out: Annotated[Path, typer.Option(
        "--out", "-o", help="File to write; its ending says svg, pdf or png.")],
    figure: Annotated[str | None, typer.Option(
        "--figure", "-f", help="structure, parameters, changes (two specs), frequency (several), "
        "search, shares, probabilities, learning, cost, budget, transfer or front; by default "
        "what the inputs are made for.")] = None,
    task: Annotated[str | None, typer.Option(
        "--task", "-t", help="Which task, of a table with several.")] = None,
    plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006  typer copies it
) -> None:
    """Draw a structure, a search, a training, or scores."""
    from searchpet.plot import draw, save

    typer.echo(f"wrote {save(draw(inputs, figure, task), out)}", err=True)


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Write report.html, a page about a run, into its folder."""
    from searchpet.report import write

    typer.echo(f"wrote {write(run)}", err=True)
