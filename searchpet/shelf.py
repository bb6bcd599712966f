"""Shelves of specs: a folder, or a repository on the hub, with a folder for each spec.

    NAME/spec.json            the structure
    NAME/masks.safetensors    masks of single weights, where it has some
    NAME/card.json            what is worth knowing before one opens it, and spec.json's sha256

A shelf is named by a folder, by `searchpet` (what comes with the package), or by
`hf:OWNER/REPOSITORY`; by default it is SEARCHPET_SPECS or ~/.searchpet/specs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from searchpet.bulk import MASK_FILE, read_bits
from searchpet.errors import InputError
from searchpet.landing import landing
from searchpet.run import RunFolder
from searchpet.spec import SHIPPED, Spec, first_problem, located

CARD = "card.json"
HUB = re.compile(r"hf:/{0,2}([\w.\-]+/[\w.\-]+)(?:/([A-Za-z0-9][\w.\-]*))?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")
_LARGEST = 1000**2  # bytes of a card
ASKED = ("task", "metric", "split", "score")  # what a card has of a run


Count = Annotated[int, Field(ge=0, le=10**15)]


class Card(BaseModel):
    """What a shelf says of a spec.  score is that of the run that it was taken from, if any."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    spec_hash: str
    backbone: str
    parameters: Count
    budget: str
    limit: Count
    used: Count
    keep: str | None = None
    task: str | None = None
    strategy: str | None = None
    command: str | None = None
    metric: str | None = None
    split: str | None = None
    score: Annotated[float, Field(allow_inf_nan=False)] | None = None


def folder_of(where: str | None) -> Path:
    """The folder of a shelf; one on the hub is pulled first.  Raises InputError if it cannot be.
    """
    if where is None:
        return Path(os.environ.get("SEARCHPET_SPECS") or Path.home() / ".searchpet" / "specs")
    if where == SHIPPED.rstrip(":"):
        return Path(__file__).parent / "found"
    hub = HUB.fullmatch(where)
    if hub and hub[2] is None:
        return _pull(hub[1], "*")
    if where.startswith("hf:"):
        raise InputError(f"a shelf on the hub must read hf:OWNER/REPOSITORY, but got {where!r}")
    return Path(where).expanduser()


def at(source: str | Path) -> Path:
    """Where a spec lies: a path, `searchpet:NAME`, or `hf:OWNER/REPOSITORY/NAME`, pulled."""
    hub = HUB.fullmatch(str(source))
    if hub and hub[2]:
        found = _pull(hub[1], hub[2]) / hub[2]
        if not (found / "spec.json").is_file():
            raise InputError(f"a spec must be on its shelf, but hf:{hub[1]} has no {hub[2]}; see "
                             f"searchpet specs list --on hf:{hub[1]}")
        return found
    if str(source).startswith("hf:"):
        raise InputError("a spec on the hub must read hf:OWNER/REPOSITORY/NAME, but got "
                         f"{str(source)!r}")
    return located(source)


def cards(where: str | None = None) -> tuple[list[Card], list[str]]:
    """The cards of a shelf by name, and a line on each spec that is damaged."""
    folder, found, problems = folder_of(where), [], []
    if where is not None and not folder.is_dir():
        raise InputError(f"a shelf must be a folder, searchpet or hf:OWNER/REPOSITORY, but got "
                         f"{where}; searchpet specs add RUN --to {where} makes one")
    for file in sorted(folder.glob(f"*/{CARD}")):
        try:
            found.append(read(file.parent))
        except InputError as error:
            problems.append(str(error))
    return found, problems


def read(folder: Path) -> Card:
    """A spec's card.  Raises InputError where it does not belong to the spec beside it."""
    file = folder / CARD
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        card = Card.model_validate(json.loads(file.read_text(encoding="utf-8")))
        digest = hashlib.sha256((folder / "spec.json").read_bytes()).hexdigest()
    except ValidationError as error:
        raise InputError(f"{file}: {first_problem(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} must be the card of a spec, but: {error}") from error
    spec = Spec.load(folder)
    said = _card(spec, card.name, digest, card.model_dump(include={*ASKED, "strategy", "command"}))
    if card.name != folder.name or card != said or not all(
            value.isprintable() for value in card.model_dump().values() if isinstance(value, str)):
        raise InputError(f"{file} must be of the spec.json beside it, but is of another; add the "
                         "spec again")
    return card


