"""What the number of units costs: steps of the search over the same deltas in ever finer units.

    python -m experiments.speed.units [--rounds 9] [--out experiments/speed]

MiniLM, batch 32 x 32 tokens, a bias and a scale on every linear and norm; a unit is so many
channels of one of them.  Each round runs every contender once, in rotating order, with a training
step of PEFT's LoRA (r = 1, all linears); the ratio to that is taken inside a round, the median
over rounds is reported with the quartiles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.speed.bench import (
    COLD,
    Step,
    backbone,
    interleaved,
    peft_lora,
    problem_on,
    row,
    search_step,
)
from searchpet import catalog
from searchpet.discover import discover
from searchpet.site import Site
from searchpet.space import Space
from searchpet.spacefile import Rule
from searchpet.supernet import Supernet

CHANNELS = (1, 4, 16, 64, 256, 1024)  # in a unit; 1024 is more than most have
WAYS: dict[str, dict[str, Any]] = {
    "two passes": {"levels": 2, "rows": False}, "one pass": {"levels": 1, "rows": False},
    "one pass, a gate per row": {"levels": 1, "rows": True}}


def blocks(channels: int) -> str:
    """The name of a grain: so many neighbouring channels are a unit."""
    def grain(site: Site, kind: str, width: int) -> Sequence[Hashable]:
        return [(site.path, site.role, kind, i // channels) for i in range(width)]

    catalog.add("grains", f"blocks{channels}", grain)
    return f"blocks{channels}"


def space_of(model: torch.nn.Module, channels: int) -> Space:
    return Space("units", discover(model), [
        Rule(kind=kind, grain=blocks(channels)) for kind in ("bias", "scale")])


def whole(channels: int, options: dict[str, Any], steps: int, loop: Callable[..., Any]) -> Step:
    """A search of `steps` steps without warm-up."""
    found = backbone()
    net = Supernet(found.model, space_of(found.model, channels), found.head, 0)
    return partial(catalog.get("strategies", "bilevel"),
                   problem_on(net, found.identity.parameters // 10_000, steps, loop),
                   **COLD, **options)


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for (way, values), colour in zip(found["ratio"].items(), ("#0072b2", "#e69f00", "#009e73"),
                                     strict=True):
        middle, low, high = zip(*values, strict=True)
        axis.plot(found["units"], middle, marker="o", color=colour, label=way)
        axis.fill_between(found["units"], low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(xscale="log", ylim=(0, None), xlabel="units",
             ylabel="search step / step of PEFT's LoRA")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    units = [len(space_of(backbone().model, channels)) for channels in CHANNELS]
    contenders: dict[str, Callable[[], Step]] = {"peft_lora": peft_lora} | {
        f"{way}/{channels}": partial(search_step, partial(whole, channels, options))
        for way, options in WAYS.items() for channels in CHANNELS}
    seconds = interleaved(args.rounds, contenders)
    base = seconds["peft_lora"]
    found = {"rounds": args.rounds, "units": units, "ratio": {
        way: [row([a / b for a, b in zip(seconds[f"{way}/{channels}"], base, strict=True)])
              for channels in CHANNELS] for way in WAYS}}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "units.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, args.out / "units.png")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
