"""The folder in which the commands of the error page are run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from searchpet import cli
from tests.commands import write_task

RUN = ["search", "--model", "my-bert", "--task", "reviews", "--strategy", "random:unit",
       "--budget", "1%", "--steps", "2", "--controls", "0", "--max-length", "16", "--quiet",
       "--out", "runs/mine"]


def furnish(folder: Path, backbone: Path) -> None:
    """What the page speaks of; the current folder must be `folder` already."""
    write_task(folder / "reviews", 24)
    shutil.copytree(backbone, folder / "my-bert")
    for name in ("other-bert", "old-bert"):
        shutil.copytree(backbone, folder / name)
    config = folder / "other-bert" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"layer_norm_eps": 1e-5}))
    weights = folder / "old-bert" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    _tasks(folder)
    assert cli.main(RUN) == 0
    spec = json.loads((folder / "runs/mine/spec.json").read_text())
    spec["entries"] = spec["entries"][1:]
    (folder / "edited.json").write_text(json.dumps(spec))
    shutil.copytree(folder / "runs/mine", folder / "runs/edited")
    result = folder / "runs/edited/result.json"
    content = json.loads(result.read_text())
    result.write_text(json.dumps(content | {"trainable": content["trainable"] - 1}))
    (folder / "runs/half").mkdir()
    (folder / "new.csv").write_text("text\ngood film\n")
    (folder / "other.csv").write_text("review,stars\ngood film,5\n")


def _tasks(folder: Path) -> None:
    """Tasks with a fault each."""
    for name in ("stars", "typo", "untested"):
        shutil.copytree(folder / "reviews", folder / name)
    (folder / "stars/meta.json").unlink()
    for split in ("train", "validation", "test"):
        file = folder / "stars" / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(
            json.dumps({"text": row["text"], "stars": "ab"[row["label"]]}) + "\n"
            for row in rows))
    with (folder / "typo/train.jsonl").open("a") as train:
        train.write('{"text": "good film", "label": "positiv"}\n')
    (folder / "untested/test.jsonl").unlink()
