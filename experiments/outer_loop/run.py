"""Is the outer loop worth its time?  Four ways to spend the same time, and one longer search.

    python experiments/outer_loop/run.py --data DIR [--tasks trec6 agreement] [--seeds 0 1 2]

- default: one search with the defaults, as `searchpet search` does it.
- tune: `searchpet tune`, 20 trials, TPE, successive halving.
- random: the same knobs drawn at random, nothing tried first (random.toml), every trial to its
  end, for as long as `tune` took.
- autopeft: `searchpet tune --strategy tpe`, where the knobs are the structure, for as long.
- long: one search with the defaults and as many steps as the winners are trained with, 300.

Trials have 100 steps; the winner of each, chosen by validation, is trained anew with 300 steps
at its own tau and scored on test, once.  Runs are told apart by task, way and seed, and lie in
--out/work; what is there is not run again, and an unfinished study is continued.  Several
processes may run this at once.  results.jsonl has a line per winner with the command,
curves.jsonl the best validation score over the seconds of each study, table.md the means,
curves.png a picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from searchpet.ledger import claim
from searchpet.roster import trials_of
from searchpet.study import join

WAYS = ("default", "long", "tune", "random", "autopeft")
ONCE = ("default", "long")  # one search, no study
SHORT, FULL, TRIALS = 100, 300, 20
BUDGET = "0.01%"
SPENT = "seconds.json"


class Arm:
    """One way on one task with one seed."""

    def __init__(self, args: argparse.Namespace, task: str, way: str, seed: int) -> None:
        self.task, self.way, self.seed = task, way, seed
        self.folder = args.out / "work" / f"{task}-{way}-s{seed}"
        self.data = args.data or "DIR"
        self.common = ["--task", task, "--seed", str(seed), "--max-length", "32",
                       "--precision", "bf16",
                       *(["--data", args.data] if args.data and task != "agreement" else [])]

    def words(self, seconds: float | None) -> list[str]:
        """The command that finds a winner; seconds: what `tune` took."""
        words = [*self.common, "--budget", BUDGET, "--steps",
                 str(FULL if self.way == "long" else SHORT)]
        if self.way in ONCE:
            return ["search", *words, "--controls", "0"]
        if self.way == "tune":
            return ["tune", *words, "--trials", str(TRIALS)]
        words += ["--trials", "1000", "--timeout", f"{seconds:.0f}s", "--pruner", "none"]
        knobs = str(Path(__file__).with_name("random.toml"))
        return ["tune", *words, *(["--sampler", "random", "--knobs", knobs]
                                  if self.way == "random" else ["--strategy", "tpe"])]

    def find(self, seconds: float | None) -> dict[str, Any]:
        """Run it, or go on with it; what it came to."""
        found = self.folder / "found"
        words = self.words(seconds)
        if not (found / "result.json").is_file():
            before = spent(self.folder)
            rest = self.words(max(1.0, seconds - before)) if seconds else words
            resume = ["--resume"] if (found / "settings.json").is_file() else []
            began = time.monotonic()
            try:
                searchpet([*rest, "--out", str(found), "--quiet", *resume])
            finally:
                note(self.folder / SPENT, before + time.monotonic() - began)
        final = [*self.common, "--steps", str(FULL), "--test", "--out", str(self.folder / "final"),
                 "--tau", str(json.loads((found / "result.json").read_text())["tau"]), "--quiet"]
        if not (self.folder / "final" / "result.json").is_file():
            resume = ["--resume"] if (self.folder / "final" / "settings.json").is_file() else []
            searchpet(["train", str(found / "spec.json"), *final, *resume])
        return self.line(words)

    def line(self, words: list[str]) -> dict[str, Any]:
        """A winner, and what its study spent on what."""
        found = json.loads((self.folder / "found" / "result.json").read_text())
        final = json.loads((self.folder / "final" / "result.json").read_text())
        line = {"task": self.task, "way": self.way, "seed": self.seed, "score": final["score"],
                "metric": final["metric"], "split": final["split"],
                "validation_of_trial": found["validation_score"],
                "trainable": final["trainable"], "strategy": found["strategy"],
                "seconds": spent(self.folder),
                "command": " ".join(["searchpet", *words]).replace(self.data, "DIR").replace(
                    f"{Path(__file__).parent}/", "experiments/outer_loop/")}
        if self.way not in ONCE:
            trials = self.trials()
            took: dict[str, list[float]] = defaultdict(list)
            for trial in trials:
                if trial.user_attrs.get("reused") is None:
                    took[trial.state.name].append(trial.user_attrs.get("seconds", 0.0))
            pruned = sum(trial.state.name == "PRUNED" for trial in trials)
            line |= {"trials": len(trials), "pruned": pruned, **{
                f"seconds_{name.lower()}": round(statistics.mean(values), 1)
                for name, values in sorted(took.items())}}
        return line

    def trials(self) -> list[Any]:
        return trials_of(join(f"sqlite:///{self.folder / 'found' / 'study.db'}", None))

    def curve(self) -> list[tuple[float, float]]:
        """(seconds, best validation score so far) after each trial that ran to its end."""
        if self.way in ONCE:
            result = json.loads((self.folder / "found" / "result.json").read_text())
            return [(spent(self.folder), result["validation_score"])]
        points, best = [], 0.0
        trials = [t for t in self.trials() if t.state.name == "COMPLETE"]
        if trials:
            began = min(t.datetime_start for t in trials)
            for trial in sorted(trials, key=lambda t: t.datetime_complete):
                best = max(best, trial.values[0])
                points.append(((trial.datetime_complete - began).total_seconds(), best))
        return points


def searchpet(words: Sequence[str]) -> None:
    """A command of its own process; its output goes through."""
    print("searchpet", *words, flush=True)
    subprocess.run([sys.executable, "-m", "searchpet", *words], check=True)


def note(path: Path, seconds: float) -> None:
    path.write_text(json.dumps(round(seconds, 1)))


def spent(folder: Path) -> float:
    """Seconds that an arm has taken so far; those of a process that was killed are not known."""
    path = folder / SPENT
    return float(json.loads(path.read_text())) if path.is_file() else 0.0


def lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def table(out: Path) -> str:
    """Means and spreads over seeds, by task and way."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines(out / "results.jsonl"):
        rows[line["task"], line["way"]].append(line)
    text = ["| task | way | mean | spread | seeds | seconds | trials |",
            "|---|---|---|---|---|---|---|"]
    for (task, way), found in sorted(rows.items(), key=lambda r: (r[0][0], WAYS.index(r[0][1]))):
        scores = [line["score"] for line in found]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        text.append(
            f"| {task} | {way} | {statistics.mean(scores):.4f} | {spread:.4f} | {len(scores)} | "
            f"{statistics.mean(line['seconds'] for line in found):.0f} | "
            f"{statistics.mean(line.get('trials', 1) for line in found):.0f} |")
    return "\n".join(text) + "\n"


