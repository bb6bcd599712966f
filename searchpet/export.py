"""Export: a trained run for people without searchpet, and checked after it was written.

`peft`: an adapter, or two, that PEFT loads on a fresh backbone (`searchpet.portable`).
`merged`: a plain transformers checkpoint (`searchpet.plain`).  `onnx`: its graph.

Whatever is written is loaded again, without searchpet's own code, and compared with the run on
random inputs of several shapes.  Logits may differ by 1e-4 of the largest (1e-4 where that is
below 1), and by no more than half of what the deltas change, so that losing them all never passes:
sums in another order differ by float rounding, about 1e-7 to 1e-6.  PEFT's are equal to the last
bit where a module carries one delta and that is a bias or LoRA with a factor that is a power of
two.  A folder appears whole or not at all.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from searchpet import __version__
from searchpet.apply import DELTA_FILE, Trained, grafts, origin, restore
from searchpet.backbone import load_backbone, load_tokenizer, quietly
from searchpet.card import About, card
from searchpet.errors import InputError, unknown
from searchpet.finished import learned as task_of
from searchpet.landing import MANIFEST, files, free, landing
from searchpet.learned import Learned, learned
from searchpet.onnx_file import FILE, TRACED, run_onnx, write_onnx
from searchpet.plain import folded, say_sizes
from searchpet.portable import Adapter, adapters, effective, expected, stored
from searchpet.probe import outputs, random_inputs, varied
from searchpet.run import RunFolder
from searchpet.saving import Saved, rebuild
from searchpet.spec import Spec

FORMATS = ("peft", "merged", "onnx")
IMAGES, TOKENIZER = "preprocessor_config.json", "tokenizer_config.json"
TOLERANCE = 1e-4  # of the largest logit, as `verify` allows
ROUNDING = 1e-5  # of the largest logit: an effect below twice this cannot be told from it
NEEDS = {"peft": ("peft",), "merged": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}


@dataclass(frozen=True)
class Export:
    """A written export: where it is, and the content of its export.json."""

    path: Path
    values: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A run, ready to be written in another form.

    model: applied, in evaluation mode;  head: names of the head's parameters.
    fresh: the backbone once more, with another head.
    batches, logits: inputs of several shapes, and what the run makes of them.
    effect: the most that the deltas change of any logit.
    """

    model: nn.Module
    head: frozenset[str]
    fresh: Callable[[], nn.Module]
    batches: list[dict[str, Tensor]]
    logits: list[Tensor]
    effect: float


def export(run: str | Path, *, format: str = "peft", out: str | Path, model: str | None = None,
           task: str | None = None, overwrite: bool = False) -> Export:
    """Write a trained run as `format`, load it again, compare; return where it is and the figures.

    out: a new folder, or that of an earlier export of the same run; `overwrite` replaces an export
    of another run too, and no other folder.  model, task: as in `searchpet.load`.
    Raises InputError for what the format cannot express, by position; for a missing library; and,
    with nothing left behind, for an export that does not compute what the run does.
    """
    if format not in FORMATS:
        raise unknown("--format", format, FORMATS)
    lost = [name for name in NEEDS[format] if importlib.util.find_spec(name) is None]
    if lost:
        raise InputError(f"--format {format} needs {', '.join(lost)}, which this Python has not; "
                         "pip install 'searchpet[export]'")
    folder = RunFolder(Path(run).parent if Path(run).is_file() else run)
    own = task_of(folder.path, task)[0] if task is not None else None
    one, target = learned(own, folder.path), Path(out)
    same = {"run": {"spec_hash": one.spec.hash, "task": one.task,
                    "tensors": folder.digest(DELTA_FILE)}}
    free(target, same, overwrite)
    with landing(target) as partial:
        about, figures = _write(format, one, partial, model)
        text = card(format, target.resolve().name, about, figures)
        (partial / "README.md").write_text(text, encoding="utf-8")
        for file in partial.rglob("*.safetensors"):  # which others make readable by us alone
            file.chmod((partial / "README.md").stat().st_mode)
        values = {"searchpet_export": 1, "format": format, **same, "figures": figures,
                  "versions": _versions(format), "files": files(partial)}
        RunFolder(partial).write_json(MANIFEST, values)
    return Export(target, values)


