"""Docstrings for the API pages: an extension of griffe that hands them on as Markdown."""

from __future__ import annotations

from typing import Any

import griffe
from texts import as_markdown


class Markdown(griffe.Extension):
    """Every docstring, before it is shown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
