"""Tasks: folders, inference, splits, warnings, the hub, and every bad input."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from searchpet import catalog
from searchpet.errors import InputError
from searchpet.task import Split, Task, load_task, read_texts

Rows = list[dict[str, Any]]
Make = Callable[..., Path]


def texts(n: int, prefix: str = "text", labels: int = 2) -> Rows:
    return [{"text": f"{prefix} {i}", "label": i % labels} for i in range(n)]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A task folder: rows by split, and files as text."""

    def build(files: dict[str, str] | None = None, **splits: Rows) -> Path:
        folder = tmp_path / "my-task"
        folder.mkdir()
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return build


def message(call: Callable[[], object]) -> str:
    """The one line of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- loading -------------------------------------------------------------------------------


def test_the_embedded_task() -> None:
    task = load_task("agreement")
    assert task.type == "classification" and task.outputs == 2 and task.metrics == ("accuracy",)
    assert {s: len(split) for s, split in task.splits.items()} == {
        "train": 4000, "validation": 800, "test": 800,
    }
    assert task.warnings == () and load_task("agreement").fingerprint == task.fingerprint


def test_a_plugin_task(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"train": texts(20), "validation": texts(4, "other"), "meta": {"metric": "mcc"}}
    monkeypatch.setattr(catalog, "_added", {})
    catalog.add("tasks", "mine", lambda: raw)
    task = load_task("mine")
    assert (task.name, task.metrics, task.labels) == ("mine", ("matthews",), ("0", "1"))


def test_a_folder_without_declarations(make: Make, tmp_path: Path) -> None:
    folder = make(train=texts(6, labels=3), dev=texts(3, "dev", labels=3))
    by_path, by_name = load_task(str(folder)), load_task("my-task", data=tmp_path)
    assert by_path == by_name
    assert by_path.name == "my-task" and by_path.labels == ("0", "1", "2")
    assert by_path.fields == ("text",) and by_path.splits["validation"].labels == (0, 1, 2)


def test_string_labels_and_two_columns(make: Make) -> None:
    rows = [{"premise": f"p {i}", "hypothesis": f"h {i}", "target": "nay" if i % 2 else "aye"}
            for i in range(8)]
    task = load_task(str(make(train=rows, validation=rows[:2])))
    assert task.fields == ("premise", "hypothesis") and task.label_field == "target"
    assert task.labels == ("aye", "nay") and task.splits["train"].labels == (0, 1) * 4
    assert task.warnings == ("2 of 2 validation rows have a text that is in train too",)


def test_meta_json_maps_names_and_ids(make: Make) -> None:
    meta = {"task": "single", "labels": ["bad", "good"], "metric": "mcc", "licence": "none"}
    train = [{"text": str(i), "label": label} for i, label in enumerate(("good", 0, "1"))]
    folder = make({"meta.json": json.dumps(meta)}, train=train, valid=[{"text": "d", "label": 1}])
    task = load_task(str(folder))
    assert task.labels == ("bad", "good") and task.metrics == ("matthews",)
    assert task.splits["train"].labels == (1, 0, 1)


def test_task_toml_wins_over_meta(make: Make) -> None:
    rows = [{"a": f"a {i}", "b": f"b {i}", "y": i / 4, "z": i} for i in range(9)]
    toml = 'name = "rated"\nfields = ["b"]\nlabel = "y"\nmetrics = ["pearson", "spearman"]\n'
    meta = json.dumps({"fields": ["a"], "type": "regression"})
    folder = make({"task.toml": toml, "meta.json": meta}, train=rows, validation=rows[:3])
    task = load_task(str(folder))
    assert (task.name, task.type, task.fields) == ("rated", "regression", ("b",))
    assert task.metrics == ("pearson", "spearman") and task.outputs == 1
    assert task.splits["validation"].labels == (0.0, 0.25, 0.5)


def test_inferred_regression_whole_rows_too(make: Make) -> None:
    rows = [{"text1": f"a {i}", "text2": f"b {i}", "score": s} for i, s in enumerate((1, 2.5, 4))]
    task = load_task(str(make(train=rows, validation=[{**rows[0], "text1": "new"}])))
    assert task.type == "regression" and task.metrics == ("spearman", "pearson")
    assert task.splits["train"].labels == (1.0, 2.5, 4.0)


def test_csv_and_parquet_read_alike(make: Make, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"text": 'a, "quoted"\nline', "label": 1}, {"text": "ü", "label": 0}]
    lines = 'text,label\n"a, ""quoted""\nline",1\n\nü,0\n'
    folder = make({"train.csv": "\ufeff" + lines})
    parquet.write_table(pa.Table.from_pylist(rows), folder / "validation.parquet")
    task = load_task(str(folder))
    assert task.splits["train"] == task.splits["validation"]
    assert task.splits["train"] == Split((('a, "quoted"\nline', "ü"),), (1, 0))


def test_validation_is_carved_from_train_equal_texts_together(make: Make) -> None:
    rows = [{"text": f"t {i // 2}", "label": i // 2 % 2} for i in range(200)]
    folder = make(train=rows)
    task = load_task(str(folder))
    assert len(task.splits["validation"]) == 20 and len(task.splits["train"]) == 180
    assert not set(task.splits["validation"].texts) & set(task.splits["train"].texts)
    assert load_task(str(folder)) == task
    assert "20 of 200 training rows" in task.warnings[0] and len(task.warnings) == 1


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], None])
def test_a_test_split_may_hide_its_labels(make: Make, labels: list[int | None] | None) -> None:
    test: Rows = [{"text": "x"}, {"text": "y"}]
    for row, label in zip(test, labels or [], strict=False):
        row["label"] = label
    task = load_task(str(make(train=texts(8), validation=texts(2, "v"), test=test)))
    assert task.splits["test"].labels is None and len(task.splits["test"]) == 2


def test_overlaps_are_counted(make: Make) -> None:
    train, validation = texts(9), texts(4, "v")
    task = load_task(str(make(train=train, validation=validation,
                              test=[*train[:3], *validation[:2], *texts(1, "new")])))
    assert task.warnings == ("2 of 6 test rows have a text that is in validation too",
                             "3 of 6 test rows have a text that is in train too")


def test_a_test_split_equal_to_validation(make: Make) -> None:
    rows = texts(4, "v")
    task = load_task(str(make(train=texts(9), validation=rows, test=rows[::-1])))
    assert len(task.warnings) == 1 and "test equals validation: all 4 rows" in task.warnings[0]


def test_fingerprint_is_of_the_content(make: Make, tmp_path: Path) -> None:
    folder = make(train=texts(8), validation=texts(2, "v"))
    before = load_task(str(folder)).fingerprint
    folder = folder.rename(tmp_path / "renamed")
    assert load_task(str(folder)).fingerprint == before
    (folder / "validation.jsonl").write_text('{"text": "w", "label": 0}\n')
    assert load_task(str(folder)).fingerprint != before


# --- bad input -----------------------------------------------------------------------------

GOOD = texts(4)
BAD: list[tuple[dict[str, Any], dict[str, str], list[str]]] = [
    ({}, {}, ["train.jsonl", "no file"]),
    ({}, {"train.jsonl": ""}, ["train.jsonl", "at least 1 row"]),
    ({}, {"train.jsonl": '{"text": "a", "label": 0}\n{"text": \n'}, ["line 2", "JSON"]),
    ({}, {"train.jsonl": "[1]\n"}, ["line 1", "list"]),
    ({}, {"train.csv": "text,label\na,b,c\n"}, ["line 2", "3", "quote"]),
    ({}, {"train.csv": 'text,label\n"a,0\n'}, ["train.csv", "CSV"]),
    ({}, {"train.parquet": "nothing"}, ["train.parquet", "parquet"]),
    ({"train": GOOD, "dev": GOOD, "validation": GOOD}, {}, ["validation.jsonl", "dev.jsonl"]),
    ({"train": [{"text": "a", "label": 0}, {"label": 1}]}, {}, ["line 2", "'text'"]),
    ({"train": [{"text": "a", "label": 0}, {"text": 7, "label": 1}]}, {}, ["line 2", "7"]),
    ({"train": [{"body": "a", "label": 0}]}, {"task.toml": 'fields = "txt"'}, ["'txt'", "'body'"]),
    ({"train": [{"text": "a", "x": "b"}]}, {}, ["label column", "'x'"]),
    ({"train": [{"a": "1", "b": "2", "c": "3", "label": 0}]}, {}, ["fields", "3"]),
    ({"train": texts(4, labels=1)}, {}, ["at least 2", "1 different"]),
    ({"train": [{"text": "a", "label": f"{i} free text"} for i in range(50)]}, {}, ["50", "type"]),
    ({"train": GOOD, "dev": [{"text": "v", "label": 2}]}, {}, ["dev.jsonl", "line 1", "2"]),
    ({"train": [*GOOD[:1], {"text": "b", "label": 9}]}, {"meta.json": '{"labels": ["no", "yes"]}'},
     ["train.jsonl line 2", "'label'", "9", "no, yes"]),
    ({"train": GOOD, "validation": [{"text": "v", "label": 2}]},
     {"meta.json": '{"labels": ["a", "b", "c"]}'}, ["validation", "'c'", "no training row"]),
    ({"train": GOOD, "validation": [{"text": "v"}]}, {}, ["validation", "labels", "none"]),
    ({"train": [{"text": "a", "label": 0.5}, {"text": "b", "label": float("nan")}]}, {},
     ["line 2", "finite", "nan"]),
    ({"train": GOOD}, {"meta.json": '{"task": "token"}'}, ["'token'", "not supported for now"]),
    ({"train": GOOD}, {"meta.json": '{"task": "generation"}'}, ["'generation'", "single, pair"]),
    ({"train": GOOD}, {"meta.json": '{"task": "vision"}'}, ["'vision'", "not supported for now"]),
    ({"train": GOOD}, {"meta.json": "{"}, ["meta.json", "json"]),
    ({"train": GOOD}, {"meta.json": '{"task": "pair"}'}, ["pair", "2 text columns"]),
    ({"train": GOOD}, {"task.toml": 'field = "text"'}, ["task.toml", "'field'", "fields"]),
    ({"train": GOOD}, {"task.toml": "labels = 3"}, ["task.toml", "'labels'", "3"]),
    ({"train": GOOD}, {"task.toml": 'metric = "acuracy"'}, ["task.toml", "mean 'accuracy'"]),
    ({"train": GOOD}, {"task.toml": 'metric = "pearson"'}, ["classification", "'pearson'"]),
    ({"train": texts(9, labels=3)}, {"task.toml": 'metric = "f1"'}, ["f1_macro", "3"]),
    ({"train": [{"tokens": ["a"], "tags": [0]}]}, {}, ["'token'", "column 'tokens'"]),
    ({"train": GOOD[:2]}, {}, ["spare", "validation"]),
]


@pytest.mark.parametrize(("splits", "files", "said"), BAD, ids=range(len(BAD)))
def test_bad_folders_say_what_and_where(
    make: Make, splits: dict[str, Rows], files: dict[str, str], said: list[str]
) -> None:
    line = message(lambda: load_task(str(make(files, **splits))))
    assert all(part in line for part in said), line


@pytest.mark.parametrize("name", ["", "./nowhere", "/nowhere/at/all", "a/b/c/d"])
def test_bad_names(name: str) -> None:
    assert "agreement" in message(lambda: load_task(name))


# --- hub -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glue/sst2", "agrement"])
def test_offline_is_one_quick_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    before, start = datasets.config.HF_HUB_OFFLINE, time.perf_counter()
    line = message(lambda: load_task(name))
    assert "go online" in line and "folder" in line and name in line
    assert name != "agrement" or "did you mean 'agreement'" in line
    assert time.perf_counter() - start < 5
    assert before == datasets.config.HF_HUB_OFFLINE


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the hub answer with these splits to one (data set, configuration)."""
    import datasets
    import huggingface_hub

    def answer(path: str, config: str | None, **splits: datasets.Dataset) -> None:
        def load(*asked: str | None) -> datasets.DatasetDict:
            if asked != (path, config):
                raise datasets.exceptions.DatasetNotFoundError(f"no {asked}\non the hub")
            return datasets.DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    return answer


