"""Laws of every grain: a hashable name per coordinate; equal names live or die together."""

from __future__ import annotations

import pytest

from searchpet import catalog
from searchpet.site import Site

GRAINS = catalog.names("grains")
QUERY = Site("layer.0.query", "attention.query", 0, "linear", "encoder", 4, 4)
KEY = Site("layer.0.key", "attention.key", 0, "linear", "encoder", 4, 4)
DEEPER = Site("layer.1.query", "attention.query", 1, "linear", "encoder", 4, 4)
DECODER = Site("decoder.0.query", "attention.query", 0, "linear", "decoder", 4, 4)
FUSED = Site("layer.0.query", "attention.key", 0, "linear", "encoder", 4, 4, index=((4, 8),))


@pytest.mark.parametrize("name", GRAINS)
@pytest.mark.parametrize("width", [1, 4])
def test_a_hashable_name_for_every_coordinate(name: str, width: int) -> None:
    names = catalog.get("grains", name)(QUERY, "lora", width)
    assert len(names) == width
    assert len({hash(n) for n in names}) >= 1
    assert list(names) == list(catalog.get("grains", name)(QUERY, "lora", width))


@pytest.mark.parametrize("name", GRAINS)
def test_kinds_and_stacks_never_share_a_unit(name: str) -> None:
    grain = catalog.get("grains", name)
    lora, bias = set(grain(QUERY, "lora", 3)), set(grain(QUERY, "bias", 3))
    assert not lora & bias
    assert not lora & set(grain(DECODER, "lora", 3))


# grain -> units at one site of width 3, and whether key, next layer, fused key share them
TIES = {
    "atom": (3, False, False, False),
    "channel": (3, False, False, False),
    "layer": (1, True, False, True),
    "module": (1, False, False, False),
    "role": (1, False, True, False),
}


@pytest.mark.parametrize("name", TIES)
def test_coordinates_are_tied_as_documented(name: str) -> None:
    grain = catalog.get("grains", name)
    here = set(grain(QUERY, "lora", 3))
    units, key, deeper, fused = TIES[name]
    assert len(here) == units
    for site, tied in ((KEY, key), (DEEPER, deeper), (FUSED, fused)):
        assert bool(here & set(grain(site, "lora", 3))) is tied, site