def _write(form: str, one: Learned, partial: Path, model: str | None,
           ) -> tuple[About, dict[str, Any]]:
    """The export's files but README.md; what it is and what was measured on it."""
    folder, spec = one.folder, one.spec
    fresh, tokenizer = _base(one, model)
    applied = restore(folder.path, model, remove=False if form == "peft" else None, task=one.task)
    loaded = observed(applied, frozenset(one.head), fresh,
                      tokenizer.model_input_names if tokenizer else ())
    more: dict[str, Any] = {}
    if form == "peft":
        more["folders"] = to_peft(loaded, spec, partial, figures := {})
    elif form == "merged":
        figures = to_merged(loaded, spec, partial)
    else:
        figures = to_onnx(loaded, partial)
        more["inputs"] = tuple(loaded.batches[0])
    if tokenizer is not None:
        tokenizer.name_or_path = spec.backbone.name  # a file must not tell our path
        tokenizer.save_pretrained(partial)
    elif folder.has(IMAGES):
        shutil.copyfile(folder.path / IMAGES, partial / IMAGES)
    sizes = {"bytes of the run's deltas": (folder.path / DELTA_FILE).stat().st_size,
             "bytes of the export": sum(files(partial).values())}
    return _about(one, more), {**figures, **sizes}


def _base(one: Learned, model: str | None) -> tuple[Callable[[], nn.Module], Any]:
    """What builds the backbone with another head than any run begins with; the tokenizer, None
    where `save_pretrained` wrote the folder and none lies in it.
    """
    about, folder = one.about, one.folder
    if isinstance(about, Trained):
        own = model or origin(folder)
        name, revision = own or one.spec.backbone.name, None if own else one.spec.backbone.revision

        def fresh() -> nn.Module:
            found: nn.Module = load_backbone(
                name, outputs=about.outputs, regression=about.type == "regression", seed=1,
                revision=revision).model
            return found

        return fresh, load_tokenizer(name, revision=revision)

    @torch.no_grad()
    def again() -> nn.Module:
        found = rebuild(folder, one.spec, about, model)
        for name, p in found.named_parameters():
            if name in about.head:
                p.normal_(generator=torch.Generator().manual_seed(1))
        return found

    return again, load_tokenizer(str(folder.path)) if folder.has(TOKENIZER) else None


def observed(applied: nn.Module, head: frozenset[str], fresh: Callable[[], nn.Module],
             inputs: Sequence[str] = ()) -> Loaded:
    """An applied model with what it computes on random inputs.  inputs: names a tokenizer gives.
    """
    batches = varied(applied, torch.Generator().manual_seed(0), inputs)
    logits = [outputs(applied, batch) for batch in batches]
    own = grafts(applied)
    gates = own.z
    own.z = [torch.zeros_like(z) if graft.delta.neutral == 0 else z
             for graft, z in zip(own.grafts, gates, strict=True)]
    silent = [outputs(applied, batch) for batch in batches]
    own.z = gates
    return Loaded(applied, head, fresh, batches, logits, _apart(logits, silent))


def _apart(found: Sequence[Tensor], logits: Sequence[Tensor]) -> float:
    """The largest difference."""
    return max(float((a - b).abs().max()) for a, b in zip(found, logits, strict=True))


def _about(one: Learned, more: dict[str, Any]) -> About:
    spec, budget, about = one.spec, one.spec.budget, one.about
    known: dict[str, Any] = {}
    if isinstance(about, Trained):
        known = {"fields": about.fields, "max_length": about.max_length,
                 "regression": about.type == "regression"}
    else:
        known = {"architecture": about.architecture,
                 "regression": about.problem_type == "regression"}
    return About(
        backbone=spec.backbone.name, revision=spec.backbone.revision, task=one.task or "",
        labels=one.labels,
        budget=f"{budget.text}: {budget.used:,} of {budget.limit:,} parameters ({budget.counts})",
        spec_hash=spec.hash, score=_score(one.folder, about),
        kinds=Counter(entry.kind for entry in spec.entries), **known, **more)


def _score(folder: RunFolder, about: Trained | Saved) -> str:
    """What the run measured of the task, in words."""
    if not folder.has("result.json") or not isinstance(about, Trained):
        return ""
    result = folder.result()
    own = f"{about.task}/{about.metrics[0]}"  # of a run on several tasks
    value, metric = ((result["metrics"][own], about.metrics[0]) if own in result["metrics"] else
                     (result["score"], result["metric"]))
    return f"{value:.4f} {metric} on {result['split']}"


# --- formats ------------------------------------------------------------------------------------


def to_peft(loaded: Loaded, spec: Spec, folder: Path, figures: dict[str, Any]) -> tuple[str, ...]:
    """Write and check the adapters; their folders inside `folder`, in loading order.

    figures: gets what was counted and measured.
    """
    found = adapters(loaded.model, loaded.head)
    names = tuple(str(i + 1) for i in range(len(found))) if len(found) > 1 else ("",)
    for name, adapter in zip(names, found, strict=True):
        _write_adapter(adapter, folder / name, spec)
    structure = sum(graft.parameters for graft in grafts(loaded.model).grafts)
    active, (numbers, head) = expected(loaded.model, found), stored(found)
    model, counted = _peft_model(loaded.fresh(), found, [folder / name for name in names])
    figures |= {"parameters of the structure": structure, "of them not 0": active,
                "not 0 in the export": counted, "stored, padding included": numbers,
                "stored of the head": head}
    figures |= _compared(loaded, [outputs(model, batch) for batch in loaded.batches])
    if not counted == active <= structure:
        raise InputError(f"an export must hold the {active:,} numbers of the structure that are "
                         f"not 0, but {counted:,} were found in it; it was deleted")
    return names


