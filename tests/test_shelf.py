"""Shelves: round trips, what is damaged or taken, a fake hub, what comes with the package."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from searchpet import cli, shelf
from searchpet.errors import InputError
from searchpet.spec import Spec, located
from tests.laws import families as tiny


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run leaves of its structure and score."""
    model = tiny.model("bert")
    placed = tiny.space(model, tiny.rule("bias", "channel"))
    spec = tiny.spec_of(model, placed, tiny.some(len(placed), 0)).model_copy(update={
        "provenance": {"task": "films", "strategy": "bilevel", "command": "searchpet search"}})
    folder = tmp_path / "mine"
    folder.mkdir()
    spec.save(folder / "spec.json")
    values = dict.fromkeys(["head", "backbone", "fraction", "budget_limit", "keep", "removed",
                            "tensors", "seed", "seconds", "strategy", "trainable"])
    (folder / "result.json").write_text(json.dumps(values | {
        "task": "films", "metric": "accuracy", "split": "test", "score": 0.75,
        "spec_hash": spec.hash}))
    return folder


def test_a_spec_comes_back_from_a_shelf_as_it_was(run: Path, tmp_path: Path) -> None:
    card = shelf.add(run, str(tmp_path / "a"))
    assert (card.name, card.task, card.score, card.split) == ("mine", "films", 0.75, "test")
    assert Spec.load(tmp_path / "a" / "mine") == Spec.load(run)
    again = shelf.add(tmp_path / "a" / "mine", str(tmp_path / "b"), "other")
    assert again == card.model_copy(update={"name": "other"})
    assert shelf.cards(str(tmp_path / "b")) == ([again], [])
    assert not list((tmp_path / "a").glob(".*"))


def test_the_default_shelf_is_named_by_the_environment(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCHPET_SPECS", str(tmp_path / "own"))
    assert shelf.cards() == ([], [])
    shelf.add(run)
    assert [c.name for c in shelf.cards()[0]] == ["mine"]
    monkeypatch.delenv("SEARCHPET_SPECS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shelf.folder_of(None) == tmp_path / ".searchpet" / "specs"


def test_a_score_of_another_structure_is_not_taken(run: Path, tmp_path: Path) -> None:
    values = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(values | {"spec_hash": "0" * 64}))
    assert shelf.add(run, str(tmp_path / "a")).score is None
    assert shelf.add(run / "spec.json", str(tmp_path / "b")).name == "mine"


def test_a_run_in_its_default_folder_has_a_name(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "agreement-all-MiniLM-L6-v2-0.001%,1%-bilevel-s0")
    card = shelf.add(own, str(tmp_path / "a"))
    assert card.name == "agreement-all-MiniLM-L6-v2-0.001_1_-bilevel-s0"
    assert Spec.load(tmp_path / "a" / card.name) == Spec.load(run)


@pytest.mark.parametrize("edit", [
    {"used": 1}, {"parameters": 10**30}, {"budget": "1%"}, {"spec_hash": "0" * 64},
    {"score": float("nan")}, {"task": "a\x1b[31mb"}, {"backbone": "someone/else"}])
def test_a_card_says_what_its_spec_says(run: Path, tmp_path: Path, edit: dict[str, Any]) -> None:
    shelf.add(run, str(tmp_path / "a"), "edited")
    shelf.add(run, str(tmp_path / "a"), "good")
    file = tmp_path / "a" / "edited" / "card.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    found, problems = shelf.cards(str(tmp_path / "a"))
    assert [card.name for card in found] == ["good"]
    assert len(problems) == 1 and "edited" in problems[0] and "\x1b" not in problems[0]


def test_names_are_free_and_safe(run: Path, tmp_path: Path) -> None:
    where = str(tmp_path / "a")
    shelf.add(run, where)
    with pytest.raises(InputError, match="must be free on the shelf"):
        shelf.add(run, where)
    for name in ("../evil", "a/b", ".hidden", "", "x" * 101, "a\nb"):
        if name:
            with pytest.raises(InputError, match="must be of letters"):
                shelf.add(run, where, name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "mine"]


def test_damaged_specs_are_named_and_the_others_listed(run: Path, tmp_path: Path) -> None:
    where = tmp_path / "a"
    for name in ("good", "edited", "torn", "strange", "moved"):
        shelf.add(run, str(where), name)
    text = (where / "edited" / "spec.json").read_text()
    (where / "edited" / "spec.json").write_text(text.replace("films", "flims"))
    (where / "torn" / "card.json").write_text('{"name": "torn"')
    card = json.loads((where / "strange" / "card.json").read_text())
    (where / "strange" / "card.json").write_text(json.dumps(card | {"run": "rm -rf"}))
    shutil.move(where / "moved", where / "elsewhere")
    found, problems = shelf.cards(str(where))
    assert [c.name for c in found] == ["good"] and len(problems) == 4
    assert all("\n" not in line for line in problems)


def test_find_by_backbone_task_and_budget(run: Path, tmp_path: Path) -> None:
    cards = [shelf.add(run, str(tmp_path / "a"), name) for name in ("one", "two")]
    better = cards[1].model_copy(update={"score": 0.9})
    assert [c.name for c in shelf.find([cards[0], better], "TINY", "film")] == ["two", "one"]
    assert shelf.find(cards, "roberta") == [] and shelf.find(cards, task="cola") == []
    assert shelf.find(cards, limit=cards[0].used) == cards
    assert shelf.find(cards, limit=cards[0].used - 1) == []


class Hub:
    """What of HfApi is used, over a folder; private: to strangers."""

    root: Path
    error: Exception | None = None
    offline = False

    def _path(self, repository: str) -> Path:
        if self.error:
            raise self.error
        return self.root / repository

    def create_repo(self, repo_id: str, exist_ok: bool = False, private: bool = False) -> None:
        self._path(repo_id).mkdir(parents=True, exist_ok=exist_ok)
        if private:
            (self._path(repo_id) / ".private").touch()

    def repo_info(self, repo_id: str) -> None:
        if self.offline:
            raise OSError("down")

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return (self._path(repo_id) / filename).is_file()

    def upload_folder(self, *, repo_id: str, folder_path: Path, path_in_repo: str,
                      commit_message: str) -> None:
        shutil.copytree(folder_path, self._path(repo_id) / path_in_repo)

    def snapshot_download(self, repo_id: str, allow_patterns: list[str]) -> str:
        assert {p.rpartition("/")[2] for p in allow_patterns} == {
            "spec.json", "card.json", "masks.safetensors"}
        return str(self._path(repo_id))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    fake = type("Fake", (Hub,), {"root": tmp_path / "hub"})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_push_and_pull(run: Path, tmp_path: Path, hub: type[Hub], capsys: Any) -> None:
    card = shelf.add(run, "hf:me/specs")
    assert shelf.cards("hf:me/specs") == ([card], [])
    assert Spec.load(shelf.at("hf:me/specs/mine")) == Spec.load(run)
    assert Spec.load(shelf.at(Path("hf://me/specs/mine"))) == Spec.load(run)
    with pytest.raises(InputError, match="hf:me/specs has mine; give another --name"):
        shelf.add(run, "hf:me/specs")
    with pytest.raises(InputError, match="has no yours"):
        shelf.at("hf:me/specs/yours")
    assert cli.main(["specs", "add", "hf:me/specs/mine", "--to", str(tmp_path / "pulled")]) == 0
    assert shelf.cards(str(tmp_path / "pulled"))[0] == [card]
    assert cli.main(["show", "hf:me/specs/mine"]) == 0
    assert cli.main(["specs", "list", "--on", "hf:me/specs"]) == 0
    assert "hf:me/specs/mine" in capsys.readouterr().out


def test_a_repository_is_private_where_asked(run: Path, hub: type[Hub]) -> None:
    for words in ([], ["--private"]):
        name = f"me/{'-'.join(words) or 'open'}"
        assert cli.main(["specs", "add", str(run), "--to", f"hf:{name}", *words]) == 0
        assert (hub.root / name / ".private").is_file() == bool(words)


def test_an_old_list_is_not_shown_as_the_new_one(run: Path, hub: type[Hub], capsys: Any) -> None:
    shelf.add(run, "hf:me/specs")
    hub.offline = True
    assert Spec.load(shelf.at("hf:me/specs/mine")) == Spec.load(run)  # one that is there will do
    assert cli.main(["specs", "list", "--on", "hf:me/specs"]) == 2
    assert "must be reached" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "line"), [
    (OSError("down"), "must be reached"),
    (huggingface_hub.errors.OfflineModeIsEnabled("off"), "go online, or use a folder"),
    (huggingface_hub.errors.HFValidationError("no"), "check the name"),
    (huggingface_hub.errors.LocalTokenNotFoundError("no"), "hf auth login")])