def test_hub_names_and_hidden_test_labels(hub: Callable[..., None]) -> None:
    import datasets

    features = datasets.Features({
        "premise": datasets.Value("string"), "hypothesis": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["yes", "maybe", "no"]),
        "idx": datasets.Value("int32"),
    })

    def split(n: int, label: int | None = None) -> datasets.Dataset:
        return datasets.Dataset.from_list([
            {"premise": f"p {n} {i}", "hypothesis": "h", "idx": i,
             "label": i % 3 if label is None else label} for i in range(n)
        ], features=features)

    hub("glue", "mnli", train=split(9), validation_matched=split(3),
        validation_mismatched=split(6), test_matched=split(4, -1))
    task = load_task("glue/mnli")
    assert task.name == "glue/mnli" and task.labels == ("yes", "maybe", "no")
    assert len(task.splits["validation"]) == 3 and task.splits["test"].labels is None
    assert "on the hub" in message(lambda: load_task("glue/nope"))
    hub("owner/data", None, train=split(30))
    assert len(load_task("owner/data").splits["validation"]) == 3


def test_hub_images_are_refused(hub: Callable[..., None]) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features)
    hub("pictures", None, train=rows)
    assert "vision is not supported" in message(lambda: load_task("pictures"))


# --- texts to predict ----------------------------------------------------------------------


