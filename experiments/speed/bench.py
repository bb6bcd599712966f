"""Times and memory of a step, interleaved with PEFT on the same backbone and batch.

    python experiments/speed/bench.py [--rounds 15] [--out experiments/speed]

MiniLM, batch 32 x 32 tokens.  Each round runs every contender once, in rotating order; the ratio
is taken inside a round, and the median over rounds is reported with the quartiles.  Peak memory
is the largest resident set of a fresh process that does one job and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from searchpet import catalog
from searchpet.apply import apply
from searchpet.backbone import DEFAULT, load_backbone
from searchpet.budget import fill, shift
from searchpet.calibrate import probe, rates
from searchpet.discover import discover
from searchpet.run import StageLoop
from searchpet.space import Space, build_space
from searchpet.spacefile import Rule
from searchpet.spec import BackboneId, BudgetUse, Spec
from searchpet.strategies import Problem
from searchpet.supernet import Supernet
from searchpet.train import loss_of

ROWS, LENGTH, LABELS = 32, 32, 6
Step = Callable[[], None]


def batch(seed: int, rows: int = ROWS, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """One batch of random tokens, (rows, length), no padding."""
    g = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1000, 20000, (rows, length), generator=g),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "labels": torch.randint(0, LABELS, (rows,), generator=g),
    }


def backbone() -> Any:
    return load_backbone(DEFAULT, outputs=LABELS, regression=False, seed=0)


def stepper(model: torch.nn.Module) -> Step:
    """One training step of everything that requires a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    loss, data = loss_of(model), batch(0)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        loss(data).backward()
        optimizer.step()

    return step


def ours_lora() -> Step:
    """A spec with a rank-1 LoRA on every linear."""
    found = backbone()
    model = found.model
    rule = Rule(kind="lora", grain="module", options={"rank": 1})
    space = Space("lora", discover(model), [rule])
    keep = torch.ones(len(space), dtype=torch.bool)
    identity = found.identity
    spec = Spec(
        backbone=BackboneId(name=identity.name, revision=identity.revision,
                            config_hash=identity.config_hash, parameters=identity.parameters),
        entries=space.entries(keep),
        budget=BudgetUse(text=str(space.total), limit=space.total, used=space.total, slack=0,
                         denominator=identity.parameters))
    return stepper(apply(model, spec, head=found.head))


