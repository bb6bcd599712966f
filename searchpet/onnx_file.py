"""ONNX: a model as a graph that onnxruntime runs, for any number of rows and any length.

torch's exporter traces the model once, on a small batch; what it left to vary is tried with other
shapes by whoever exports.  Inputs are those that the tokenizer gives, the output is the logits.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.errors import InputError

FILE = "model.onnx"
TRACED = (2, 8)  # rows and length; 1 would be taken for a size that never varies


class _Logits(nn.Module):
    """A model that takes its inputs by place and returns its logits alone."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *values: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, values, strict=True)),
                                    return_dict=True).logits
        return logits


def write_onnx(model: nn.Module, example: dict[str, Tensor], folder: Path) -> Path:
    """Write a model's graph; weights lie in the file, or beside it where they exceed 2 GB.

    example: a batch of 2 rows or more, by the names that the inputs get.
    Raises InputError for a model that cannot be traced.
    """
    config: Any = model.config
    config.use_cache = False  # a classifier needs none, and it would be an output
    axes = tuple({0: "batch"} if value.dim() != 2 else {0: "batch", 1: "sequence"}
                 for value in example.values())
    large = sum(p.numel() * p.element_size() for p in model.parameters()) > 2 * 1000**3
    target = folder / FILE
    try:
        with _quiet():
            torch.onnx.export(
                _Logits(model.eval(), list(example)), tuple(example.values()), target,
                input_names=list(example), output_names=["logits"], dynamic_shapes=(axes,),
                dynamo=True, external_data=large, verbose=False)
    except OSError:  # a full disk, say
        raise
    except Exception as error:  # the exporter can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError("a model must be one that torch can trace for ONNX, but "
                         f"{config.model_type} is not: {reason}; take --format merged") from error
    return target


def run_onnx(file: Path, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """What onnxruntime makes of each batch, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(["logits"], {k: v.numpy() for k, v in batch.items()})[0])
            for batch in batches]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own account of its steps."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
