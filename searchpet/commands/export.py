"""Handing a run over: `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from searchpet import options as o
from searchpet.commands import Plugin, answer


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option(
        "--out", "-o", help="Folder of the export: a new one, or an earlier export of the run.",
        rich_help_panel=o.RUN)],
    form: Annotated[str, typer.Option(
        "--format", "-f", help="peft (an adapter), merged (a plain transformers checkpoint) or "
        "onnx.")] = "peft",
    task: o.OneTask = None, model: o.AnyModel = None,
    overwrite: Annotated[bool, typer.Option(
        "--overwrite", help="Replace an export of another run as well.",
        rich_help_panel=o.RUN)] = False,
    json_: o.Json = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Write a trained run for PEFT, transformers or onnxruntime; load it again and compare."""
    from searchpet.export import export as write

    found = write(run, format=form, out=out, model=model, task=task,
                  overwrite=overwrite)
    answer({"path": str(found.path), **found.values}, json_,
           lambda views: _shown(views, found.path, found.values))


def _shown(views: Any, path: Path, values: dict[str, Any]) -> list[Any]:
    """The figures, and where to read on."""
    rows = [[what, value if isinstance(value, int) else f"{value:.3g}"]
            for what, value in values["figures"].items()]
    return [f"{values['format']}: loaded again from {path}, its logits are those of the run", "",
            views.table("checked", "", rows=rows), "",
            f"{path / 'README.md'} says how to load it"]
