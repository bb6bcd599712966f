"""One unit per role: a kind on one role of every layer together (tied across layers)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from searchpet.site import Site


def grain(site: Site, kind: str, width: int) -> Sequence[Hashable]:
    """The same name for a role in all layers of a stack."""
    return [(site.part, site.role, kind)] * width