def peft_lora() -> Step:
    """The same structure in PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=1, lora_alpha=16, lora_dropout=0.0, modules_to_save=["classifier"],
        target_modules=r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)"
                       r"|attention\.output\.dense|intermediate\.dense|output\.dense)")
    return stepper(get_peft_model(backbone().model, config))


def searching(strategy: str, space: str, steps: int, loop: Callable[..., Any],
              **options: Any) -> Step:
    """A whole search of `steps` steps, as one call.  options: of the strategy."""
    found = backbone()
    net = Supernet(found.model, build_space(space, discover(found.model)), found.head, 0)
    limit = found.identity.parameters // 10_000
    return partial(catalog.get("strategies", strategy),
                   problem_on(net, limit, steps, loop), **options)


def problem_on(net: Supernet, limit: int, steps: int, loop: Callable[..., Any],
               rows: int = ROWS, length: int = LENGTH) -> Problem:
    """A search on batches of (rows, length) tokens, with calibrated rates."""
    first, second, third = (batch(seed, rows, length) for seed in range(3))
    loss = loss_of(net.model)
    net.model.eval()
    speeds = rates(probe(net.grafts, lambda: loss(third)), 0.1, {"head": 1e-3})
    net.model.train()
    return Problem(
        net=net, space=net.space, limit=limit, train=_Endless(first), valid=_Endless(second),
        loss=loss, rates=speeds, steps=steps, loop=loop,
        generator=torch.Generator().manual_seed(0))


def plain_loop(steps: int, **state: Any) -> StageLoop:
    return StageLoop(None, "search", steps, 0, torch.Generator(), state=state)


def search_step(whole: Callable[[int, Callable[..., Any]], Step]) -> Step:
    """A search held between steps, in a thread of its own: each call lets it take one more.

    whole: from a number of steps and the loop to the search.
    """
    go, done = Event(), Event()

    class Held(StageLoop):
        def __iter__(self) -> Any:
            for step in super().__iter__():
                go.wait()
                go.clear()
                yield step
                done.set()

    def held(steps: int, **state: Any) -> StageLoop:
        return Held(None, "search", steps, 0, torch.Generator(), state=state)

    Thread(target=whole(10_000, held), daemon=True).start()

    def step() -> None:
        go.set()
        done.wait()
        done.clear()

    return step


class _Endless:
    """The same batch at every step."""

    def __init__(self, data: dict[str, torch.Tensor]) -> None:
        self.data = data

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return self.data


COLD: dict[str, Any] = {"warmup": 0.0}
SEARCHES = {
    "bilevel_s3pet_mix": partial(searching, "bilevel", "s3pet_mix", **COLD, levels=2,
                                 rows=False),
    "bilevel_nano": partial(searching, "bilevel", "nano", **COLD, levels=2, rows=False),
    "one_pass_nano": partial(searching, "bilevel", "nano", **COLD, levels=1, rows=False),
    "one_pass_rows_nano": partial(searching, "bilevel", "nano", **COLD, levels=1, rows=True),
    "s3pet_s3pet_mix": partial(searching, "s3pet", "s3pet_mix"),
}
CONTENDERS: dict[str, Callable[[], Step]] = {
    "peft_lora": peft_lora, "spec_lora": ours_lora,
    **{name: partial(search_step, whole) for name, whole in SEARCHES.items()},
}


def interleaved(rounds: int, contenders: Mapping[str, Callable[[], Step]],
                ) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    steps = {name: make() for name, make in contenders.items()}
    names = list(steps)
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names):] + names[: i % len(names)]:
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def peak(name: str) -> float:
    """Largest resident set, MB, of a process that takes three steps of one contender."""
    out = subprocess.run([sys.executable, __file__, "--one", name], check=True,
                         capture_output=True, text=True)
    return float(out.stdout.strip().splitlines()[-1])


def million() -> dict[str, list[float]]:
    """Seconds of `shift` and `fill` for a million units, five times each."""
    g = torch.Generator().manual_seed(0)
    alpha = torch.randn(1_000_000, generator=g, dtype=torch.float64)
    price = torch.randint(1, 5000, (1_000_000,), generator=g)
    score, limit = torch.rand(1_000_000, generator=g), 1_000_000
    seconds: dict[str, list[float]] = {"shift": [], "fill": []}
    jobs: dict[str, Callable[[], Any]] = {
        "shift": lambda: shift(alpha, price, limit), "fill": lambda: fill(score, price, limit)}
    for name, job in jobs.items():
        for _ in range(6):
            began = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def row(values: list[float], digits: int = 3) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return [round(v, digits) for v in (middle, low, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        if args.one in SEARCHES:
            SEARCHES[args.one](3, plain_loop)()
        else:
            step = CONTENDERS[args.one]()
            for _ in range(3):
                step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
        return
    # first, while this process is small: a child starts with the peak of its parent
    peaks = {name: round(peak(name), 1) for name in CONTENDERS}
    seconds = interleaved(args.rounds, CONTENDERS)
    base = seconds["peft_lora"]
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch "
                   f"{torch.__version__}",
        "rounds": args.rounds,
        "ratio_to_peft_lora_median_q1_q3": {
            name: row([a / b for a, b in zip(values, base, strict=True)])
            for name, values in seconds.items()},
        "seconds_median_q1_q3": {name: row(values, 4) for name, values in seconds.items()},
        "peak_mb": peaks,
        "peak_ratio_to_peft_lora": {
            name: round(value / peaks["peft_lora"], 3) for name, value in peaks.items()},
        "million_units_seconds_median_q1_q3": {n: row(v, 4) for n, v in million().items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
