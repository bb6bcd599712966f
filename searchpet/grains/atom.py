"""One unit per rank atom: LoRA's rank-1 terms, an adapter's bottleneck units."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from searchpet.site import Site


def grain(site: Site, kind: str, width: int) -> Sequence[Hashable]:
    """A name per coordinate."""
    return [(site.path, site.role, kind, atom) for atom in range(width)]