def add(source: str | Path, where: str | None = None, name: str | None = None,
        private: bool = False) -> Card:
    """Put a spec on a shelf, with what its run says of it; on the hub, push it.

    private: a repository that is made for it is not for everybody.

    source: as in `at`;  name: by default that of its folder, or of the file, with `_` for what a
    name cannot hold.
    Raises InputError where the name is taken, or the spec is damaged.
    """
    path = at(source)
    spec = Spec.load(path)
    own = path if path.is_dir() else path.parent
    if name is None:
        said = path.name if path.is_dir() else own.name if path.name == "spec.json" else path.stem
        name = re.sub(r"[^A-Za-z0-9_.\-]+", "_", said).lstrip("_.-")
    if not _NAME.fullmatch(name):
        raise InputError("a spec's name must be of letters, digits, `_`, `.` and `-`, but got "
                         f"{name!r}; give --name")
    text = spec.text()
    card = _card(spec, name, hashlib.sha256(text.encode()).hexdigest(), _known(own, path, spec))
    hub = HUB.fullmatch(where or "")
    with tempfile.TemporaryDirectory() as scratch:
        new = RunFolder(scratch).sub(name)
        new.write_text("spec.json", text)
        if any(entry.mask for entry in spec.entries):
            read_bits(spec)  # it is there, and whole
            shutil.copyfile(own / MASK_FILE, new.path / MASK_FILE)
        new.write_json(CARD, card.model_dump(exclude_none=True))
        if hub and hub[2] is None:
            _push(hub[1], new.path, private)
        else:
            _place(new.path, folder_of(where))
    return card


def _place(new: Path, shelf: Path) -> None:
    """The folder on its shelf, whole or not at all."""
    if (shelf / new.name).exists():
        raise InputError(f"a name must be free on the shelf, but {shelf / new.name} is there; "
                         "give another --name, or delete it")
    with landing(shelf / new.name) as partial:
        for file in new.iterdir():
            shutil.copyfile(file, partial / file.name)


def _known(folder: Path, path: Path, spec: Spec) -> dict[str, Any]:
    """What is known of a spec's score: from a card beside it, or from its run."""
    if (folder / CARD).is_file():
        return read(folder).model_dump(include={*ASKED, "strategy", "command"})
    if (path.is_dir() or path.name == "spec.json") and (folder / "result.json").is_file():
        result = RunFolder(folder).result()
        if result["spec_hash"] == spec.hash:
            return {name: result[name] for name in ASKED}
    return {}


def _card(spec: Spec, name: str, digest: str, known: dict[str, Any]) -> Card:
    made = {key: value for key in ("task", "strategy", "command")
            if isinstance(value := spec.provenance.get(key), str)}
    try:
        return Card.model_validate({
            "name": name, "sha256": digest, "spec_hash": spec.hash,
            "backbone": spec.backbone.name, "parameters": spec.backbone.parameters,
            "budget": spec.budget.text, "limit": spec.budget.limit, "used": spec.budget.used,
            "keep": f"{spec.keep.text} {spec.keep.measure}" if spec.keep else None,
            **made, **known})
    except ValidationError as error:
        raise InputError(f"what a run says of its score must be readable: {first_problem(error)}"
                         ) from error


def find(among: Iterable[Card], backbone: str | None = None, task: str | None = None,
         limit: int | None = None) -> list[Card]:
    """Cards whose backbone and task have these words in their names, of at most `limit` used
    parameters; the best scores first within a task and metric.
    """
    def has(word: str | None, text: str | None) -> bool:
        return word is None or word.lower() in (text or "").lower()

    found = [card for card in among if has(backbone, card.backbone) and has(task, card.task)
             and (limit is None or card.used <= limit)]
    return sorted(found, key=lambda c: (c.backbone, c.task or "", c.metric or "",
                                        -(c.score if c.score is not None else -1e9), c.name))


# --- the hub ------------------------------------------------------------------------------------


def _pull(repository: str, name: str) -> Path:
    """A snapshot of a repository's specs in the hub's cache; of all, as they are now."""
    from huggingface_hub import HfApi  # here: only this shelf needs the client

    wanted: Sequence[str] = [f"{name}/{file}" for file in ("spec.json", CARD, MASK_FILE)]
    api = HfApi()
    try:
        if name == "*":  # offline, the next line would give an older list without a word
            api.repo_info(repository)
        return Path(api.snapshot_download(repository, allow_patterns=list(wanted)))
    except Exception as error:  # the hub's client and the layers below share no base class
        raise _unreachable(repository, "pull from", error) from error


def _push(repository: str, folder: Path, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=private)
        taken = api.file_exists(repository, f"{folder.name}/spec.json")
        if not taken:
            api.upload_folder(repo_id=repository, folder_path=folder, path_in_repo=folder.name,
                              commit_message=f"Add {folder.name}")
    except Exception as error:
        raise _unreachable(repository, "push to", error) from error
    if taken:
        raise InputError(f"a name must be free on the shelf, but hf:{repository} has "
                         f"{folder.name}; give another --name")


def _unreachable(repository: str, what: str, error: Exception) -> InputError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return InputError(f"hf:{repository} is gated: accept its terms, then `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return InputError(f"a shelf must be a repository on the hub that you may read, but the "
                          f"hub has no {repository}; check the name, or `hf auth login`")
    if isinstance(error, errors.LocalTokenNotFoundError) or getattr(
            getattr(error, "response", None), "status_code", None) in (401, 403):
        return InputError(f"to {what} hf:{repository} you must be known to the hub; `hf auth "
                          "login` with a token that may write there")
    return InputError(f"to {what} hf:{repository} the hub must be reached, but it cannot be "
                      f"({type(error).__name__}); go online, or use a folder as the shelf")
