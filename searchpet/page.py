"""Pages: HTML that is whole in one file, from the templates in `pages/`.

They share a frame and a style, need no network and no script, and every value that is put into
them is escaped: a task's name is never markup.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"), autoescape=True,
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(name: str, **values: Any) -> str:
    """The page of that name with these values."""
    return PAGES.get_template(name).render(**values)
