"""What a structure is judged by besides its score: parameters, FLOPs, time of a forward pass."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from searchpet.apply import apply
from searchpet.errors import InputError, unknown
from searchpet.flops import flops
from searchpet.latency import seconds
from searchpet.merge import merge
from searchpet.session import Session
from searchpet.spec import Spec

DIRECTIONS = {"score": "maximize", "trainable": "minimize", "flops": "minimize",
              "latency": "minimize"}


def check_metrics(names: Collection[str]) -> None:
    """Raise InputError for an unknown metric."""
    for name in names:
        if name not in DIRECTIONS:
            raise unknown("--metric", name, DIRECTIONS)


def measures(session: Session, spec: Spec, score: float, wanted: Collection[str],
             ) -> dict[str, float]:
    """Values by name: score and trainable always, flops and latency if they are wanted.

    flops: of the blocks on one text of 128 tokens, what is pruned really taken out.
    latency: milliseconds of such a pass on this device, what can be merged merged.
    """
    found = {"score": float(score), "trainable": float(spec.budget.used)}
    if {"flops", "latency"} & set(wanted):
        with session.fresh(session.settings.seed, spoil=True) as model:
            apply(model, spec, head=session.head, remove=None)
            with suppress(InputError):  # what cannot be merged costs what it costs
                merge(model)
            if "flops" in wanted:
                found["flops"] = float(sum(flops(model).values()))
            if "latency" in wanted:
                found["latency"] = 1000 * seconds(model)
    return found
