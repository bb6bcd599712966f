"""What a structure keeps of its worth on other tasks: a matrix and its means, from results.jsonl.

    python -m experiments.transfer.summary

Rows are where structures come from, columns where they are trained; a cell is the mean score over
trainings, and in brackets its share of what the column's own structure reaches.  A task on which
that reaches nothing counts for no share and no mean.
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


def cell(score: float, own: float) -> str:
    return f"{score:.4f} ({score / own:.3f})" if own else f"{score:.4f}"


def main() -> None:
    found = means()
    own = {task: found[f"from {task}"][task] for task in found["random"]}
    told = [task for task in own if own[task]]
    print(f"| structure | {' | '.join(own)} | mean of {len(told)} |")
    print(f"|---{'|---' * (len(own) + 1)}|")
    for method, scores in found.items():
        cells = [cell(scores[task], own[task]) for task in own]
        mean = statistics.fmean(scores[task] for task in told)
        share = statistics.fmean(scores[task] / own[task] for task in told)
        print(f"| {method} | {' | '.join(cells)} | {mean:.4f} ({share:.3f}) |")
    for name, sources in (("all", list(own)), ("without tasks that taught nothing", told)):
        elsewhere = [(a, b) for a in sources for b in told if a != b]
        kept = statistics.fmean(found[f"from {a}"][b] / own[b] for a, b in elsewhere)
        ahead = [statistics.fmean(found[f"from {a}"][b] - found[other][b] for a, b in elsewhere)
                 for other in ("random", "random:unit")]
        print(f"\n{len(elsewhere)} transfers ({name}): share of the own structure's score "
              f"{kept:.4f}; ahead of random modules by {ahead[0]:+.4f}, of random units by "
              f"{ahead[1]:+.4f}")
    shared = statistics.fmean(found["shared"][task] - own[task] for task in told)
    print(f"\nOne structure for all: {shared:+.4f} beside the own ones")


if __name__ == "__main__":
    main()