def picture(out: Path) -> None:
    """Best validation score over seconds, a line per seed, a colour per way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = list(lines(out / "curves.jsonl"))
    tasks = sorted({curve["task"] for curve in curves})
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.6), squeeze=False,
                                layout="constrained")
    colours = dict(zip(WAYS, ("#000000", "#cc79a7", "#0072b2", "#e69f00", "#009e73"), strict=True))
    for axis, task in zip(axes[0], tasks, strict=True):
        named = set()
        for curve in (c for c in curves if c["task"] == task):
            way, points = curve["way"], curve["points"]
            axis.step([p[0] / 60 for p in points], [p[1] for p in points], where="post",
                      marker="o", markersize=3, color=colours[way],
                      label=None if way in named else way)
            named.add(way)
        axis.set(title=task, xlabel="minutes", ylabel="best validation score so far")
    named_lines = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(named_lines.values(), named_lines.keys(), loc="outside lower center",
                  ncols=len(WAYS), frameon=False)
    figure.savefig(out / "curves.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of task folders")
    parser.add_argument("--tasks", nargs="+", default=["trec6", "agreement"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    for task in args.tasks:
        for seed in args.seeds:
            for way in args.ways:
                arm = Arm(args, task, way, seed)
                arm.folder.mkdir(parents=True, exist_ok=True)
                key = {"task": task, "way": way, "seed": seed}
                if any(line | key == line for line in lines(args.out / "results.jsonl")):
                    continue
                tuned = Arm(args, task, "tune", seed).folder
                if way in ("random", "autopeft") and not (tuned / "final/result.json").is_file():
                    continue  # its time is not known yet; the next call takes it up
                with claim(arm.folder) as mine:
                    if not mine:
                        continue
                    line = arm.find(spent(tuned) if way in ("random", "autopeft") else None)
                    curve = key | {"points": arm.curve()}
                    for name, row in (("results", line), ("curves", curve)):
                        with (args.out / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
    (args.out / "table.md").write_text(table(args.out), encoding="utf-8")
    picture(args.out)
    print(table(args.out))


if __name__ == "__main__":
    main()
