"""What the outer loop costs beside its trials, and how far it spreads.

    python experiments/outer_loop/scaling.py --storage postgresql://... [--workers 1 2 4]
    python experiments/outer_loop/scaling.py --storage postgresql://... --load 64

Workers are those of `searchpet tune`, with its default tuning space, but a trial only sleeps 2 s.
Overhead is what a trial takes beyond that: sampling, the checks that no trial is lost or run
twice, and the database.  Beside them a plain `study.optimize` with the same knobs and storage
shows how much of that is Optuna's own.  With --load, the workers are threads of eight processes
that reach the database through one gRPC proxy, whose processor time is taken.
Each result is a line of scaling.jsonl in --out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
from optuna.trial import Trial

from searchpet.ask import Ask
from searchpet.question import Question
from searchpet.roster import me, trials_of
from searchpet.settings import Settings
from searchpet.study import create, join
from searchpet.study import sampler as sampler_of
from searchpet.tunefile import read_tune
from searchpet.worker import Worker

SECONDS = 2.0  # that a trial sleeps
PROCESSES = 8  # that share the threads of a load


class Sleeper(Worker):
    """A worker whose trials take SECONDS; name tells threads of a process apart."""

    name = ""
    _noise = 0.0  # of scores on a task, and there is none

    def _run(self, trial: Trial) -> float:
        self.begin(trial)
        trial.set_user_attr("by", f"{me()}/{self.name}")
        self.question.suggest(trial)
        time.sleep(SECONDS)
        return random.Random(trial.number).random()


def question(trials: int, sampler: str) -> Question:
    return Question(Settings(), Ask(), read_tune("default"), trials, (100,), sampler=sampler,
                    pruner="none")


class Plain(Sleeper):
    """Optuna by itself: no check, nothing enqueued; a fixed number of trials for each worker."""

    def work(self) -> None:
        def objective(trial: Trial) -> float:
            trial.set_user_attr("by", f"{me()}/{self.name}")
            self.question.suggest(trial)
            time.sleep(SECONDS)
            return random.Random(trial.number).random()

        asked = self.question
        self.study.sampler = sampler_of(asked.sampler, os.getpid() + int(self.name), asked.trials)
        self.study.optimize(objective, n_trials=asked.trials // self.study.user_attrs["workers"])


def be_worker(args: argparse.Namespace) -> None:
    """Threads that sleep through trials, from the moment that the study names."""
    def work(number: int) -> None:
        study = join(args.storage, args.study)
        asked = question(study.user_attrs["trials"], study.user_attrs["sampler"])
        kind = Plain if study.user_attrs["plain"] else Sleeper
        worker = kind(asked, study, None, Path(), say=lambda _: None)  # type: ignore[arg-type]
        worker.name = str(number)
        time.sleep(max(0.0, study.user_attrs["go"] - time.time()))
        worker.work()

    threads = [Thread(target=work, args=(i,)) for i in range(args.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measured(storage: str, sampler: str, processes: int, threads: int, each: int,
             address: str | None = None, plain: bool = False) -> dict[str, Any]:
    """Run `each` trials for every worker; trials a minute, and seconds beyond a trial's own.

    address: where workers find the study, if not in the storage itself; plain: Optuna alone.
    """
    workers = processes * threads
    name = f"scaling-{sampler}-{workers}-{time.time_ns()}"
    study = create(storage, name, ["maximize"], {"what": "sleep"}, resume=False)
    study.set_user_attr("trials", each * workers)
    study.set_user_attr("sampler", sampler)
    study.set_user_attr("workers", workers)
    study.set_user_attr("plain", plain)
    study.set_user_attr("go", time.time() + 15 + 2 * processes)  # they import first
    crew = [subprocess.Popen([sys.executable, __file__, "--storage", address or storage, "--study",
                              name, "--threads", str(threads)],
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
            for _ in range(processes)]
    codes = [process.wait() for process in crew]
    if any(codes):
        raise SystemExit(f"workers ended with {codes}")
    spans: dict[str, list[Any]] = defaultdict(list)
    for trial in trials_of(study):
        spans[trial.user_attrs["by"]].append(trial)
    trials = [t for own in spans.values() for t in own]
    assert len(trials) == each * workers and all(t.state.name == "COMPLETE" for t in trials)
    begun = min(t.datetime_start for t in trials)
    wall = (max(t.datetime_complete for t in trials) - begun).total_seconds()
    beyond = [(max(t.datetime_complete for t in own) - begun).total_seconds() / len(own) - SECONDS
              for own in spans.values()]
    return {"by": "optuna" if plain else "searchpet", "sampler": sampler,
            "workers": len(spans), "trials": len(trials),
            "trials_per_minute": round(60 * len(trials) / wall, 2),
            "overhead_ms": round(1000 * statistics.mean(beyond), 1),
            "overhead_ms_most": round(1000 * max(beyond), 1)}


@contextlib.contextmanager
def proxy(storage: str) -> Iterator[tuple[str, psutil.Process]]:
    """`searchpet tune --serve` in front of a storage."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = subprocess.Popen([sys.executable, "-m", "searchpet", "tune", "--serve",
                               f"127.0.0.1:{port}"],
                              env={**os.environ, "SEARCHPET_STORAGE": storage})
    try:
        yield f"grpc://127.0.0.1:{port}", psutil.Process(served.pid)
    finally:
        served.kill()
        served.wait()


def load(storage: str, workers: int, sampler: str, each: int) -> dict[str, Any]:
    """Many light workers behind one proxy; what the proxy needs for a trial."""
    with proxy(storage) as (address, server):
        time.sleep(15)  # it imports
        before = sum(server.cpu_times()[:2])
        found = measured(storage, sampler, PROCESSES, workers // PROCESSES, each, address)
        used = sum(server.cpu_times()[:2]) - before
    return {**found, "proxy_ms_per_trial": round(1000 * used / found["trials"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--storage", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    parser.add_argument("--each", type=int, default=25, help="trials for every worker")
    parser.add_argument("--load", type=int, default=0, help="workers behind a gRPC proxy")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--study", help=argparse.SUPPRESS)  # a worker's
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.study:
        return be_worker(args)
    machine = f"{os.cpu_count()} x {platform.machine()}"
    for sampler in args.samplers:
        alone = 0.0
        for count in [args.load] if args.load else args.workers:
            rows = ([load(args.storage, count, sampler, args.each)] if args.load else
                    [measured(args.storage, sampler, count, 1, args.each, plain=plain)
                     for plain in (False, True)])
            if count == 1:
                alone = rows[0]["trials_per_minute"]
            if alone:
                rows[0]["efficiency"] = round(rows[0]["trials_per_minute"] / (count * alone), 3)
            for row in rows:
                line = json.dumps({"storage": args.storage.partition(":")[0],
                                   "proxy": bool(args.load), **row, "machine": machine})
                print(line, flush=True)
                with (args.out / "scaling.jsonl").open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
