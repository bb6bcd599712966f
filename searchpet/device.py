"""Between host and device: what is sent or read without one of them waiting for the other.

An accelerator works through a queue.  Reading a number from it, branching on one of its tensors,
or sending pageable memory lets the host wait until the queue is empty; a search step that does so
leaves the device idle.  On the CPU all of it is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMULATED = ("--precision bf16 is fast on a processor with bf16 units, but this one has none and "
            "takes many times as long as with --precision fp32")


def free(tensor: Tensor) -> bool:
    """Whether a look at its values makes nobody wait."""
    return tensor.device.type == "cpu"


def has_bf16(device: torch.device) -> bool:
    """Whether its matrix products in bf16 are its own, as far as that can be asked."""
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU through pinned memory, in the queue's own time."""
    if device.type == "cuda" and free(tensor):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
