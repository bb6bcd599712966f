"""The README.md of an export: what it is, how good it is, how to load it.  Text from plain values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class About:
    """What an export says of itself.

    backbone, revision: as the spec names them; a local folder's revision is `sha256:` and a hash.
    task, labels, fields, max_length, regression: of the task that the head is for; of a model that
        `save_pretrained` wrote, no task and no fields are known.
    architecture: its class in transformers.
    budget, spec_hash: of the spec;  score: what the run measured, in words, if it did.
    kinds: how many positions each kind has.
    inputs: what the graph takes;  folders: of PEFT's adapters, in loading order, "" for this one.
    """

    backbone: str
    revision: str | None
    task: str
    labels: tuple[str, ...]
    budget: str
    spec_hash: str
    score: str
    kinds: Mapping[str, int]
    regression: bool = False
    fields: tuple[str, ...] = ()
    max_length: int = 0
    architecture: str = "AutoModelForSequenceClassification"
    inputs: tuple[str, ...] = ()
    folders: Sequence[str] = field(default=())

    @property
    def local(self) -> bool:
        """Whether the backbone is a folder that no hub knows."""
        return self.revision is None or self.revision.startswith("sha256:")


TITLES = {
    "peft": "A PEFT adapter", "merged": "A transformers checkpoint", "onnx": "An ONNX model"}


def card(form: str, name: str, about: About, figures: Mapping[str, Any]) -> str:
    """README.md of an export called `name`.  figures: what was measured on it."""
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(about.kinds.items()))
    facts = [
        ("backbone", f"{about.backbone}" + (f" at {about.revision}" if about.revision else "")),
        ("task", f"{about.task or 'not known'} ({'a number' if about.regression else 'classes'})"),
        ("labels", ", ".join(about.labels) or "none, it predicts a number"),
        ("score", about.score or "not measured"), ("budget", about.budget),
        ("structure", f"{found} (positions by kind)"), ("spec", about.spec_hash),
        *((what, _figure(value)) for what, value in figures.items())]
    rows = "\n".join(f"| {what} | {_cell(value)} |" for what, value in facts)
    what = _cell(about.task or about.architecture)
    return (f"{_front(form, about)}\n# {TITLES[form]} for {what}\n\n"
            f"Found and trained by searchpet, and checked when it was written.\n\n"
            f"| | |\n|---|---|\n{rows}\n\n## Load it\n\n{_before(about, form)}"
            f"```python\n{snippet(form, name, about)}```\n")


def _front(form: str, about: About) -> str:
    """The hub's metadata."""
    library = {"peft": "peft", "merged": "transformers", "onnx": "onnx"}[form]
    lines = [f"library_name: {library}", "tags: [searchpet]"]
    if not about.local:
        lines.insert(0, f"base_model: {json.dumps(about.backbone)}")
    return "\n".join(["---", *lines, "---", ""])


def _before(about: About, form: str) -> str:
    if form == "peft" and about.local:
        return (f"`{about.backbone}` is the local folder that the structure was found on; "
                "write its path.\n\n")
    return ""


def snippet(form: str, name: str, about: About) -> str:
    """Python that loads an export from its folder and labels a text with it."""
    make = {"peft": _peft, "merged": _merged, "onnx": _onnx}[form]
    return make(name, about)


def _peft(name: str, about: About) -> str:
    revision = "" if about.local else f"    revision={about.revision!r},\n"
    kind = "regression" if about.regression else "single_label_classification"
    outputs = f"num_labels={len(about.labels) or 1}"
    if about.labels:
        outputs = f"id2label=dict(enumerate({list(about.labels)!r}))"
    first, *rest = about.folders or ("",)
    lines = [f"model = PeftModel.from_pretrained(model, {_path(first)})", *(
        f"model = PeftModel.from_pretrained(model.base_model.model, {_path(folder)})"
        for folder in rest)]
    sort = f"    problem_type={kind!r},\n" if about.fields else ""
    pad = ("model.config.get_text_config().pad_token_id = tokenizer.pad_token_id\n"
           if about.fields else "")
    return ("import torch\nfrom peft import PeftModel\n" + _begin(name, about) +
            f"model = {about.architecture}.from_pretrained(\n"
            f"    {about.backbone!r},\n{revision}    {outputs},\n{sort}"
            "    dtype=torch.float32,\n    ignore_mismatched_sizes=True,  # the head is the "
            "adapter's\n)\n" + pad + "\n".join(lines) + "\nmodel.eval()\n" + _ask(about))


def _path(folder: str) -> str:
    return f'f"{{folder}}/{folder}"' if folder else "folder"


def _merged(name: str, about: About) -> str:
    return ("import torch\n" + _begin(name, about) +
            f"model = {about.architecture}.from_pretrained(folder).eval()\n" + _ask(about))


def _begin(name: str, about: About) -> str:
    """Imports of transformers, the folder, and the tokenizer where the task's texts are known."""
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(folder)\n" if about.fields else ""
    words = f"{about.architecture}, AutoTokenizer" if about.fields else about.architecture
    return f"from transformers import {words}\n\nfolder = {name!r}  # this one\n{tokenizer}"


def _ask(about: About) -> str:
    """The end of a snippet in torch."""
    if not about.fields:
        return "# model(**inputs).logits, of inputs as it was trained on\n"
    last = ("print(logits[:, 0].tolist())" if about.regression else
            "print([model.config.id2label[i] for i in logits.argmax(-1).tolist()])")
    return (f"batch = tokenizer({_texts(about)}, padding=True, truncation=True,\n"
            f"                  max_length={about.max_length}, return_tensors=\"pt\")\n"
            f"with torch.no_grad():\n    logits = model(**batch).logits\n{last}\n")


def _onnx(name: str, about: About) -> str:
    if not about.fields:
        return ("import onnxruntime\n\n"
                f"folder = {name!r}  # this one\n"
                "session = onnxruntime.InferenceSession(f\"{folder}/model.onnx\")\n"
                f"# session.run([\"logits\"], inputs), with {', '.join(about.inputs)} in inputs\n")
    last = ("print(logits[:, 0].tolist())" if about.regression else
            f"labels = {list(about.labels)!r}\n"
            "print([labels[i] for i in logits.argmax(-1).tolist()])")
    return ("import onnxruntime\nfrom transformers import AutoTokenizer\n\n"
            f"folder = {name!r}  # this one\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
            "session = onnxruntime.InferenceSession(f\"{folder}/model.onnx\")\n"
            f"batch = tokenizer({_texts(about)}, padding=True, truncation=True,\n"
            f"                  max_length={about.max_length}, return_tensors=\"np\")\n"
            f"names = {list(about.inputs)!r}\n"
            "inputs = {name: batch[name].astype(\"int64\") for name in names}\n"
            f"(logits,) = session.run([\"logits\"], inputs)\n{last}\n")


def _texts(about: About) -> str:
    """Two rows of the task's form."""
    return ", ".join(f'["a {field_}", "another {field_}"]' for field_ in
                     (["text"], ["text", "second text"])[len(about.fields) - 1])


def _figure(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _cell(text: str) -> str:
    """Text that a table's cell can hold."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
