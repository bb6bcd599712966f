"""How operators combine: prune, PET training, distillation, quantisation, in more than one order.

    python experiments/prune/operators.py [--task trec6 --data DIR] [--seeds 0 1 2] [--out DIR]

T: a PET structure of 1 % is searched and trained.  P: 40 % of the blocks' FLOPs are removed, by
Wanda per FLOP.  D: the training also learns from the dense model T.  Q: linears in int8, weights
per tensor, activations as they come (torch.ao's quantize_dynamic, on the CPU), PET merged before.
Letters are in the order of work:

    T     dense: the base of all ratios         PT    P, then search and training
    TP    T, then P; nothing is trained after   TPT   TP trained again, from what it has inherited
    TPt   TPT from fresh deltas and head        TD    T's structure trained with D
    PTD   PT's structure trained with D         TPTD  TPT with D in the second training
    TDPT  TD, then P, trained without D         ...Q  quantised at the end

Two orders exist for P and T, and for P and D.  T after Q does not: int8 weights of this kind have
no gradient; nor D after Q, nor P after Q, which removes rows of floating-point matrices.
Predicted is the base times the ratios of single operators (Xin et al. 2022, arXiv:2208.00483).
The same command goes on where it stopped.  results.jsonl has a line per model, table.md the means.
"""

from __future__ import annotations

import argparse
import io
import math
import shutil
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import searchpet
from searchpet import catalog
from searchpet.flops import flops
from searchpet.ledger import Ledger
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.settings import Settings
from searchpet.settle import settle
from searchpet.spec import Spec
from searchpet.strategies import Problem, Ranking

BASE = "T"
SINGLE = {"P": "PT", "p": "TPT", "x": "TP", "D": "TD", "Q": "TQ"}  # operator -> alone on the base
COMBINED = {  # model -> operators that it combines
    "PTQ": "PQ", "TPQ": "xQ", "TPTQ": "pQ", "TDQ": "DQ", "PTD": "PD", "TPTD": "pD",
    "TDPT": "pD", "PTDQ": "PDQ", "TPTDQ": "pDQ", "TDPTQ": "pDQ"}
ORDERS = (("PT", "TP"), ("PT", "TPT"), ("TPT", "TPt"), ("TPTD", "TDPT"), ("PTD", "TPTD"))
SCORE = "wanda"  # needs no gradient, so it is as good before a training as after
FIGURES = ("score", "flops", "bytes")


def prune_trained(problem: Problem, *, run: str = "", batches: int = 8) -> Ranking:
    """Prune a trained run: its PET and head are put in place, prune units go by a score."""
    spec, (tensors, _) = Spec.load(run), RunFolder(run).read_tensors("delta.safetensors")
    space, kept = problem.space, {entry.key: entry.kept for entry in spec.entries}
    keep = torch.zeros(len(space), dtype=torch.bool)
    for p in space.placements:
        if p.neutral == 0:
            key = f"{p.site.path}:{p.site.role}:{p.kind}"
            keep[space.unit[p.start + torch.tensor(kept.get(key, []), dtype=torch.int64)]] = True
    with torch.no_grad():
        for name, parameter in problem.net.model.named_parameters():
            if f"head/{name}" in tensors:
                parameter.copy_(tensors[f"head/{name}"])
        for graft in problem.net.grafts.grafts:
            if graft.key in kept:
                for name, parameter in graft.delta.named_parameters():
                    spread(parameter, tensors[f"{graft.key}/{name}"], kept[graft.key])
    problem.net.z = torch.where(space.prunes, 1.0, keep.float())
    score = problem.importance(SCORE, [problem.train[i] for i in range(batches)])
    stays = settle(problem.limits, score, "per_cost")
    return Ranking(score, torch.where(space.prunes, stays, keep))


prune_trained.TRAINS = True  # type: ignore[attr-defined]  # it leaves what the run has learned
catalog.add("strategies", "prune_trained", prune_trained)


def spread(whole: torch.Tensor, part: torch.Tensor, kept: list[int]) -> None:
    """Write the kept coordinates of a delta's parameter into the whole one."""
    shorter = [d for d in range(whole.dim()) if whole.shape[d] != part.shape[d]]
    if shorter:
        whole.index_copy_(shorter[0], torch.tensor(kept), part)
    else:
        whole.copy_(part)


def quantised(model: nn.Module) -> nn.Module:
    """A copy with linears in int8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao, which is not here
        found: nn.Module = torch.ao.quantization.quantize_dynamic(
            model, {nn.Linear}, dtype=torch.qint8)
    return found


def size(model: nn.Module) -> int:
    """Bytes of the stored weights."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