def test_a_hub_that_does_not_answer_is_one_line(
    run: Path, hub: type[Hub], error: Exception, line: str, capsys: Any
) -> None:
    hub.error = error
    for words in (["add", str(run), "--to", "hf:me/specs"], ["list", "--on", "hf:me/specs"]):
        assert cli.main(["specs", *words]) == 2
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1


def test_wrong_shelves_are_one_line(tmp_path: Path, capsys: Any) -> None:
    for words, line in (
        (["list", "--on", str(tmp_path / "none")], "a shelf must be a folder"),
        (["list", "--on", "hf:me"], "must read hf:OWNER/REPOSITORY"),
        (["add", "hf:me"], "must read hf:OWNER/REPOSITORY/NAME"),
        (["add", str(tmp_path / "none")], "neither"),
        (["add", "searchpet:none"], "searchpet:NAME must be one of"),
        (["find", "--budget", "much"], "budget must be a share"),
    ):
        assert cli.main(["specs", *words]) == 2, words
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1


def test_specs_of_the_package_are_what_their_cards_say() -> None:
    cards, problems = shelf.cards("searchpet")
    assert len(cards) >= 3 and not problems
    for card in cards:
        spec = Spec.load(f"searchpet:{card.name}")
        file = located(f"searchpet:{card.name}") / "spec.json"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == card.sha256
        assert card.spec_hash == spec.hash and card.used == spec.budget.used <= card.limit
        assert card.command == spec.provenance["command"] and card.command.startswith("searchpet ")
        assert card.score is not None and card.metric and card.split and card.task
        assert not any(word.startswith(("/", "~")) for word in card.command.split())
        assert str(Path.home()) not in file.read_text()


def test_masks_of_single_weights_go_along(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from searchpet.masks import fingerprint, packed
    from searchpet.spec import MaskRef

    model = tiny.model("bert")
    spec = tiny.spec_of(model, placed := tiny.space(model, tiny.rule("lora")),
                        torch.ones(len(placed), dtype=torch.bool))
    bits = torch.arange(40) % 2 == 0
    entry = spec.entries[0].model_copy(update={"mask": MaskRef(
        shape=(40,), sha256=fingerprint(bits)[0], count=20)})
    (tmp_path / "run").mkdir()
    spec.model_copy(update={"entries": (entry,)}).save(tmp_path / "run" / "spec.json")
    save_file({entry.key: packed(bits)}, tmp_path / "run" / "masks.safetensors")
    shelf.add(tmp_path / "run", str(tmp_path / "a"))
    one, other = (tmp_path / w / "masks.safetensors" for w in ("run", "a/run"))
    assert one.read_bytes() == other.read_bytes()
