"""How several processes start, share a run folder and end: under `torchrun`, and like it.

The first process has the run folder.  The others work in private copies of it, which are gone
when they end, so that no disk needs to be shared and `--resume` starts all of them alike.  Model,
data and specs are read by each for itself.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from searchpet.errors import InputError

if TYPE_CHECKING:
    import torch

    from searchpet.run import RunFolder

JOINT = ("search", "train")  # the commands that several processes can share
PATIENCE = datetime.timedelta(seconds=10)  # for another process to say what went wrong
P = ParamSpec("P")
R = TypeVar("R")

_store: Any = None  # where processes leave word for each other, once they have started
_private: list[tempfile.TemporaryDirectory[str]] = []  # gone when the process ends


def several() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def leader() -> bool:
    """Whether this process speaks for all."""
    return not several() or os.environ.get("RANK") == "0"


def program() -> list[str]:
    """The words that a command line like this one's begins with."""
    if not several():
        return ["searchpet"]
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    each = ["--nproc-per-node", here] if here == os.environ["WORLD_SIZE"] else ["..."]
    return ["torchrun", *each, "-m", "searchpet"]  # of several machines, each has its own options


def enter(words: Sequence[str]) -> None:
    """Before a command line is read: meet the others.

    Raises InputError for a command that takes one process.
    """
    if not several():
        return
    start()
    if words and words[0] not in JOINT:
        raise InputError(f"{words[0]} takes one process, but {os.environ['WORLD_SIZE']} were "
                         f"started; run it without torchrun, which is for {' and '.join(JOINT)}")


def start() -> None:
    """Meet the others, once: NCCL between GPUs, gloo between CPUs and for plain values."""
    import torch
    from accelerate import PartialState
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    global _store
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not distributed.is_initialized():
        _store, rank, size = next(rendezvous("env://"))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=_store,
                                       rank=rank, world_size=size)
        atexit.register(_end)
    PartialState(cpu=int(os.environ["LOCAL_RANK"]) >= gpus)


def _end() -> None:
    from torch import distributed

    if _store is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def jointly(job: Callable[P, R]) -> Callable[P, R]:
    """The job done by all processes together, if there are several; the first one is listened to.

    A decorator for functions with the keyword `listener`.
    """
    @functools.wraps(job)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not several():
            return job(*args, **kwargs)
        from torch import distributed

        from searchpet import processes

        start()
        if not leader():
            kwargs.pop("listener", None)
        with processes.joined(distributed.get_rank(), distributed.get_world_size()):
            return job(*args, **kwargs)

    return run


def device(name: str) -> torch.device:
    """The device of this process.  Raises InputError for one that is not there or is shared."""
    import torch

    from searchpet import processes
    from searchpet.settings import pick_device

    if processes.size() == 1:
        return pick_device(name)
    if name not in ("auto", "cpu", "cuda"):
        raise InputError("several processes must have a device each, so --device must be auto, "
                         f"cpu or cuda, but got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if here >= gpus > 0:
        raise InputError(f"each process must have a GPU of its own, but this machine has {gpus} "
                         "and was given more processes; lower --nproc-per-node, or add "
                         "--device cpu")
    return torch.device("cuda", here) if gpus else pick_device(name)


def check_rows(batch_size: int) -> None:
    """Raise InputError for batches that leave a process without rows."""
    from searchpet import processes

    if batch_size < processes.size():
        raise InputError("--batch-size must be at least the number of processes, "
                         f"{processes.size()}, but got {batch_size}; each takes its rows of it")


def opened(folder: RunFolder, settings: Mapping[str, Any], resume: bool) -> RunFolder:
    """`folder`, started; for processes other than the first a private copy of it.

    Raises InputError where the folder cannot be taken.
    """
    from searchpet import processes
    from searchpet.run import RunFolder

    processes.from_first(lambda: folder.start(settings, resume))
    if not processes.first():
        _private.append(tempfile.TemporaryDirectory(prefix="searchpet-"))
        folder = RunFolder(_private[-1].name)
    follow(folder)
    return folder


def follow(folder: RunFolder, *names: str) -> None:
    """Copy the first process's files to the others: those that are named, or all."""
    from searchpet import processes

    if processes.size() == 1:
        return
    for name in processes.from_first(lambda: _files(folder.path, names)):
        content = processes.from_first((folder.path / name).read_bytes)
        if not processes.first():
            target = folder.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def _files(path: Path, names: Sequence[str]) -> list[str]:
    """Paths of files below `path`, except logs, which nobody reads."""
    found = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*"))
             if file.is_file() and file.name != "log.jsonl"]
    return [name for name in found if not names or name in names]


# --- how they end -------------------------------------------------------------------------------


@contextlib.contextmanager
def speaking() -> Iterator[bool]:
    """After an error: whether this process is to say what went wrong.

    The first to come here is; the others wait until it has, since whoever ends first may have the
    rest ended at once.
    """
    global _store
    store, _store = _store, None  # after an error nobody waits for the others to end
    if store is None:
        yield True
        return
    speaks = False
    with contextlib.suppress(RuntimeError):  # the first process may be gone, and the store with it
        speaks = store.add("speakers", 1) == 1
        if not speaks:
            store.wait(["spoken"], PATIENCE)
    try:
        yield speaks
    finally:
        with contextlib.suppress(RuntimeError):
            if speaks:
                store.set("spoken", "yes")


def lost(error: Exception) -> str | None:
    """The line for a process that was left alone; None for other errors."""
    if not several():
        return None
    from searchpet.processes import Lost

    if not isinstance(error, Lost):
        return None
    return "all processes must go on, but another one has ended; what was written before is kept"


def interrupted() -> bool:
    """After Ctrl-C: whether this process is to say so.  One of several ignores further ones."""
    global _store
    if several():
        _store = None
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return leader()
