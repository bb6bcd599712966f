"""At which of several budgets should the one search run?  Recall of a planted structure.

Labels come from the backbone with strong deltas at three of twelve places (tests/test_planted.py).
A search that has room for 3, 6 or 11 of them ranks all twelve; how many of the planted are among
the first three?  3 is a search of the small budget's own, 11 the largest, 6 the middle between.
"""

from __future__ import annotations

from typing import Any

import torch

from searchpet import catalog
from tests.laws.problems import Draws, problem
from tests.test_planted import TAU, WORDS, backbone, candidates, labels_of, teacher

STEPS, ROWS, SEEDS = 200, 32, range(5)


def found(places: int, seed: int) -> int:
    """Planted among the first three of a search with room for `places`."""
    expert: Any = teacher(seed)
    student: Any = backbone(seed)
    student.classifier.load_state_dict(expert.classifier.state_dict())
    space, planted = candidates(student)
    limit = places * int(space.cost.sum()) // len(space)
    train, valid = (Draws(stream, ROWS, WORDS, labels_of(expert)) for stream in (1, 2))
    asked = problem(student, space, limit, steps=STEPS, seed=seed, head=frozenset(), tau=TAU,
                    train=train, valid=valid)
    score = catalog.get("strategies", "bilevel")(asked).score / space.cost
    return len(planted & set(score.topk(len(planted)).indices.tolist()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| searched with room for | planted among the first three, of 3, by seed | mean |")
    print("|---|---|---|")
    for places in (3, 6, 11):
        hits = [found(places, seed) for seed in SEEDS]
        print(f"| {places} of 12 | {' '.join(map(str, hits))} | {sum(hits) / len(hits):.2f} |",
              flush=True)
