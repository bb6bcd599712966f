"""What mkdocs calls while it builds: pages and tables that are made from the sources.

A line `{{ word argument ... }}` of a page is replaced by what BLOCKS has under that word.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from typing import Any

import commands
import members
from texts import ROOT, linked, section

_MARKER = re.compile(r"^\{\{ (\w+)(.*?) \}\}$", re.MULTILINE)
BLOCKS: dict[str, Callable[..., str]] = {
    "kind": members.kind,  # name: what its file says, prices, options
    "strategy": members.strategy,  # name: what its file says, hyperparameters
    "members": members.members,  # family
    "listed": members.listed,  # spaces or knobs, and how their names begin
    "scores": members.scores,
    "commands": commands.reference,
    "section": section,  # file title
    "file": lambda path: (ROOT / path).read_text(encoding="utf-8"),
    "space": lambda name: f"```toml\n{(ROOT / 'spaces' / f'{name}.toml').read_text()}```",
}
ROOMS = "reference/rooms"  # the folder of the pages that are made of single modules


def filled(markdown: str) -> str:
    """A page's text with its markers replaced, and arXiv numbers as links."""
    def block(match: re.Match[str]) -> str:
        return BLOCKS[match[1]](*shlex.split(match[2]))

    return linked(_MARKER.sub(block, markdown))


def rooms() -> list[str]:
    """Dotted names of the project's modules, packages as such, in order."""
    files = sorted((ROOT / "searchpet").rglob("*.py"))
    parts = [file.relative_to(ROOT).with_suffix("").parts for file in files]
    names = {".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts}
    return sorted(names - {"searchpet", "searchpet.__main__"})


def room_table() -> str:
    """Every module with the first line of its docstring."""
    rows = []
    for name in rooms():
        path = ROOT.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        first = text.split("\n\n")[0].replace("\n", " ")
        rows.append((f"[`{name}`](rooms/{name}.md)", first))
    return members.table(("module", "what is in it"), rows)


BLOCKS["rooms"] = room_table


# --- what mkdocs calls ---------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """A page for each module."""
    from mkdocs.structure.files import File

    for name in rooms():
        files.append(File.generated(config, f"{ROOMS}/{name}.md",
                                    content=f"# {name}\n\n[All modules](../rooms.md)\n\n"
                                            f"::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    made = page.file.src_uri.startswith(f"{ROOMS}/")
    return markdown if made else filled(markdown)