def _write_adapter(adapter: Adapter, folder: Path, spec: Spec) -> None:
    import peft

    make = {"IA3": peft.IA3Config, "LORA": peft.LoraConfig, "LN_TUNING": peft.LNTuningConfig}
    local = (spec.backbone.revision or "sha256:").startswith("sha256:")
    config = make[adapter.type](
        base_model_name_or_path=spec.backbone.name, inference_mode=True,
        revision=None if local else spec.backbone.revision, **adapter.config)
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    tensors = {name: value.detach().cpu().contiguous().clone()
               for name, value in adapter.tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))


def _peft_model(base: nn.Module, found: Sequence[Adapter], folders: Sequence[Path],
                ) -> tuple[nn.Module, int]:
    """What PEFT makes of the adapters on a fresh backbone, and the numbers in it that act.

    Raises InputError unless PEFT holds exactly the tensors of the files: a pattern that caught
    another module, or a name that it passed over, shows here.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    own = {name: p.detach().clone() for name, p in base.named_parameters()}
    model: Any = base
    counted = 0
    for adapter, folder in zip(found, folders, strict=True):
        with warnings.catch_warnings(), quietly():
            warnings.simplefilter("ignore")  # that a second adapter comes, that merging is off
            try:
                loaded = PeftModel.from_pretrained(model, str(folder)).eval()
            except Exception as error:  # another version of PEFT may refuse in any way
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError("PEFT must load what an export holds, but it does not: "
                                 f"{reason}; the export was deleted") from error
            held = get_peft_model_state_dict(loaded, save_embedding_layers=False)
        if adapter.type != "IA3":  # those of the first adapter are seen through the second
            held = {name: value for name, value in held.items() if not name.endswith(".ia3_l")}
        wrong = sorted((held.keys() ^ adapter.tensors.keys()) | {
            name for name in held.keys() & adapter.tensors.keys()
            if not torch.equal(held[name], adapter.tensors[name])})
        if wrong:
            raise InputError(f"PEFT must load exactly what an export holds, but it does not for "
                             f"{wrong[0]} ({len(wrong)} tensors in all); the export was deleted")
        counted += effective(adapter, held, own)
        model = loaded.base_model.model
    return loaded, counted


def to_merged(loaded: Loaded, spec: Spec, folder: Path) -> dict[str, Any]:
    """Write and check a plain checkpoint."""
    model: Any = folded(loaded.model)
    if spec.keep is not None:
        say_sizes(model)
    model.name_or_path = model.config._name_or_path = spec.backbone.name
    with quietly():
        type(model).save_pretrained(model, folder)  # an applied model's own refuses what is merged
        again, info = type(model).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True,
            dtype=torch.float32)
    lost = sorted(str(key) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
                  for key in info[name])
    if lost:
        raise InputError(f"from_pretrained must find every weight of an export, but {lost[0]} is "
                         "missing, unknown or of another size; it was deleted")
    figures = {"parameters": sum(p.numel() for p in again.parameters())}
    return figures | _compared(loaded, [outputs(again, batch) for batch in loaded.batches])


def to_onnx(loaded: Loaded, folder: Path) -> dict[str, Any]:
    """Write and check a graph, of what removal left of the model too."""
    model: Any = folded(loaded.model, needs_config=False)
    sample = random_inputs(model, *TRACED, torch.Generator().manual_seed(1))
    example = {name: sample.get(name, torch.zeros_like(next(iter(sample.values()))))
               for name in loaded.batches[0]}
    file = write_onnx(model, example, folder)
    figures = {"parameters": sum(p.numel() for p in model.parameters()),
               "shapes tried": len(loaded.batches), "bytes of the graph": file.stat().st_size}
    return figures | _compared(loaded, run_onnx(folder / FILE, loaded.batches))


def _compared(loaded: Loaded, found: Sequence[Tensor]) -> dict[str, float]:
    """How far an export's logits are from the run's.  Raises InputError where that is too far."""
    largest = max(float(logits.abs().max()) for logits in loaded.logits)
    apart, scale = _apart(found, loaded.logits), max(1.0, largest)
    allowed = min(TOLERANCE * scale, max(ROUNDING * scale, loaded.effect / 2))
    if not apart <= allowed:
        raise InputError(f"an export must compute what its run does, but logits differ by "
                         f"{apart:.2g} (allowed: {allowed:.2g}); it was deleted")
    return {"largest logit": largest, "most that the deltas change": loaded.effect,
            "largest difference of logits": apart, "allowed": allowed}


def _versions(form: str) -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", *NEEDS[form])
    return {"searchpet": __version__, **{name: version(name) for name in names}}
