"""Inheritance: what a search has learned, as the start of the structure's own training.

A search that trains leaves deltas and a head.  Those of the kept units are cut to the size that
pruning leaves of their hosts and lie in `inherit.safetensors`, in the format of
delta.safetensors; `--inherit` starts from them, `--fresh` from untrained ones.  The comparison of
both is the control of Liu et al. 2019, arXiv:1810.05270; the frozen backbone is pretrained in
either.  Masks of a search are gates of 0 or 1 at its end, so the first step computes what the
supernet did under the kept gates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from searchpet import catalog
from searchpet.errors import InputError
from searchpet.realise import pet_grafts, structure
from searchpet.run import RunFolder
from searchpet.spec import Spec
from searchpet.supernet import Supernet

FILE = "inherit.safetensors"


def learns(strategy: str) -> bool:
    """Whether a strategy trains deltas that can be inherited."""
    return bool(catalog.about("strategies", strategy.partition(":")[0], "TRAINS", False))


def must_learn(strategy: str) -> None:
    """Raise InputError for a strategy with nothing to inherit."""
    if not learns(strategy):
        raise InputError("--inherit needs a strategy that trains, such as bilevel, but "
                         f"{strategy} learns nothing; drop --inherit")


def inherited(net: Supernet, spec: Spec) -> dict[str, Tensor]:
    """The supernet's deltas as the spec's, by name in delta.safetensors.

    A pruned host has lost features on one side, input or output: a dimension that is shorter
    than the supernet's is that one.
    """
    plan = structure(spec, net.space.sites)
    own = {graft.key: graft.delta for graft in net.grafts.grafts}
    found = {}
    for entry, graft in zip(plan.pet, pet_grafts(plan, 0), strict=True):
        keep = torch.zeros(own[entry.key].width, dtype=torch.bool)
        keep[entry.kept] = True
        thin, live = own[entry.key].thin(keep), plan.live(entry)
        left = live.ins if live.ins is not None else live.outs
        for name, like in graft.delta.named_parameters():
            value = thin.get_parameter(name).detach().cpu()
            for dim, size in enumerate(like.shape):
                if value.shape[dim] != size:
                    assert left is not None  # only what pruning takes makes a delta smaller
                    value = value.index_select(dim, left)
            found[f"{entry.key}/{name}"] = (
                value if graft.sparse is None else value[graft.sparse[name]])
    return found


def leave(folder: RunFolder, net: Supernet, spec: Spec, head: Mapping[str, Tensor],
          about: str) -> None:
    """Write what can be inherited; about: the metadata of delta.safetensors."""
    own = {f"head/{name}": value for name, value in sorted(head.items())}
    folder.write_tensors(FILE, {**inherited(net, spec), **own}, {"searchpet": about})


def take(folder: RunFolder) -> dict[str, Tensor]:
    """What a search has left in its folder.  Raises InputError if it is not there or damaged."""
    return folder.read_tensors(FILE)[0]
