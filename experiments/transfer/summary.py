"""What a structure keeps of its worth on other tasks: a matrix and its means, from results.jsonl.

    python -m experiments.transfer.summary

Rows are where structures come from, columns where they are trained; a cell is the mean score over
trainings, and in brackets its share of what the column's own structure reaches.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from searchpet.ledger import RESULT_KEY, Ledger

HOME = Path(__file__).parent


def means() -> dict[str, dict[str, float]]:
    """method -> task -> mean score over trainings."""
    scores: dict[str, dict[str, list[float]]] = {}
    for row in Ledger(HOME / "results.jsonl", RESULT_KEY).rows().values():
        scores.setdefault(row["method"], {}).setdefault(row["task"], []).append(row["score"])
    return {method: {task: statistics.fmean(found) for task, found in tasks.items()}
            for method, tasks in scores.items()}


def main() -> None:
    found = means()
    own = {task: found[f"from {task}"][task] for task in found["random"]}
    print(f"| structure | {' | '.join(own)} | mean |\n|---{'|---' * (len(own) + 1)}|")
    for method, scores in found.items():
        cells = [f"{scores[task]:.4f} ({scores[task] / own[task]:.3f})" for task in own]
        mean = statistics.fmean(scores[task] for task in own)
        share = statistics.fmean(scores[task] / own[task] for task in own)
        print(f"| {method} | {' | '.join(cells)} | {mean:.4f} ({share:.3f}) |")
    elsewhere = [(found[f"from {a}"][b], own[b], found["random"][b], found["random:unit"][b])
                 for a in own for b in own if a != b]
    kept = statistics.fmean(score / best for score, best, _, _ in elsewhere)
    modules, units = (statistics.fmean(row[0] - row[i] for row in elsewhere) for i in (2, 3))
    print(f"\nOf {len(elsewhere)} transfers: share of the own structure's score {kept:.4f}; ahead "
          f"of random modules by {modules:+.4f}, of random units by {units:+.4f}")
    shared = statistics.fmean(found["shared"][task] - own[task] for task in own)
    print(f"One structure for all: {shared:+.4f} beside the own ones")


if __name__ == "__main__":
    main()
