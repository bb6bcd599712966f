"""One unit per module: all coordinates of a kind at a site together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from searchpet.site import Site


def grain(site: Site, kind: str, width: int) -> Sequence[Hashable]:
    """`width` times the same name."""
    return [(site.path, site.role, kind)] * width
