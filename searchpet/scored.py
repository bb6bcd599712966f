"""The final scores of a search: what it thought of every unit at its end, kept or not.

`scores.safetensors` beside the spec: `score` float64 (units,), `price` int64 (units,), parameters
on what pruning leaves of a unit's host, 0 where nothing is left.  It says which specs were chosen
by it, and how: by summed value, unit by unit, or in a way that scores do not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from searchpet.errors import InputError
from searchpet.run import RunFolder
from searchpet.spec import Spec, first_problem

FILE = "scores.safetensors"
META = "searchpet"


class About(BaseModel):
    """specs: hashes of the specs chosen by the scores;  density: by summed value, else unit by
    unit, None: neither;  units: how many the space has;  must: those that had to be kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    specs: list[str]
    density: bool | None
    units: Annotated[int, Field(ge=1, strict=True)]
    must: list[Annotated[int, Field(ge=0, strict=True)]] = []


@dataclass(frozen=True)
class Scores:
    """score float64 (units,), price int64 (units,), must bool (units,)."""

    score: Tensor
    price: Tensor
    must: Tensor
    density: bool | None


def write(folder: RunFolder, score: Tensor, price: Tensor, about: About) -> None:
    """Keep the scores of a search."""
    folder.write_tensors(FILE, {"score": score.detach().cpu().double(),
                                "price": price.detach().cpu().round().long()},
                         {META: about.model_dump_json()})


def read(spec: Spec) -> Scores | None:
    """The scores that a spec was chosen by; None where there are none of it.

    They lie beside the spec or, of one of several budgets, in the run that it is part of.
    Raises InputError for a file that is damaged.
    """
    if spec.folder is None:
        return None
    for place in (spec.folder, spec.folder.parent.parent):
        folder = RunFolder(place)
        if folder.has(FILE):
            about, scores = _checked(folder)
            if spec.hash in about.specs:
                return scores
    return None


def _checked(folder: RunFolder) -> tuple[About, Scores]:
    tensors, meta = folder.read_tensors(FILE)
    path = folder.path / FILE
    try:
        about = About.model_validate_json(meta.get(META, ""))
    except ValidationError as error:
        raise InputError(f"{path} must say what its scores are of, but {first_problem(error)}; it "
                         "was edited or damaged, search again") from error
    shape = (about.units,)
    forms = {"score": torch.float64, "price": torch.int64}
    if {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} != {
            name: (dtype, shape) for name, dtype in forms.items()}:
        raise InputError(f"{path} must hold a score and a price of {about.units:,} units, but "
                         "holds others; it was edited or damaged, search again")
    if bool(tensors["score"].isnan().any()) or bool((tensors["price"] < 0).any()) or any(
            unit >= about.units for unit in about.must):
        raise InputError(f"{path} must hold numbers, but some are none; it was edited or damaged, "
                         "search again")
    must = torch.zeros(about.units, dtype=torch.bool)
    must[torch.tensor(about.must, dtype=torch.int64)] = True
    return about, Scores(tensors["score"], tensors["price"], must, about.density)
