"""One unit per channel: single numbers of a bias or a scale."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from searchpet.site import Site


def grain(site: Site, kind: str, width: int) -> Sequence[Hashable]:
    """A name per coordinate, with the channel's number in the site's output."""
    return [(site.path, site.role, kind, channel) for channel in range(width)]
