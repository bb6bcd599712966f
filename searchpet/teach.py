"""Teachers: what a pruned model is taught by while it is retrained (`--distill`).

`full` is the backbone, fully fine-tuned on the task in the run itself; a run folder is a trained
model of this project on the same labels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from searchpet.apply import read_delta, restore
from searchpet.errors import InputError
from searchpet.recovery import Objective, Recovery
from searchpet.run import RunFolder
from searchpet.session import Session

WEIGHTS = "teacher.safetensors"
Teaching = Callable[[nn.Module, dict[str, Tensor]], Objective]
HALF = Recovery(ce=0.5, logits=0.5)  # half the labels, half the teacher, as PruneOFA has it


def taught(session: Session, folder: RunFolder, teacher: str, recovery: Recovery = HALF,
           ) -> Teaching:
    """What a session's `teaching` is set to; trains the teacher `full` if the folder has none.

    Raises InputError for a run that is not there or was trained on other labels.
    """
    model = full(session, folder) if teacher == "full" else trained(session, teacher)
    model.to(session.device).eval().requires_grad_(False)
    precision = session.settings.precision

    def teaching(student: nn.Module, batch: dict[str, Tensor]) -> Objective:
        return Objective(student, model, recovery, batch, precision=precision)

    return teaching


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
