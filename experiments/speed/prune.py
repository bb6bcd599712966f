"""What pruning saves at inference, and what prune gates add to a search step.

    python experiments/speed/prune.py [--rounds 15] [--only search] [--threads 1] [--quick]

Inference: MiniLM, texts of 128 tokens, evaluation, no gradients.  Structures are chosen by
magnitude, without a search.  Dense, masked, removed, and removed with PET merged run in turns in
one process; ratios are of the shortest times and of medians, wall and CPU.
Search: steps of `bilevel` on space `wide` at 1 %, batch 32 x 64 tokens, with and without prune
gates at 60 % of the FLOPs, in turns of short blocks; the ratio is of medians over all steps.
--quick runs all of it on a tiny random model: a test of the code, its times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench import backbone, problem_on  # type: ignore[import-not-found]  # beside it
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from searchpet import catalog
from searchpet.apply import apply, grafts, outside_base
from searchpet.ask import Ask
from searchpet.backbone import Identity, config_hash
from searchpet.discover import discover
from searchpet.flops import flops
from searchpet.importance import importance
from searchpet.limits import Limits
from searchpet.merge import merge
from searchpet.probe import random_inputs
from searchpet.pruning import Prune, keep_of, used
from searchpet.run import StageLoop
from searchpet.settle import settle
from searchpet.space import Space
from searchpet.spacefile import Rule, read_space
from searchpet.spec import BackboneId, BudgetUse, Entry, Spec
from searchpet.strategies import Problem
from searchpet.supernet import Supernet

INFERENCE_TARGET = 1.1  # removed / dense, as a multiple of the FLOPs ratio
SEARCH_TARGET = 1.3  # a step with prune gates / one without
MIXED = ("prune/structured", "prune/layers")
STRUCTURES = {  # name -> masks, score, allocation, shares of FLOPs
    "mixed": (MIXED, "magnitude", "per_cost", ("80%", "60%", "40%")),
    "even": (("prune/heads_neurons",), "magnitude", "per_layer", ("80%", "60%", "40%")),
    "layers": (("prune/layers",), "top", "global", ("60%",)),
}
LORA = Rule(kind="lora", grain="module", options={"rank": 1})
PHASES: dict[str, dict[str, float]] = {
    "warm-up": {"warmup": 1.0},
    "search": {"warmup": 0.0, "ramp": 0.0, "hard": 0.0},
    "search, hard gates": {"warmup": 0.0, "ramp": 0.0, "hard": 1.0},
}
BLOCK = 4  # steps of a search at a time, of which the first only sets up optimizers
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: of all threads together
SUMMARIES: dict[str, Callable[..., float]] = {"min": min, "median": statistics.median}
Spent = tuple[float, ...]  # seconds by CLOCKS


class Scale(NamedTuple):
    """How large everything is; search: rows and tokens of a batch."""

    batches: tuple[int, ...]
    length: int
    threads: tuple[int, ...]
    search: tuple[int, int]


FULL = Scale((1, 32), 128, (1, 2), (32, 64))
QUICK = Scale((1, 2), 16, (1,), (2, 8))


class Base(NamedTuple):
    """A backbone in evaluation mode."""

    model: nn.Module
    head: frozenset[str]
    identity: Identity


def base(quick: bool) -> Base:
    """MiniLM, or a tiny random BERT."""
    if not quick:
        found = backbone()
        return Base(found.model.eval(), found.head, found.identity)
    config = BertConfig(vocab_size=20_000, hidden_size=32, num_hidden_layers=4,
                        num_attention_heads=4, intermediate_size=64, num_labels=6,  # type: ignore[call-arg]
                        initializer_range=0.2)  # logits must not be nearly 0
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    head = outside_base(model)
    count = sum(p.numel() for n, p in model.named_parameters() if n not in head)
    return Base(model, head, Identity("tiny", "none", config_hash(config), count))


def choose(of: Base, name: str, share: str) -> tuple[Spec, Spec]:
    """A structure of STRUCTURES that keeps `share` of the FLOPs: with a LoRA on every linear that
    is left, and without PET.
    """
    masks, score, allocation, _ = STRUCTURES[name]
    rules = [LORA, *(rule for file in masks for rule in read_space(file).rule)]
    space = Space(name, discover(of.model), rules)
    keep = keep_of(Prune("flops", share), of.model, space)
    limits = Limits(space, space.total, keep)
    net = Supernet(of.model, space, of.head, 0)
    found = importance(score, net, [], lambda _: torch.zeros(()), torch.Generator())
    net.remove()
    chosen = settle(limits, found, allocation)
    entries = limits.entries(chosen)

    def spec(entries: tuple[Entry, ...], count: int) -> Spec:
        return Spec(
            backbone=BackboneId(**asdict(of.identity)), entries=entries,
            budget=BudgetUse(text=str(count), limit=count, used=count, slack=0,
                             denominator=of.identity.parameters),
            keep=used(keep, limits.kept(chosen)), plan=limits.plan(chosen))

    return (spec(entries, limits.parameters(chosen)),
            spec(tuple(e for e in entries if e.kind != LORA.kind), 0))


def contenders(of: Base, spec: Spec, masks: Spec) -> dict[str, nn.Module]:
    """masked and removed have no PET, merged had some as training leaves it."""
    tuned = apply(copy.deepcopy(of.model), spec, head=of.head, remove=True)
    for p in grafts(tuned).deltas.parameters():
        nn.init.normal_(p, std=0.01)
    return {
        "dense": copy.deepcopy(of.model),
        "masked": apply(copy.deepcopy(of.model), masks, head=of.head),
        "removed": merge(apply(copy.deepcopy(of.model), masks, head=of.head, remove=True)),
        "merged": merge(tuned),
    }


@torch.no_grad()
def race(models: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], rounds: int,
         ) -> dict[str, list[Spent]]:
    """Forward passes in turns; two rounds warm up."""
    spent: dict[str, list[Spent]] = {name: [] for name in models}
    names = list(models)
    for turn in range(rounds + 2):
        for name in names[turn % len(names):] + names[: turn % len(names)]:
            began = _now()
            models[name](**inputs)
            spent[name].append(_now(began))
    return {name: values[2:] for name, values in spent.items()}


def inference(of: Base, name: str, share: str, rounds: int, scale: Scale) -> dict[str, Any]:
    """FLOPs and times of one structure."""
    spec, masks = choose(of, name, share)
    models = contenders(of, spec, masks)
    assert spec.keep
    dense = sum(flops(models["dense"]).values())
    left = {n: sum(flops(models[n]).values()) / dense for n in ("removed", "merged")}
    inputs = {rows: random_inputs(of.model, rows, scale.length, torch.Generator().manual_seed(0))
              for rows in scale.batches}
    with torch.no_grad():
        masked, removed = (models[n](**inputs[max(inputs)]).logits for n in ("masked", "removed"))
    runs = []
    for threads, rows in itertools.product(scale.threads, inputs):
        torch.set_num_threads(threads)
        spent = race(models, inputs[rows], rounds * (4 if rows == 1 else 1))
        runs.append({"batch": rows, "length": scale.length, "threads": threads,
                     "ms": {n: _times(values) for n, values in spent.items()},
                     "ratio": {n: _ratios(values, spent["dense"]) for n, values in spent.items()
                               if n != "dense"}})
    kept = {kind: statistics.mean(part.kept for part in spec.plan if part.kind == kind)
            for kind in sorted({part.kind for part in spec.plan})}
    return {
        "structure": name, "keep": share, "kept": kept,
        "flops": {"spec": spec.keep.used / spec.keep.dense, **left},
        "largest_logit": float(masked.abs().max()),
        "masked_minus_removed": float((masked - removed).abs().max()), "runs": runs}


class Timed(StageLoop):
    """A loop that notes what each step but the first took."""

    def __init__(self, steps: int, into: list[Spent]) -> None:
        super().__init__(None, "search", steps, 0, torch.Generator())
        self.into = into

    def __iter__(self) -> Iterator[int]:
        for step in super().__iter__():
            began = _now()
            yield step
            if step:
                self.into.append(_now(began))


def searching(quick: bool, prune: Prune | None, scale: Scale) -> tuple[Problem, list[Spent]]:
    """A search of a block of steps at a time, and where it writes what they take."""
    of, into = base(quick), list[Spent]()
    space = Ask(space="wide", prune=prune).units(of.model)
    keep = keep_of(prune, of.model, space) if prune else None  # counted before PET is there
    problem = problem_on(
        Supernet(of.model, space, of.head, 0), of.identity.parameters // 100, BLOCK,
        lambda steps, **_: Timed(steps, into), *scale.search)
    scores = torch.arange(len(space)).double()  # units are scored once a search, not in a step
    return replace(problem, keep=keep, importance=lambda *_: scores), into


def search(quick: bool, rounds: int, scale: Scale, threads: int) -> dict[str, Any]:
    """Seconds of a step by phase, without and with prune gates."""
    torch.set_num_threads(threads)
    sides = {"without": searching(quick, None, scale),
             "with": searching(quick, Prune("flops", "60%"), scale)}
    bilevel: Callable[..., Any] = catalog.get("strategies", "bilevel")
    found: dict[str, Any] = {}
    for phase, keywords in PHASES.items():
        for _, into in sides.values():
            into.clear()
        for turn in range(rounds):
            for problem, _ in list(sides.values())[:: -1 if turn % 2 else 1]:
                bilevel(problem, levels=2, rows=False, **keywords)
        spent = {name: list(into) for name, (_, into) in sides.items()}
        found[phase] = {"ms": {name: _times(values) for name, values in spent.items()},
                        "ratio": _ratios(spent["with"], spent["without"])}
    return {"threads": threads, "steps": rounds * (BLOCK - 1), "phases": found}


def _now(began: Spent = (0.0, 0.0)) -> Spent:
    """Since then."""
    return tuple(clock() - b for clock, b in zip(CLOCKS.values(), began, strict=True))


def _times(spent: list[Spent]) -> dict[str, float]:
    """Milliseconds: wall_min, wall_median, cpu_min, cpu_median."""
    return {f"{clock}_{name}": round(1000 * summary(list(seconds)), 3)
            for clock, seconds in zip(CLOCKS, zip(*spent, strict=True), strict=True)
            for name, summary in SUMMARIES.items()}


def _ratios(spent: list[Spent], reference: list[Spent]) -> dict[str, float]:
    """Of minima and of medians."""
    own, other = _times(spent), _times(reference)
    return {key: round(own[key] / other[key], 3) for key in own}


def table(result: dict[str, Any]) -> Iterator[str]:
    """Markdown: ratios of the shortest times, CPU / wall."""
    def both(ratio: Mapping[str, float], kind: str = "min", by: float = 1.0) -> str:
        return " / ".join(f"{ratio[f'{clock}_{kind}'] / by:.2f}" for clock in ("cpu", "wall"))

    yield ("| structure | FLOPs | batch, threads | masked | removed | PET merged "
           f"| removed, of FLOPs (target <= {INFERENCE_TARGET}) |")
    yield "|---|---|---|---|---|---|---|"
    for row in result["inference"]:
        left = row["flops"]["removed"]
        for run in row["runs"]:
            cells = [both(run["ratio"][n]) for n in ("masked", "removed", "merged")]
            yield (f"| {row['structure']} {row['keep']} | {left:.3f} | {run['batch']} x "
                   f"{run['length']}, {run['threads']} | {' | '.join(cells)} "
                   f"| {both(run['ratio']['removed'], by=left)} |")
    yield ""
    yield f"| `bilevel` step with prune gates / without (target <= {SEARCH_TARGET}) | median |"
    yield "|---|---|"
    for one in result["search"]:
        for phase, figures in one["phases"].items():
            yield f"| {phase}, {one['threads']} threads | {both(figures['ratio'], 'median')} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["inference", "search"])
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1, then 2")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    scale = QUICK if args.quick else FULL
    scale = scale._replace(threads=tuple(args.threads or scale.threads))
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, torch {torch.__version__}", "quick": args.quick,
        "rounds": args.rounds, "inference": [], "search": []}
    if args.only != "search":
        of = base(args.quick)
        result["inference"] = [inference(of, name, share, args.rounds, scale)
                               for name, (*_, shares) in STRUCTURES.items() for share in shares]
    if args.only != "inference":
        result["search"] = [search(args.quick, args.rounds, scale, n) for n in scale.threads]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "prune.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
