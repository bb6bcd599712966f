"""Does a search find what was planted?  Recall at three levels, on a tiny transformer.

    python -m experiments.planted.run [--seeds 0 1 2] [--out DIR]

Labels come from a random backbone with deltas at some places (the teacher); the student has the
same backbone and head, and a rank-1 LoRA at every linear is a unit.  A search may buy as many
units as were planted; recall is the share of those that it does.  Levels differ in the number of
places and in how strong the planted deltas are, which is how many labels they change:

    easy    3 of 12 places, strength 3        hard    6 of 24 places, strength 1
    middle  6 of 24 places, strength 2

Every strategy has 32 examples a step and its defaults.  The same command goes on where it stopped,
and may run several times at once.  results.jsonl has a line per search, table.md the means.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from searchpet import catalog
from searchpet.ledger import Ledger, claim
from searchpet.space import Space
from searchpet.supernet import Supernet
from tests.laws import families as tiny
from tests.laws.problems import Draws, problem
from tests.test_planted import CLASSES, SHARPNESS, SIZE, WORDS, labels_of

ROWS = 32
LEVELS = {"easy": (2, 3, 3.0), "middle": (4, 6, 2.0), "hard": (4, 6, 1.0)}  # layers, places, B
TAU = 0.05  # this backbone is random and sharp: at 0.3 the deltas diverge
MATTERS = 0.1  # of the labels hang on every planted delta
STEPS = (200, 600, 1800)
QUICK = ("saliency", "saliency, energy", "random:unit")  # gain nothing from more steps
LONG = ("progressive", "s3pet", "bilevel, one pass, a gate per row")  # with the most steps too
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "progressive": ("progressive", {}), "s3pet": ("s3pet", {}),
    "bilevel": ("bilevel", {"levels": 2, "rows": False}),
    "bilevel, a gate per row": ("bilevel", {"levels": 2, "rows": True}),
    "bilevel, one pass": ("bilevel", {"levels": 1, "rows": False}),
    "bilevel, one pass, a gate per row": ("bilevel", {"levels": 1, "rows": True}),
    "polish, of a random structure": ("polish", {"of": "random:unit"}),
    "lagrangian": ("lagrangian", {}), "saliency": ("saliency", {}),
    "saliency, energy": ("saliency", {"by": "energy"}),
    "random:unit": ("random", {"variant": "unit"}),
}


def steps_of(method: str) -> tuple[int, ...]:
    """How long its searches are."""
    return STEPS[:1] if method in QUICK else STEPS if method in LONG else STEPS[:2]


def backbone(layers: int, seed: int) -> Any:
    """A random encoder, sharp enough that its texts differ."""
    config = transformers.BertConfig(
        hidden_size=SIZE, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * SIZE, vocab_size=WORDS, max_position_embeddings=8,
        num_labels=CLASSES,  # type: ignore[call-arg]
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(config)
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=1.0 if "embed" in name else p.shape[1] ** -0.5)
    return model.eval()


def candidates(model: nn.Module) -> Space:
    """A rank-1 LoRA on each linear."""
    return tiny.space(
        model, tiny.rule("lora", "module", {"rank": 1}, role=["attention.*", "ffn.*"]))


def plant(net: Supernet, places: set[int], strength: float, generator: torch.Generator) -> None:
    """Draw strong deltas at `places`, silent ones elsewhere."""
    for i, graft in enumerate(net.grafts.grafts):
        delta: Any = graft.delta
        size = strength / delta.scaling if i in places else 0.0
        delta.B.data.normal_(generator=generator).mul_(size)


@torch.no_grad()
def teacher(level: str, seed: int) -> tuple[Any, set[int], float]:
    """The backbone with strong deltas, which units they are, the share of labels changed.

    Places are drawn until each matters: without its delta at least `MATTERS` of the labels differ.
    Else a search would be asked for what can be left out; queries and keys often can.
    """
    layers, count, strength = LEVELS[level]
    model = backbone(layers, seed)
    space = candidates(model)
    net = Supernet(model, space, frozenset(), seed)
    rng, generator = random.Random(f"{level}{seed}"), torch.Generator().manual_seed(seed)
    batch = Draws(0, 500, WORDS)[0]

    def logits(*closed: int) -> Tensor:
        net.z = torch.tensor([float(i not in closed) for i in range(len(space))])
        found: Tensor = model(**batch).logits
        return found

    while True:
        planted = set(rng.sample(range(len(space)), count))
        plant(net, planted, strength, generator)
        whole = logits()
        center, spread = whole.mean(0), whole.std(0)

        def changed(*closed: int) -> float:
            label = [((x - center) / spread).argmax(-1) for x in (whole, logits(*closed))]  # noqa: B023
            return float((label[0] != label[1]).float().mean())

        if min(changed(i) for i in planted) >= MATTERS:
            break
    share = changed(*planted)
    net.z = torch.ones(len(space))
    model.classifier.weight *= SHARPNESS / spread[:, None]
    model.classifier.bias.sub_(SHARPNESS * center / spread)
    return model, planted, share


def search(level: str, method: str, steps: int, seed: int) -> dict[str, Any]:
    """One search, as a line of results.jsonl."""
    strategy, more = METHODS[method]
    expert, planted, changed = teacher(level, seed)
    student = backbone(LEVELS[level][0], seed)
    student.classifier.load_state_dict(expert.classifier.state_dict())
    space = candidates(student)
    limit = int(space.cost[sorted(planted)].sum())
    train, valid = (Draws(stream, ROWS, WORDS, labels_of(expert)) for stream in (1, 2))
    asked = problem(student, space, limit, steps=steps, seed=seed, head=frozenset(), tau=TAU,
                    train=train, valid=valid)
    began = time.process_time()
    keep = catalog.get("strategies", strategy)(asked, **more).keep
    spent = space.parameters(keep)
    if spent > limit:
        raise RuntimeError(f"{method} spent {spent} of {limit}")
    found = len(planted & set(keep.nonzero().squeeze(-1).tolist()))
    return {"level": level, "method": method, "steps": steps, "seed": seed,
            "recall": found / len(planted), "changed": round(changed, 3),
            "seconds": round(time.process_time() - began, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and spread of the recall by level, and the processor time of a search."""
    lines = ["| level | labels changed | method | steps | recall | spread | searches | seconds |",
             "|---|---|---|---|---|---|---|---|"]
    for level in LEVELS:
        here = [r for r in rows if r["level"] == level]
        cells = {(m, s): [r for r in here if (r["method"], r["steps"]) == (m, s)]
                 for m in METHODS for s in STEPS}
        for (method, steps), own in sorted(cells.items(), key=lambda c: -_mean(c[1], "recall")):
            if own:
                spread = statistics.stdev(r["recall"] for r in own) if len(own) > 1 else 0.0
                lines.append(
                    f"| {level} | {_mean(own, 'changed'):.0%} | {method} | {steps} | "
                    f"{_mean(own, 'recall'):.2f} | {spread:.2f} | {len(own)} | "
                    f"{_mean(own, 'seconds'):.0f} |")
    return "\n".join(lines) + "\n"


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(r[name] for r in rows) if rows else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Ledger(args.out / "results.jsonl", ("level", "method", "steps", "seed"))
    for cell in itertools.product(LEVELS, METHODS, STEPS, args.seeds):
        if cell not in results.rows() and cell[2] in steps_of(cell[1]):
            with claim(args.out / "work" / "-".join(map(str, cell))) as mine:
                if mine and cell not in results.rows():
                    results.add(search(*cell))
    text = table(list(results.rows().values()))
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
