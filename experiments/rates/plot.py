"""Which tau each kind wants, from sweep.jsonl: a table, and the curves as rates.png.

    python -m experiments.rates.plot

Scores are of validation.  `lost` is what a kind loses at the tau that is best for all together,
the one with the highest mean over kinds and tasks, beside its own best one.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

from searchpet.ledger import SWEEP_KEY, Ledger

matplotlib.use("Agg")

import matplotlib.pyplot as plt

HOME = Path(__file__).parent
LOOK = (("#0072b2", "o"), ("#e69f00", "s"), ("#009e73", "^"), ("#d55e00", "D"), ("#cc79a7", "v"))
Curves = dict[str, dict[str, dict[float, float]]]  # task -> kind -> tau -> score


def curves() -> Curves:
    found: Curves = {}
    for row in Ledger(HOME / "sweep.jsonl", SWEEP_KEY).rows().values():
        kinds = found.setdefault(row["task"], {})
        kinds.setdefault(row["method"], {})[row["tau"]] = row["score"]
    return found


def common(found: Curves) -> float:
    """The tau with the highest mean over kinds and tasks."""
    every = [scores for kinds in found.values() for scores in kinds.values()]
    return max(sorted(every[0]), key=lambda tau: statistics.fmean(s[tau] for s in every))


def table(found: Curves) -> str:
    shared = common(found)
    lines = [f"| task | kind | best tau | its score | lost at {shared:g} |",
             "|---|---|---|---|---|"]
    for task, kinds in found.items():
        for kind, scores in kinds.items():
            best = max(sorted(scores), key=scores.__getitem__)
            lines.append(f"| {task} | {kind} | {best:g} | {scores[best]:.4f} | "
                         f"{scores[best] - scores[shared]:.4f} |")
    return "\n".join(lines) + "\n"


def draw(found: Curves, path: Path) -> None:
    shared = common(found)
    figure, row = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.6), sharex=True,
                               layout="constrained", squeeze=False)
    for axis, (task, kinds) in zip(row[0], found.items(), strict=True):
        axis.axvspan(shared / 3, shared * 3, color="#efefef")
        for (kind, scores), (color, marker) in zip(kinds.items(), LOOK, strict=True):
            taus = sorted(scores)
            axis.plot(taus, [scores[t] for t in taus], color=color, marker=marker, label=kind)
        axis.set(xscale="log", xlabel="tau", title=task)
        axis.spines[["top", "right"]].set_visible(False)
    row[0][0].set_ylabel("accuracy on validation")
    handles, labels = row[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    found = curves()
    draw(found, HOME / "rates.png")
    print(table(found), end="")


if __name__ == "__main__":
    main()
