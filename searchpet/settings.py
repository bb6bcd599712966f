"""Settings: what every search and training is asked for, checked as soon as it is said."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from searchpet.errors import InputError, unknown
from searchpet.source import DEFAULT

TAU = 0.05  # relative output change per step; experiments/rates says why


@dataclass(frozen=True)
class Settings:
    """What the user asked for, validated; the same values on --resume."""

    model: str = DEFAULT
    task: str = "agreement"
    task_weights: str | None = None
    data: str | None = None
    seed: int = 0
    steps: int = 300
    batch_size: int = 32
    accumulate: int = 1
    max_length: int = 64
    tau: float = TAU
    lr: float | None = None
    precision: str = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be >= 1, but got "
                                 f"{getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be in [0, 2^63), but got {self.seed}")
        for name in ("tau", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name} must be a finite number > 0, but got {value}")
        if self.precision not in ("fp32", "bf16"):
            raise unknown("--precision", self.precision, ("fp32", "bf16"))


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu.  Raises InputError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device must be auto, cpu, or a cuda or mps device that is there, but "
                         f"got {name!r}") from error
    return device


def asked(settings: Settings, **more: Any) -> dict[str, Any]:
    """The settings as plain values for settings.json; `data` only if the task lies in it."""
    inside = settings.data and any((Path(settings.data) / name.strip()).is_dir()
                                   for name in (settings.task, *settings.task.split(",")))
    return {**asdict(settings), "data": settings.data if inside else None, **more}