class Bench:
    """The models of one seed."""

    def __init__(self, args: argparse.Namespace, seed: int, results: Ledger) -> None:
        self.args, self.seed, self.results = args, seed, results
        self.home = args.out / "work" / f"seed-{seed}"
        self.common: dict[str, Any] = {
            "task": args.task, "data": args.data, "model": args.model, "steps": args.steps,
            "batch_size": args.batch_size, "tau": args.tau, "seed": seed, "device": "cpu"}
        self.training = {**self.common, "precision": args.precision}  # every score is in fp32
        self.session: Session | None = None

    def run(self) -> None:
        """Every model that has no line yet; each comes after what it starts from."""
        dense, pruned = str(self.home / "T"), {"keep_flops": self.args.keep_flops}
        after = {"strategy": "prune_trained", **pruned}
        self.model("T", lambda: self.search("T", strategy="bilevel"))
        self.model("PT", lambda: self.search(
            "PT", strategy="prune_first", set={"score": SCORE}, **pruned))
        self.model("TPT", lambda: self.search("TPT", set={"run": dense}, inherit=True, **after))
        self.model("TP", self.untrained)
        self.model("TPt", lambda: self.search("TPt", set={"run": dense}, **after))
        self.model("TD", lambda: self.train("TD", "T", dense))
        self.model("PTD", lambda: self.train("PTD", "PT", dense))
        self.model("TPTD", lambda: self.search(
            "TPTD", set={"run": dense}, inherit=True, distill=dense, **after))
        self.model("TDPT", lambda: self.search(
            "TDPT", set={"run": str(self.home / "TD")}, inherit=True, **after))

    def search(self, name: str, **more: Any) -> None:
        searchpet.search(**self.training, space="wide", budget=self.args.budget, controls=0,
                         out=self.home / name, resume=True, **more)

    def train(self, name: str, spec: str, teacher: str) -> None:
        searchpet.train(self.home / spec, **self.training, distill=teacher,
                        out=self.home / name, resume=True)

    def untrained(self) -> None:
        """TP: TPT as it was before its training."""
        folder, source = self.home / "TP", self.home / "TPT"
        folder.mkdir(exist_ok=True)
        for name in ("settings.json", "spec.json"):
            shutil.copyfile(source / name, folder / name)
        shutil.copyfile(source / "inherit.safetensors", folder / "delta.safetensors")

    def model(self, name: str, make: Callable[[], None]) -> None:
        """Build a model; add its line, and that of it quantised."""
        if (self.seed, name + "Q") in self.results.rows():
            return
        make()
        model = searchpet.merge(searchpet.load(self.home / name)).eval()
        cost = sum(flops(model).values())
        self.add(name, model, cost)
        self.add(name + "Q", quantised(model), cost)  # as many operations, on smaller numbers

    def add(self, name: str, model: nn.Module, cost: int) -> None:
        if self.session is None:
            self.session = Session(Settings(**self.common))
        score = next(iter(self.session.evaluate(model, self.args.split).values()))
        self.results.add({"seed": self.seed, "name": name, "score": score, "flops": cost,
                          "bytes": size(model)})
        print(f"seed {self.seed} {name}: {score:.4f}", flush=True)


def table(rows: dict[tuple[Any, ...], dict[str, Any]], seeds: list[int]) -> str:
    """Three tables: what was measured, predicted against measured, and orders."""
    names = sorted({name for _, name in rows}, key=lambda n: (n.endswith("Q"), len(n), n))
    found = {name: [rows[seed, name] for seed in seeds] for name in names}

    def of(name: str, figure: str) -> list[float]:
        return [float(row[figure]) for row in found[name]]

    lines = ["| model | score | spread | FLOPs / T | bytes / T |", "|---|---|---|---|---|"]
    for name in names:
        lines.append(f"| {name} | {mean(of(name, 'score')):.4f} | {sd(of(name, 'score')):.4f} | "
                     + " | ".join(f"{ratio(of(name, f), of(BASE, f)):.3f}" for f in FIGURES[1:])
                     + " |")
    lines += ["", "| model | operators | " + " | ".join(
        f"{f} / T predicted | measured" for f in FIGURES) + " |", "|---" * 8 + "|"]
    for name, operators in COMBINED.items():
        cells = []
        for f in FIGURES:
            alone = math.prod(ratio(of(SINGLE[o], f), of(BASE, f)) for o in operators)
            cells += [f"{alone:.3f}", f"{ratio(of(name, f), of(BASE, f)):.3f}"]
        lines.append(f"| {name} | {' '.join(SINGLE[o] for o in operators)} | "
                     + " | ".join(cells) + " |")
    lines += ["", "| one | other | one - other, score | spread over seeds | spread of T |",
              "|---|---|---|---|---|"]
    for one, other in ORDERS:
        gaps = [a - b for a, b in zip(of(one, "score"), of(other, "score"), strict=True)]
        lines.append(f"| {one} | {other} | {mean(gaps):+.4f} | {sd(gaps):.4f} | "
                     f"{sd(of(BASE, 'score')):.4f} |")
    return "\n".join(lines) + "\n"


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def sd(values: list[float]) -> float:
    """Sample standard deviation; nan for one seed."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def ratio(values: list[float], base: list[float]) -> float:
    return mean(values) / mean(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="trec6")
    parser.add_argument("--data", default=None, help="folder of task folders")
    parser.add_argument("--model", default=Settings.model)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tau", type=float, default=Settings.tau)
    parser.add_argument("--precision", default=Settings.precision)
    parser.add_argument("--budget", default="1%")
    parser.add_argument("--keep-flops", default="60%")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "operators")
    args = parser.parse_args()
    asked = {key: value for key, value in vars(args).items() if key not in ("out", "seeds")}
    RunFolder(args.out / "work").start(asked, resume=True)
    results = Ledger(args.out / "results.jsonl", ("seed", "name"))
    for seed in args.seeds:
        Bench(args, seed, results).run()
    text = table(results.rows(), args.seeds)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
