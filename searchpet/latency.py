"""Latency of a model's blocks on this device, as a table of what their parts take.

The whole model and copies from which something was really removed run in turns; the shortest of
several times counts, since everything that disturbs a measurement adds to it.  From the
differences follows what an attention head, a neuron, the rest of an attention and the rest of a
feed-forward take; layers of a stack are taken to be alike.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from searchpet.errors import InputError
from searchpet.hosts import NOTHING, Hosts
from searchpet.inference import Cost, build_cost
from searchpet.probe import evaluating, positions, random_inputs
from searchpet.removal import Cut, removable, remove
from searchpet.site import Site

ROUNDS = 9
TOKENS = 128
NANO = 1e9
BLOCKS = ("attention.block", "ffn.block")


class Table(BaseModel):
    """Nanoseconds of one key-value head's features each, of a neuron, and of what remains of a
    sublayer without any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    attention: float = Field(ge=0)
    ffn: float = Field(ge=0)
    head_feature: float = Field(ge=0)
    neuron: float = Field(ge=0)


def measure(model: nn.Module, sites: Sequence[Site], batch: int = 1) -> Table:
    """The table for `batch` texts of 128 tokens, or as many as the model has positions for.

    Raises InputError for a family whose parts cannot be removed, and for a model of one layer.
    """
    reason = removable(model)
    if reason:
        raise InputError(f"--keep-latency measures smaller models, but {reason}; take "
                         "--keep-flops")
    mixers = [s for s in sites if s.role == "attention.output"]
    outs = [s for s in sites if s.role == "ffn.out"]
    if len(outs) < 2 or len(mixers) < 2:
        raise InputError("--keep-latency needs two layers at least to tell their parts apart, but "
                         f"the model has {min(len(outs), len(mixers))}; take --keep-flops")
    cuts = {
        "whole": Cut(),
        "heads": Cut(heads={s.path: tuple(range(-(-(s.kv_heads or 1) // 2))) for s in mixers}),
        "neurons": Cut(neurons={s.path: tuple(range(s.d_in // 2)) for s in outs}),
        "attention": Cut(sublayers=_blocks(sites, "attention.block")),
        "ffn": Cut(sublayers=_blocks(sites, "ffn.block")),
    }
    times = _race({name: _smaller(model, cut) for name, cut in cuts.items()}, batch)
    lost = {name: max(0.0, NANO * (times["whole"] - s)) for name, s in times.items()}
    gone = sum(s.d_in - s.d_in // (s.kv_heads or 1) * -(-(s.kv_heads or 1) // 2) for s in mixers)
    feature = lost["heads"] / max(1, gone)
    neuron = lost["neurons"] / sum(s.d_in - s.d_in // 2 for s in outs)
    width = sum(s.d_in for s in mixers) / len(mixers)
    hidden = sum(s.d_in for s in outs) / len(outs)
    return Table(
        attention=max(0.0, lost["attention"] / len(cuts["attention"].sublayers) - width * feature),
        ffn=max(0.0, lost["ffn"] / len(cuts["ffn"].sublayers) - hidden * neuron),
        head_feature=feature, neuron=neuron)


def seconds(model: nn.Module, batch: int = 1) -> float:
    """The shortest of several forward passes on `batch` texts of 128 tokens, or as many as the
    model has positions for.
    """
    return _race({"": model}, batch)[""]


def cost_of(table: Table, sites: Sequence[Site], hosts: Hosts, ids: int) -> Cost:
    """Nanoseconds of the blocks as a function of what lives."""
    per: dict[Site, dict[int, float]] = {}
    fixed: dict[Site, float] = {}
    rates = {"attention.output": (table.head_feature, table.attention),
             "cross_attention.output": (table.head_feature, table.attention),
             "ffn.out": (table.neuron, table.ffn)}
    for site in sites:
        if site.form == "linear" and site.role in rates:
            feature, rest = rates[site.role]
            own = hosts.ties(site).ins
            fixed[site] = rest + feature * int((own == NOTHING).sum())
            values, counts = own[own != NOTHING].unique(return_counts=True)
            per[site] = {i: feature * n for i, n in zip(values.tolist(), counts.tolist(),
                                                        strict=True)}
    return build_cost(hosts, ids, per, fixed)


def _blocks(sites: Sequence[Site], role: str) -> frozenset[str]:
    """Sublayers of that role but the first of each stack: something must stay."""
    first = {part: min(s.layer for s in sites if s.role == role and s.part == part)
             for part in {s.part for s in sites if s.role == role}}
    return frozenset(s.path for s in sites if s.role == role and s.layer > first[s.part])


def _smaller(model: nn.Module, cut: Cut) -> nn.Module:
    smaller = copy.deepcopy(model)
    remove(smaller, cut, verify=False)
    return smaller


@torch.no_grad()
def _race(models: Mapping[str, nn.Module], batch: int) -> dict[str, float]:
    """Shortest seconds of a forward pass of each, in turns."""
    best = dict.fromkeys(models, float("inf"))
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            inputs = _inputs(model, batch)
            with evaluating(model):
                began = time.perf_counter()
                model(**inputs)
                _wait(inputs)
                spent = time.perf_counter() - began
            if turn:  # the first warms up
                best[name] = min(best[name], spent)
    return best


def _inputs(model: nn.Module, batch: int) -> dict[str, Any]:
    base: Any = model
    text = getattr(base, "main_input_name", "input_ids") == "input_ids"
    length = min(TOKENS, positions(model)) if text else TOKENS
    rows = batch if getattr(base.config, "pad_token_id", None) is not None or not text else 1
    return random_inputs(base, rows, length, torch.Generator().manual_seed(0))


def _wait(inputs: Mapping[str, Any]) -> None:
    device = next(iter(inputs.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
