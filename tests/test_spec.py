"""Specs: the file's exact text, its hash, and every way in which a file can be wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from searchpet.errors import InputError
from searchpet.spec import BackboneId, BudgetUse, Entry, Spec

GOLDEN = Path(__file__).parent / "reference" / "spec.json"


def spec() -> Spec:
    """The values of the golden file, by hand."""
    return Spec(
        backbone=BackboneId(name="someone/model", revision="c" * 40, config_hash="0" * 64,
                            parameters=22_713_216),
        entries=(
            Entry(path="encoder.layer.0.attention.self.query", role="attention.query", layer=0,
                  kind="lora", options={"rank": 2, "alpha": 16.0, "rank_stabilised": False},
                  kept=[1]),
            Entry(path="embeddings.LayerNorm", role="norm.embedding", layer=-1, kind="bias",
                  options={}, kept=[0, 7, 383]),
        ),
        budget=BudgetUse(text="0.01%", limit=2271, used=771, slack=1500, denominator=22_713_216),
        provenance={"strategy": "bilevel", "seed": 0, "names": ["ä", "b"], "nothing": None})


@pytest.fixture
def raw() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def rehashed(raw: dict[str, Any]) -> dict[str, Any]:
    """The hash by the definition, with nothing of ours."""
    content = {key: raw[key] for key in ("backbone", "entries")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**raw, "hash": hashlib.sha256(text.encode()).hexdigest()}


def test_the_text_is_that_of_the_golden_file() -> None:
    assert spec().text() == GOLDEN.read_text(encoding="utf-8")
    assert Spec.load(GOLDEN) == spec()


def test_the_text_is_canonical_json_with_the_hash_of_its_content(raw: dict[str, Any]) -> None:
    assert set(raw) == {"searchpet_spec", "backbone", "entries", "budget", "provenance", "hash"}
    assert raw["searchpet_spec"] == 1
    assert rehashed(raw) == raw and raw["hash"] == spec().hash
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    assert GOLDEN.read_text(encoding="utf-8") == text + "\n"


def test_a_spec_round_trips_through_a_file_and_a_run_folder(tmp_path: Path) -> None:
    spec().save(tmp_path / "spec.json")
    assert Spec.load(tmp_path / "spec.json") == Spec.load(tmp_path) == spec()
    assert Spec.load(str(tmp_path)).hash == spec().hash
    assert [file.name for file in tmp_path.iterdir()] == ["spec.json"]


def test_the_hash_is_of_backbone_and_entries_alone() -> None:
    other = spec().model_copy(update={"provenance": {}})
    assert other.hash == spec().hash
    fewer = spec().model_copy(update={"entries": spec().entries[:1]})
    assert fewer.hash != spec().hash


def test_a_spec_is_a_value() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        spec().budget = None  # type: ignore[assignment,misc]


@given(limit=st.integers(0, 10**12), used=st.integers(0, 10**12), slack=st.integers(0, 10**12))
def test_used_and_slack_make_the_limit(limit: int, used: int, slack: int) -> None:
    use = {"text": "1", "used": used, "slack": slack, "denominator": 1}
    assert BudgetUse(limit=used + slack, **use).limit == used + slack
    if limit != used + slack:
        with pytest.raises(ValueError, match=r"used \+ slack must equal limit"):
            BudgetUse(limit=limit, **use)


def entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """Change the first entry, with a matching hash: the content itself must be refused."""

    def edit(raw: dict[str, Any]) -> dict[str, Any]:
        return rehashed({**raw, "entries": [{**raw["entries"][0], **changes}, raw["entries"][1]]})

    return edit


def key(name: str, /, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda raw: rehashed({**raw, name: {**raw[name], **changes}})


HOSTILE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda raw: {**raw, "searchpet_spec": 2}, "version 1"),
    (lambda raw: {**raw, "searchpet_spec": "1"}, "version 1"),
    (lambda raw: {k: v for k, v in raw.items() if k != "searchpet_spec"}, "searchpet spec"),
    (lambda raw: {**raw, "more": 1}, "more: Extra inputs"),
    (lambda raw: {k: v for k, v in raw.items() if k != "budget"}, "budget: Field required"),
    (lambda raw: {k: v for k, v in raw.items() if k != "hash"}, "hash"),
    (lambda raw: {**raw, "hash": "0" * 64}, "edited or damaged"),
    (lambda raw: {**raw, "hash": ["x" * 10_000]}, "edited or damaged"),
    (lambda raw: {**raw, "entries": raw["entries"][:1]}, "edited or damaged"),
    (lambda raw: rehashed({**raw, "entries": raw["entries"] * 2}), "stands twice"),
    (lambda raw: {**raw, "entries": "none"}, "entries"),
    (lambda raw: [raw], "searchpet spec"),
    (lambda raw: None, "searchpet spec"),
    (lambda raw: "searchpet_spec", "searchpet spec"),
    (entry(kept=[1, 0]), "ascending"),
    (entry(kept=[0, 0]), "ascending"),
    (entry(kept=[-1]), "kept"),
    (entry(kept=[0.5]), "kept"),
    (entry(kept=["0"]), "kept"),
    (entry(kept=[True]), "kept"),
    (entry(kept=[10**30]), "kept"),
    (entry(layer=-2), "layer"),
    (entry(layer=10**9), "layer"),
    (entry(path="../../etc/passwd"), "path"),
    (entry(path="a/b"), "path"),
    (entry(path=""), "path"),
    (entry(path="x" * 10_000), "path"),
    (entry(path="a\nb"), "path"),
    (entry(path="a\n"), "path"),
    (entry(kind="os.system('x')"), "kind"),
    (entry(role=None), "role"),
    (entry(options={"rank": [1]}), "options"),
    (entry(options={"rank": {"a": 1}}), "options"),
    (entry(more=1), "more"),
    (key("budget", used=772), "used"),
    (key("budget", limit=-1), "limit"),
    (key("budget", limit=2271.5), "limit"),
    (key("budget", denominator="1"), "denominator"),
    (key("budget", counts="nothing"), "counts"),
    (key("backbone", name=""), "name"),
    (key("backbone", parameters=10**40), "parameters"),
]


@pytest.mark.parametrize(("edit", "message"), HOSTILE)
def test_a_wrong_content_is_one_line_that_names_it(
    edit: Callable[[dict[str, Any]], Any], message: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(edit(raw)), encoding="utf-8")
    refused(file, message)


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_lacks_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(GOLDEN.read_text(encoding="utf-8").replace("16.0", name), encoding="utf-8")
    refused(file, name)


@pytest.mark.parametrize("content", [
    b"", b"{", b"not json", b"\xff\xfe\x00", b"[" * 200_000, b'{"a":' * 200_000,
    b"1e400", b"9" * 10_000,
])
def test_what_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_bytes(content)
    refused(tmp_path / "spec.json", "spec")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.json", "neither")
    refused(tmp_path, "neither")  # a folder without a spec


def test_deeply_nested_options_and_provenance_are_refused(tmp_path: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    text = GOLDEN.read_text(encoding="utf-8").replace('"nothing":null', f'"nothing":{deep}')
    (tmp_path / "spec.json").write_text(text, encoding="utf-8")
    refused(tmp_path, "spec|JSON")


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Spec.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
