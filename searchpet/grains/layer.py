"""One unit per layer: a kind on every site of a block together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from searchpet.site import Site


def grain(site: Site, kind: str, width: int) -> Sequence[Hashable]:
    """The same name for all sites of the layer."""
    return [(site.part, site.layer, kind)] * width
