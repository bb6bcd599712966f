"""The sweep of tau: successive halving of trainings that are paused and taken up again.

Jamieson and Talwalkar 2016, arXiv:1502.07943.  FACTORS times tau each train up to the first
evaluation, a sixth of the steps; the KEPT best by validation go on to the third; the best of
those goes on to the end, as if it had been trained alone: the same numbers to the last digit.  A
training is paused in its own schedule, so rates are compared where they are used, not on shorter
schedules.  All together takes at most 11/6 of the steps of one training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from searchpet.errors import InputError
from searchpet.launch import follow
from searchpet.outside import Outside
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.spec import Spec

FACTORS = (1 / 3, 1.0, 3.0, 9.0)  # on tau; two above: structures of few parameters want more
KEPT = 2  # that go on to the second comparison
RUNGS = (1, 3)  # evaluations after which trainings are compared
FILE, STAGE = "sweep.json", "train"
CHECKPOINT = f"{STAGE}.checkpoint.safetensors"


@dataclass(frozen=True)
class Tried:
    """A paused training: its tau, the steps it took, the validation score at its best so far.

    seconds: of all its parts so far.
    """

    tau: float
    steps: int
    score: float
    seconds: float


def sweep(session: Session, method: Spec | Outside | str, folder: RunFolder, seed: int,
          ) -> dict[str, Any]:
    """Choose tau by validation; the winner's checkpoint is left in `folder`, for the training to
    take up.  The folder keeps what is done.

    Returns `{tau, tried: [Tried as a dict], steps, seconds}`, of what came before the winner's
    rest.  Raises InputError where there are too few steps to compare, or --lr leaves no tau.
    """
    recipe = session.recipe()
    if recipe.steps < recipe.evaluations:
        raise InputError(f"--sweep compares after a sixth of the steps, so --steps must be at "
                         f"least {recipe.evaluations}, but got {recipe.steps}; raise it, or drop "
                         "--sweep")
    if session.settings.lr is not None:
        raise InputError("--sweep chooses tau, but --lr replaces tau; drop one of them")
    if not folder.has(FILE):
        base = session.settings.tau
        going = [base * factor for factor in FACTORS]
        tried: dict[float, Tried] = {}
        for rung in RUNGS:
            for tau in going:
                tried[tau] = _go_on(session, method, folder.sub(f"sweep-{tau:g}"), seed, tau,
                                    rung * recipe.interval, tried.get(tau))
            ranked = sorted(going, key=lambda tau: (-tried[tau].score, abs(tau - base)))
            going = ranked[:KEPT]
        won = going[0]
        _hand_over(folder, folder.sub(f"sweep-{won:g}"))
        folder.write_json(FILE, {
            "tau": won, "tried": [asdict(one) for one in tried.values()],
            "steps": sum(one.steps for one in tried.values()),
            "seconds": round(sum(one.seconds for one in tried.values()), 3)})
    follow(folder, FILE)
    return dict(folder.read_json(FILE))


def _go_on(session: Session, method: Spec | Outside | str, folder: RunFolder, seed: int,
           tau: float, until: int, before: Tried | None) -> Tried:
    """Train up to a step, from where it was paused."""
    name = f"until-{until}.json"
    if not folder.has(name):
        job = session.job
        session.job = f"tau {tau:g}"
        found = session.fit(method, folder, seed, tau=tau, stage=STAGE, until=until)
        session.job = job
        spent = found.seconds + (before.seconds if before else 0.0)
        folder.write_json(name, asdict(Tried(tau, until, found.score, round(spent, 3))))
        follow(folder, name, CHECKPOINT)
    return Tried(**folder.read_json(name))


def _hand_over(folder: RunFolder, winner: RunFolder) -> None:
    """Copy the winner's checkpoint."""
    folder.write_tensors(CHECKPOINT, *winner.read_tensors(CHECKPOINT))
