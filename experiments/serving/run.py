"""Memory and time of many tasks on one backbone, beside models that each serve one.

    python experiments/serving/run.py [--tasks 100] [--rounds 15] [--out experiments/serving]

MiniLM; each task has a random structure of 0.01 % (2,271 parameters: single channels of biases and
scales, and rank atoms of LoRA, drawn from the space `nano`) and a head of 2 labels.  Resident
memory is that of a fresh process that holds the models and nothing else; that of models on their
own is measured at 0 and at a few and extended in proportion.  Times are of a batch of 32 x 32
tokens: each round takes every contender once, in rotating order; a ratio is taken inside a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import searchpet
from searchpet.apply import Trained, save_delta
from searchpet.backbone import DEFAULT, load_backbone
from searchpet.budget import fill
from searchpet.discover import discover
from searchpet.run import RunFolder
from searchpet.space import build_space
from searchpet.spec import BackboneId, BudgetUse, Spec

ROWS, LENGTH, LIMIT = 32, 32, 2271
MIXES = (2, 8, 32)  # tasks in a mixed batch
APART = (2, 8)  # as many models beside each other
MEGABYTE = 1000**2


def write_tasks(folder: Path, count: int) -> None:
    """Run folders t0, t1, ... with random structures and trained-looking numbers."""
    backbone = load_backbone(DEFAULT, outputs=2, regression=False, seed=0)
    space, who = build_space("nano", discover(backbone.model)), backbone.identity
    for number in range(count):
        g = torch.Generator().manual_seed(number)
        keep = fill(torch.rand(len(space), generator=g), space.cost, LIMIT)
        used = space.parameters(keep)
        spec = Spec(
            backbone=BackboneId(name=who.name, revision=who.revision,
                                config_hash=who.config_hash, parameters=who.parameters),
            entries=space.entries(keep),
            budget=BudgetUse(text="0.01%", limit=LIMIT, used=used, slack=LIMIT - used,
                             denominator=who.parameters))
        model: Any = searchpet.apply(backbone.model, spec, head=backbone.head)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=g))
        out = RunFolder(folder / f"t{number}")
        out.path.mkdir(parents=True)
        out.write_text("spec.json", spec.text())
        save_delta(out, model, backbone.head, Trained(
            spec_hash=spec.hash, task=f"t{number}", type="classification", fields=("text",),
            labels=("no", "yes"), metrics=("accuracy",), max_length=LENGTH))
        model.searchpet.detach()  # the backbone is as it was, for the next
        del model.searchpet


def names(count: int) -> list[str]:
    return [f"t{number}" for number in range(count)]


def served(folder: Path, count: int) -> Any:
    return searchpet.serve({name: folder / name for name in names(count)})


def resident(folder: Path, what: str, count: int) -> float:
    """Megabytes of a fresh process that holds `count` tasks, by serving or as models."""
    done = subprocess.run([sys.executable, __file__, "--hold", what, str(folder), str(count)],
                          check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def hold(what: str, folder: Path, count: int) -> float:
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    load_backbone(DEFAULT, outputs=2, regression=False, seed=0).model(**batch)  # libraries
    kept = ([served(folder, count)] if what == "served" else
            [searchpet.load(folder / name) for name in names(count)])
    with torch.no_grad():
        for model in kept:
            model(**batch)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def contenders(folder: Path) -> dict[str, Callable[[], Any]]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (ROWS, LENGTH), generator=g)
    plain = load_backbone(DEFAULT, outputs=2, regression=False, seed=0).model
    alone = [searchpet.load(folder / name) for name in names(max(APART))]
    model = served(folder, max(MIXES))

    def turned(to: str | list[str]) -> Callable[[], Any]:
        def step() -> Any:
            model.set_task(to)
            return model(input_ids=ids).logits
        return step

    def apart(count: int) -> Callable[[], Any]:
        parts = ids.split(ROWS // count)
        return lambda: [one(input_ids=part).logits
                        for one, part in zip(alone, parts, strict=False)]

    found: dict[str, Callable[[], Any]] = {
        "backbone": lambda: plain(input_ids=ids).logits,
        "1 task, loaded alone": lambda: alone[0](input_ids=ids).logits,
        "1 task, served": turned("t0"),
    }
    for count in MIXES:
        found[f"{count} tasks mixed, served"] = turned(
            [name for name in names(count) for _ in range(ROWS // count)])
    for count in APART:
        found[f"{count} tasks, {count} models"] = apart(count)
    return found


@torch.inference_mode()
def times(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds and ratios to the backbone alone: median and quartiles over rounds."""
    steps = contenders(folder)
    for step in steps.values():
        step()
    took: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds):
        for name in order[number % len(order):] + order[: number % len(order)]:
            start = time.perf_counter()
            steps[name]()
            took[name].append(time.perf_counter() - start)
    return {name: {"milliseconds": round(1000 * statistics.median(own), 1),
                   "ratio": [round(q, 3) for q in statistics.quantiles(
                       [a / b for a, b in zip(own, took["backbone"], strict=True)], n=4)]}
            for name, own in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("experiments/serving"))
    parser.add_argument("--hold", nargs=3)
    asked = parser.parse_args()
    if asked.hold:
        what, folder, count = asked.hold
        print(hold(what, Path(folder), int(count)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tasks(folder, asked.tasks)
        files = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / MEGABYTE
        nothing = resident(folder, "models", 0)
        memory = {"nothing": nothing, "1 model": resident(folder, "models", 1),
                  f"{asked.models} models": resident(folder, "models", asked.models),
                  "1 task served": resident(folder, "served", 1),
                  f"{asked.tasks} tasks served": resident(folder, "served", asked.tasks),
                  f"files of {asked.tasks} tasks": files}
        found = {"memory in MB": {name: round(v, 1) for name, v in memory.items()},
                 "times": times(folder, asked.rounds), "torch": torch.__version__,
                 "threads": torch.get_num_threads(), "machine": platform.machine()}
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
