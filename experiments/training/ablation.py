"""What the head's start and the limit on drawn parameters bring, one at a time.

    python experiments/training/ablation.py --data DIR [--task trec6] [--seeds 0 1 2]
    python experiments/training/ablation.py --data DIR --trace

Four structures, made without a search of gates, are trained at three values of tau in three ways:
`drawn` (the head starts as it is drawn, as most trainings do), `fitted` (its last layer is fitted
first) and `fitted, capped` (drawn parameters of deltas move by at most tau of their size in a step
as well: what this project does).  The score is of validation; test data is not touched.

results.jsonl has a line per training, and the same command goes on where it stopped; table.md has
the means.  --trace prints, for the first steps of a training of `lora_all`, how far examples are
spread around their mean where the head begins, as a share of their size, and the loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.apply import apply
from searchpet.ask import Ask
from searchpet.calibrate import DRAWN, Calibration
from searchpet.ledger import claim
from searchpet.propose import propose
from searchpet.pruning import Prune
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.settings import Settings
from searchpet.spec import Spec
from searchpet.train import schedule

STRUCTURES = {
    "lora_all": Ask("uniform:lora_all", "wide", {}, "1%", False, None),
    "single_units": Ask("random:unit", "nano", {}, "0.01%", False, None),
    "thin_adapters": Ask("sparse_adapter", "adapters", {}, "29530", False, None),
    "four_layers": Ask("layer_drop:top", "wide", {"layer_drop.pet": "random:unit"}, "1%", False,
                       Prune("flops", "70%", "prune/layers")),
}
WAYS = ("drawn", "fitted", "fitted, capped")
TAUS = (0.03, 0.1, 0.3)
STEPS, LENGTH = 300, 32


class Free(Calibration):
    """Rates without a limit on drawn parameters."""

    def rates(self, tau: float) -> dict[str, float]:
        return {kind: rate for kind, rate in super().rates(tau).items() if kind != DRAWN}


class Arm(Session):
    """A session that trains in one of the ways."""

    way = WAYS[-1]

    def fit_head(self, model: nn.Module, encoded: Any, seed: int) -> None:
        if self.way != "drawn":
            super().fit_head(model, encoded, seed)

    def calibration(self, *args: Any) -> Calibration:
        found = super().calibration(*args)
        if self.way == WAYS[-1]:
            return found
        return Free(found.model, found.grafts, found.loss, found.head, found.lr)


def trace(session: Arm, spec: Spec, tau: float, steps: int) -> dict[str, list[float]]:
    """Spread of examples before the head and loss on 64 rows, after each of the first steps."""
    found: dict[str, list[float]] = {"spread": [], "loss": []}
    with session.fresh(0) as model:
        apply(model, spec, head=session.head, seed=0)
        session.fit_head(model, session.splits["train"], 0)
        groups = session._groups(model, spec, 0, tau)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        base = [group["lr"] for group in optimizer.param_groups]
        batches, loss = session.batches(session.splits["train"], 0), session.loss(model)
        held = session.splits["validation"].batches(64, 0)[0]
        seen: list[Tensor] = []
        owner = next(iter(sorted(session.head))).rpartition(".")[0]
        hook = model.get_submodule(owner).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].detach()))
        for step in range(steps):
            seen.clear()
            model.eval()
            with torch.no_grad():
                found["loss"].append(round(float(loss(held)), 2))
            model.train()
            h = seen[0]
            found["spread"].append(round(float((h - h.mean(0)).norm() / h.norm()), 2))
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * schedule(step, STEPS, session.recipe().warmup)
            optimizer.zero_grad()
            loss(batches[step]).backward()
            optimizer.step()
        hook.remove()
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []


def table(out: Path) -> str:
    """Mean and spread over seeds, by structure and tau, a column for each way."""
    scores: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows(out / "results.jsonl"):
        scores[row["structure"], row["tau"]][row["way"]].append(row["score"])
    text = ["| structure | tau | " + " | ".join(WAYS) + " |", "|---" * (2 + len(WAYS)) + "|"]
    for (structure, tau), found in sorted(
            scores.items(), key=lambda item: ([*STRUCTURES].index(item[0][0]), item[0][1])):
        cells = [f"{statistics.mean(s):.4f} ({statistics.stdev(s) if len(s) > 1 else 0:.4f})"
                 if (s := found.get(way)) else "" for way in WAYS]
        text.append(f"| {structure} | {tau:g} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of task folders")
    parser.add_argument("--task", default="trec6")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--structures", nargs="+", default=[*STRUCTURES], choices=[*STRUCTURES])
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    settings = Settings(task=args.task, data=args.data, steps=STEPS, max_length=LENGTH)

    @cache
    def session() -> Arm:
        return Arm(settings)

    @cache
    def spec(structure: str) -> Spec:
        folder = RunFolder(args.out / "work" / f"{structure}-{args.task}")
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.has("spec.json"):
            session().way = WAYS[-1]
            found, _ = propose(session(), folder, STRUCTURES[structure], 0)
            folder.write_text("spec.json", found.text())
        return Spec.load(folder.path)

    if args.trace:
        for way in WAYS[:2]:
            found = spec("lora_all")
            session().way = way
            for name, values in trace(session(), found, 0.1, 40).items():
                print(f"{way:7} {name:6}", *(f"{v:.2f}" for v in values), flush=True)
        return
    for structure in args.structures:
        for tau in TAUS:
            for seed in args.seeds:
                for way in WAYS:
                    key = {"structure": structure, "tau": tau, "seed": seed, "way": way}
                    name = f"{structure}-{tau}-{seed}-{way.replace(', ', '-')}"
                    with claim(args.out / "work" / name) as mine:
                        done = any(row | key == row for row in rows(args.out / "results.jsonl"))
                        if not mine or done:
                            continue
                        found = spec(structure)
                        session().way = way
                        outcome = session().fit(found, None, seed, tau=tau)
                        line = json.dumps({"task": args.task, **key,
                                           "score": round(outcome.score, 6),
                                           "trainable": outcome.trainable})
                        print(line, flush=True)
                        with (args.out / "results.jsonl").open("a", encoding="utf-8") as file:
                            file.write(line + "\n")
    (args.out / "table.md").write_text(table(args.out), encoding="utf-8")
    print(table(args.out))


if __name__ == "__main__":
    main()
