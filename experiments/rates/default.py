"""At which tau, and with how many passes, is a default search best?

    python -m experiments.rates.default --data DIR [--tasks trec6 agreement] [--seeds 0 1]

A whole `searchpet search` each, searched and trained at the same tau, without controls: what a
user gets who sets nothing else.  Scores are of validation: a default is chosen here, nothing is
compared with anything else.  default.jsonl has a line for each; lines that are there are kept, and
several processes may run this at once.  default.md has the means.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import searchpet
from searchpet.ledger import Ledger, claim

HOME = Path(__file__).parent
KEY = ("way", "tau", "task", "seed")
WAYS: dict[str, dict[str, Any]] = {
    "one pass, a gate per row": {"levels": 1, "rows": True},
    "two passes": {"levels": 2, "rows": False},
}


def run(args: argparse.Namespace, ledger: Ledger, way: str, tau: float, task: str, seed: int,
        ) -> None:
    """One search, if no line has it and no other process is at it."""
    folder = HOME / "work" / f"{task}-{WAYS[way]['levels']}-{tau}-s{seed}"
    with claim(folder) as mine:
        if not mine or (way, tau, task, seed) in ledger.rows():
            return
        found = searchpet.search(
            task=task, budget="0.01%", controls=0, set=WAYS[way], tau=tau, seed=seed, steps=300,
            data=args.data, out=folder / "run",
            resume=(folder / "run" / "settings.json").is_file())
        values = found.values
        row = {
            "way": way, "tau": tau, "task": task, "seed": seed, "score": values["score"],
            "metric": values["metric"], "split": values["split"],
            "trainable": values["trainable"], "structure": values["spec_hash"],
            "seconds": values["seconds"]}
        ledger.add(row)
        print(json.dumps(row), flush=True)


def table(ledger: Ledger) -> str:
    """Mean over seeds by way, tau and task, and the mean of the tasks."""
    rows = list(ledger.rows().values())
    tasks = sorted({row["task"] for row in rows})
    lines = ["| search | tau | " + " | ".join(tasks) + " | mean | search / training, seconds |",
             "|" + "---|" * (len(tasks) + 4)]
    for way, tau in sorted({(row["way"], row["tau"]) for row in rows}):
        own = [row for row in rows if (row["way"], row["tau"]) == (way, tau)]
        by = {task: [row["score"] for row in own if row["task"] == task] for task in tasks}
        means = [statistics.fmean(by[task]) for task in tasks if by[task]]
        cells = [f"{statistics.fmean(by[t]):.4f} ({len(by[t])})" if by[t] else "" for t in tasks]
        whole = f"{statistics.fmean(means):.4f}" if len(means) == len(tasks) else ""
        ratio = statistics.fmean(row["seconds"]["search"] / row["seconds"]["train"] for row in own)
        lines.append(f"| {way} | {tau:g} | " + " | ".join(cells) + f" | {whole} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--taus", nargs="+", type=float, default=[0.03, 0.05, 0.1])
    parser.add_argument("--tasks", nargs="+", default=["agreement", "trec6", "sst2_sent"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    ledger = Ledger(HOME / "default.jsonl", KEY)
    for seed in args.seeds:
        for way in args.ways:
            for task in args.tasks:
                for tau in args.taus:
                    run(args, ledger, way, tau, task, seed)
    (HOME / "default.md").write_text(table(ledger), encoding="utf-8")


if __name__ == "__main__":
    main()