def test_read_texts(tmp_path: Path) -> None:
    file = tmp_path / "new.csv"
    file.write_text("id,text1,text2\n1,a,b\n2,c,d\n")
    assert read_texts(file, ("text1", "text2")) == (("a", "c"), ("b", "d"))
    line = message(lambda: read_texts(file, ("text",)))
    assert "'text'" in line and "'id', 'text1', 'text2'" in line
    assert "new.txt" in message(lambda: read_texts(tmp_path / "new.txt", ("text",)))
    assert "exist" in message(lambda: read_texts(tmp_path / "old.csv", ("text",)))


# --- the evaluation data -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "outputs", "fields", "metric", "overlaps"), [
    ("cola", 2, 1, "matthews", ["16 of 1043 validation"]),
    ("rte", 2, 2, "accuracy", []),
    ("stsb", 1, 2, "spearman", ["6 of 1500 validation"]),
    ("trec6", 6, 1, "accuracy", ["1 of 500 test", "9 of 500 test"]),
    ("banking77", 77, 1, "accuracy", ["1 of 3080 test", "5 of 3080 test"]),
])
def test_the_evaluation_data(
    name: str, outputs: int, fields: int, metric: str, overlaps: list[str]
) -> None:
    task = evaluation(name)
    assert (task.outputs, len(task.fields), task.metrics[0]) == (outputs, fields, metric)
    assert [w.split(" rows")[0] for w in task.warnings] == overlaps


@pytest.mark.parametrize("name", ["wnut17", "e2e_clean_small"])
def test_evaluation_data_that_is_not_supported(name: str) -> None:
    assert "not supported for now" in message(lambda: evaluation(name))


def evaluation(name: str) -> Task:
    folder = os.environ.get("SEARCHPET_DATA")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"SEARCHPET_DATA names no folder with {name}")
    return load_task(name, data=Path(folder))
