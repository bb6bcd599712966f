"""Text of the sources as Markdown: docstrings, and sections of the README and its like."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_ARXIV = re.compile(r"(?<!\[)\barXiv:(\d{4}\.\d{4,5})\b")
_ITEM = re.compile(r"(?P<name>[a-z_]\w*(?:, [a-z_]\w*)*)(?P<shape> \([^)]*\))?:\s+(?P<rest>\S.*)")
_HEADING = re.compile(r"^(#+) (.+?)\s*$", re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """A docstring of this house as Markdown.

    `name: what it is` at the start of a line becomes a list item, `- ` a list, an indented block
    stays code, `arXiv:NUMBER` becomes a link.
    """
    found: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", docstring.strip("\n")):
        if paragraph.startswith("    "):
            found.append(f"```text\n{_dedented(paragraph)}\n```")
        else:
            found.append(_paragraph(paragraph.splitlines()))
    return linked("\n\n".join(found))


def linked(text: str) -> str:
    """arXiv numbers as links, but not those that are links already or stand in code."""
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def section(file: str, title: str) -> str:
    """What stands under a heading of a Markdown file of this project, without the heading.

    Raises KeyError for a heading that is not there.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    plain = re.sub(r"^```.*?^```", lambda m: re.sub(r"[^\n]", " ", m[0]), text,
                   flags=re.MULTILINE | re.DOTALL)  # a comment of a snippet is no heading
    headings = list(_HEADING.finditer(plain))
    for i, heading in enumerate(headings):
        if heading[2] == title:
            level = len(heading[1])
            end = next((h.start() for h in headings[i + 1 :] if len(h[1]) <= level), len(text))
            return text[heading.end() : end].strip("\n")
    raise KeyError(f"{file} has no heading {title!r}")


def _paragraph(lines: list[str]) -> str:
    """Lines, of which some may begin an item."""
    out: list[str] = []
    inside = False
    for line in lines:
        item = _ITEM.match(line)
        bullet = line.startswith("- ")
        if item or bullet:
            if out and not inside:
                out.append("")
            inside = True
        elif inside and not line.startswith(" ") and out[-1].endswith("."):  # the list has ended
            out.append("")
            inside = False
        if item:
            line = f"- `{item['name']}`{item['shape'] or ''}: {item['rest']}"
        out.append(f"  {line.strip()}" if inside and not (item or bullet) else line)
    return "\n".join(out)


def _dedented(block: str) -> str:
    lines = block.splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[indent:] for line in lines)
