"""What a structure keeps of its worth on other tasks: a matrix and its means, from results.jsonl.

    python -m experiments.transfer.summary [experiments/transfer/before]

Rows are where structures come from, columns where they are trained; a cell is the mean score over
trainings, and in brackets its share of what the column's own structure reaches.  A task on which
that reaches next to nothing counts for no share and no mean; one that lacks trainings is left out.
matrix.png, beside the results, shows the tasks that count.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from searchpet import plot
from searchpet.ledger import RESULT_KEY, Ledger

NOTHING = 0.1  # the own structure's score, below which a share of it means nothing


def means(folder: Path) -> dict[str, dict[str, float]]:
    """method -> task -> mean score over trainings."""
    scores: dict[str, dict[str, list[float]]] = {}
    for row in Ledger(folder / "results.jsonl", RESULT_KEY).rows().values():
        scores.setdefault(row["method"], {}).setdefault(row["task"], []).append(row["score"])
    return {method: {task: statistics.fmean(found) for task, found in tasks.items()}
            for method, tasks in scores.items()}


def draw(folder: Path, tasks: list[str]) -> None:
    """matrix.png of these tasks."""
    rows = Ledger(folder / "results.jsonl", RESULT_KEY).rows().values()
    plot.transfer([
        {"source": row["method"].removeprefix("from "), "target": row["task"],
         "score": row["score"]} for row in rows if row["task"] in tasks
        and row["method"].removeprefix("from ") in (*tasks, "shared", "random", "random:unit")]
    ).savefig(folder / "matrix.png", dpi=160)


def cell(score: float, own: float) -> str:
    return f"{score:.4f} ({score / own:.3f})" if own >= NOTHING else f"{score:.4f}"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    found = means(folder)
    own = {task: found[f"from {task}"][task] for task in found["random"]
           if all(task in scores for scores in found.values())}
    told = [task for task in own if own[task] >= NOTHING]
    from_ = [method for method in found if method.startswith("from ")]
    print(f"| structure | {' | '.join(own)} | mean of {len(told)} |")
    print(f"|---{'|---' * (len(own) + 1)}|")
    for method, scores in found.items():
        cells = [cell(scores[task], own[task]) for task in own]
        mean = statistics.fmean(scores[task] for task in told)
        share = statistics.fmean(scores[task] / own[task] for task in told)
        print(f"| {method} | {' | '.join(cells)} | {mean:.4f} ({share:.3f}) |")
    elsewhere = [(m, b) for m in from_ for b in told if m != f"from {b}"]
    kept = statistics.fmean(found[m][b] / own[b] for m, b in elsewhere)
    ahead = [statistics.fmean(found[m][b] - found[other][b] for m, b in elsewhere)
             for other in ("random", "random:unit")]
    print(f"\n{len(elsewhere)} transfers: share of the own structure's score {kept:.4f}; ahead of "
          f"random modules by {ahead[0]:+.4f}, of random units by {ahead[1]:+.4f}")
    shared = statistics.fmean(found["shared"][task] - own[task] for task in told)
    print(f"One structure for all: {shared:+.4f} beside the own ones")
    draw(folder, told)


if __name__ == "__main__":
    main()
