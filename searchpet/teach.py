"""Teachers: what a pruned model is taught by while it is retrained (`--distill`, `--recovery`).

`full` is the backbone, fully fine-tuned on the task in the run itself; a run folder is a trained
model of this project on the same labels.

Contrast (CAP, Xu et al. 2022, arXiv:2112.07198) needs banks: of the pretrained backbone for
`unsupervised`, of the teacher for `supervised`.  They are collected once, before the first
training, from at most 4096 texts of the training split that the seed draws.  CAP's third bank, of
snapshots, has no counterpart: it prunes in rounds with a training after each, here a structure
is cut at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.apply import read_delta, restore
from searchpet.batch import Encoded
from searchpet.contrast import Bank, bank
from searchpet.errors import InputError
from searchpet.recovery import TAUGHT, Objective, Recovery
from searchpet.run import RunFolder
from searchpet.session import Session

WEIGHTS = "teacher.safetensors"
Teaching = Callable[[nn.Module, dict[str, Tensor]], Objective]
HALF = Recovery(ce=0.5, logits=0.5)  # half the labels, half the teacher, as PruneOFA has it


def losses(teacher: str | None, given: Mapping[str, Any] | None) -> Recovery | None:
    """What structures are trained on, as `--distill` and `--recovery` ask; None: the task's loss.

    Raises InputError for a term that lacks its teacher, and for a teacher that teaches nothing.
    """
    if not given:
        return HALF if teacher else None
    found = HALF.given(given)
    needing = [term for term in TAUGHT if found.on(term)]
    if needing and teacher is None:
        raise InputError(f"--recovery {', '.join(needing)} must have a teacher, but --distill is "
                         "not given; add --distill full")
    if teacher and not needing:
        raise InputError(f"--distill {teacher} must teach one of {', '.join(TAUGHT)}, but "
                         "--recovery gives none of them a weight; add logits=1 or drop --distill")
    return found


def taught(session: Session, folder: RunFolder, teacher: str | None, recovery: Recovery = HALF,
           ) -> Teaching:
    """What a session's `teaching` is set to; trains the teacher `full` if the folder has none.

    Raises InputError for a run that is not there or was trained on other labels, and for terms
    that this teacher cannot teach this backbone.
    """
    model = None
    if teacher is not None:
        model = full(session, folder) if teacher == "full" else trained(session, teacher)
        _ready(model.to(session.device).eval().requires_grad_(False), recovery)
    banks = _banks(session, recovery, model)
    precision = session.settings.precision

    def teaching(student: nn.Module, batch: dict[str, Tensor]) -> Objective:
        _ready(student, recovery)
        return Objective(student, model, recovery, batch, banks, precision=precision)

    seed = session.settings.seed
    with session.fresh(seed) as student:  # what cannot work should say so before the search
        teaching(student, session.batches(session.splits["train"], seed)[0])
    return teaching


def _ready(model: Any, recovery: Recovery) -> None:
    """Attention maps come out of plain attention alone."""
    if recovery.attention:
        model.set_attn_implementation("eager")


def _banks(session: Session, recovery: Recovery, teacher: nn.Module | None,
           ) -> dict[str, list[Bank]]:
    s, rows = session.settings, session.splits["train"]
    assert isinstance(rows, Encoded)  # of one task: the engine asks

    def collect(model: nn.Module) -> list[Bank]:
        generator = torch.Generator().manual_seed(s.seed)
        return [bank(model, rows, generator, batch_size=4 * s.batch_size,
                     precision=s.precision)]

    found = {}
    if recovery.unsupervised:
        with session.fresh(s.seed) as pretrained:
            found["unsupervised"] = collect(pretrained)
    if recovery.supervised:
        assert teacher is not None  # `losses` asks
        found["supervised"] = collect(teacher)
    return found


def full(session: Session, folder: RunFolder) -> nn.Module:
    """The fully fine-tuned backbone; its weights are kept in the folder."""
    seed = session.settings.seed
    if not folder.has(WEIGHTS):
        before, session.job = session.job, "teacher"
        session.fit("full", folder, seed, stage="teacher",
                    after=lambda model: folder.write_tensors(WEIGHTS, _state(model)))
        session.job = before
        folder.drop("teacher.checkpoint.safetensors")
    model = session.load(seed)
    tensors, _ = folder.read_tensors(WEIGHTS)
    model.load_state_dict(tensors, strict=False)  # what is tied is stored once
    return model


def trained(session: Session, run: str) -> nn.Module:
    """The model of a finished run."""
    if not Path(run).is_dir():
        raise InputError(f"--distill must be `full` or the folder of a run, but got {run!r}")
    _, about = read_delta(RunFolder(run))
    if about.labels != session.task.labels:
        raise InputError("a teacher must have learned the task's labels, "
                         f"{', '.join(session.task.labels) or 'a number'}, but {run} has learned "
                         f"{', '.join(about.labels) or 'a number'}")
    return restore(run)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, shared ones once."""
    return {name: p.detach() for name, p in model.named_parameters()}
