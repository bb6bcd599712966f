"""Writes train, validation and test of `negation` beside itself: python notebooks/negation/make.py

A statement about a film, a meal or a room: is it praise?  `not`, `hardly` and `anything but` turn
praise into blame and back, so single words do not give the answer.  No adjective of validation or
test occurs in training.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

GOOD = ("good great fine brilliant lovely superb pleasant charming "
        "excellent wonderful splendid delightful").split()
BAD = ("bad awful poor dull ugly terrible boring nasty "
       "dreadful horrible dismal miserable").split()
SUBJECTS = "the film|this book|our meal|her song|that room|the play|his speech|the trip".split("|")
TURNS = {"is": False, "was really": False, "is not": True, "was hardly": True,
         "is anything but": True, "was, as they say,": False}
SPLITS = {"train": (0, 8, 320), "validation": (8, 10, 120), "test": (10, 12, 120)}


def rows(first: int, last: int, count: int) -> list[dict[str, str]]:
    """`count` statements with the adjectives from `first` to `last` of either sort, balanced."""
    found: dict[str, list[str]] = {"praise": [], "blame": []}
    for subject, (turn, turned), good in itertools.product(SUBJECTS, TURNS.items(), (True, False)):
        for word in (GOOD if good else BAD)[first:last]:
            found["praise" if good != turned else "blame"].append(f"{subject} {turn} {word}")
    rng = random.Random(first)
    both = [{"text": text, "label": label} for label, texts in found.items()
            for text in rng.sample(texts, count // 2)]
    rng.shuffle(both)
    return both


if __name__ == "__main__":
    for split, (first, last, count) in SPLITS.items():
        lines = [json.dumps(row) + "\n" for row in rows(first, last, count)]
        Path(__file__).with_name(f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
