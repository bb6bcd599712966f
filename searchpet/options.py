"""The command line's options, each described once, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from searchpet.errors import InputError

WHAT, SEARCH, TRAIN, RUN = "What to work on", "Search", "Training", "Run"
# fields of settings.Settings that commands hand on
SETTINGS = ("model", "task", "task_weights", "data", "seed", "steps", "batch_size",
            "accumulate", "max_length", "tau", "lr", "precision", "device")

Debug = Annotated[bool, typer.Option(
    "--debug", help="Show tracebacks and warnings.", rich_help_panel=RUN)]
Quiet = Annotated[bool, typer.Option(
    "--quiet", "-q", help="No progress.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option(
    "--json", help="Print the result as JSON on stdout, and nothing else there.",
    rich_help_panel=RUN)]
Out = Annotated[Path | None, typer.Option(
    "--out", "-o", help="Folder of the run; made from the settings by default.",
    rich_help_panel=RUN)]
Resume = Annotated[bool, typer.Option(
    "--resume", help="Continue the run in --out; start it if there is none.",
    rich_help_panel=RUN)]
DryRun = Annotated[bool, typer.Option(
    "--dry-run", help="Print units, budget, expected time, memory and disk; then stop.",
    rich_help_panel=RUN)]

Model = Annotated[str, typer.Option(
    "--model", "-m", help="Backbone: a name on the Hugging Face hub, or a local folder.",
    rich_help_panel=WHAT)]
AnyModel = Annotated[str | None, typer.Option(
    "--model", "-m", help="Backbone; by default the one that it was made on.",
    rich_help_panel=WHAT)]
TaskName = Annotated[str, typer.Option(
    "--task", "-t", help="An embedded task, a folder of data, or a hub name such as glue/sst2; "
    "several, as in a,b,c, share one structure.", rich_help_panel=WHAT)]
TaskWeights = Annotated[str | None, typer.Option(
    "--task-weights", metavar="W,W,...", help="Share of each of several tasks; equal by default.",
    rich_help_panel=WHAT)]
OneTask = Annotated[str | None, typer.Option(
    "--task", "-t", help="Which of the run's tasks, where it has several.",
    rich_help_panel=WHAT)]
AnyTask = Annotated[str | None, typer.Option(
    "--task", "-t", help="Task; by default the one that it was made on.", rich_help_panel=WHAT)]
Data = Annotated[str | None, typer.Option(
    "--data", envvar="SEARCHPET_DATA", help="Folder of task folders.", rich_help_panel=WHAT)]

Strategy = Annotated[str, typer.Option(
    "--strategy", help="How to search; see `searchpet list strategies`.", rich_help_panel=SEARCH)]
SpaceName = Annotated[str | None, typer.Option(
    "--space", help="What to choose from: a name (`searchpet list spaces`) or a TOML file; by "
    "default the strategy's own, else nano.", rich_help_panel=SEARCH)]
Set = Annotated[list[str], typer.Option(
    "--set", metavar="STRATEGY.KEY=VALUE", help="A hyperparameter of the strategy; repeatable.",
    rich_help_panel=SEARCH)]
Budget = Annotated[str, typer.Option(
    "--budget", "-b", help="A share of the backbone (0.01%), a count (2271) or bytes (9KB).",
    rich_help_panel=SEARCH)]
Budgets = Annotated[str, typer.Option(
    "--budget", "-b", help="A share of the backbone (0.01%), a count (2271) or bytes (9KB); "
    "several, as in 0.01%,0.1%, share one search.", rich_help_panel=SEARCH)]
Controls = Annotated[int, typer.Option(
    "--controls", help="Random structures of each kind to compare with; 0 for none.",
    rich_help_panel=SEARCH)]
KeepFlops = Annotated[str | None, typer.Option(
    "--keep-flops", metavar="SHARE", help="Prune too: share of the blocks' FLOPs that stays, such "
    "as 60%.", rich_help_panel=SEARCH)]
KeepWeights = Annotated[str | None, typer.Option(
    "--keep-weights", metavar="SHARE", help="Prune too: share of the blocks' matrix elements that "
    "stays.", rich_help_panel=SEARCH)]
KeepLatency = Annotated[str | None, typer.Option(
    "--keep-latency", metavar="SHARE", help="Prune too: share of the blocks' time on this device "
    "that stays.", rich_help_panel=SEARCH)]
Masks = Annotated[str | None, typer.Option(
    "--masks", help="What pruning may take out: a space of masks. [default: prune/structured]",
    rich_help_panel=SEARCH)]
Must = Annotated[list[str], typer.Option(
    "--must", metavar="PATTERN", help="Units to keep in any case, such as kind=bias,role=ffn.*,"
    "layers=last 2 (kind, role, form, part, path, layers); repeatable.", rich_help_panel=SEARCH)]
Forbid = Annotated[list[str], typer.Option(
    "--forbid", metavar="PATTERN", help="Units never to take; repeatable.",
    rich_help_panel=SEARCH)]
Distill = Annotated[str | None, typer.Option(
    "--distill", metavar="TEACHER", help="Train structures on a teacher's outputs as well: full "
    "(fully fine-tuned here first) or the folder of a run.", rich_help_panel=TRAIN)]
Recovery = Annotated[list[str], typer.Option(
    "--recovery", metavar="TERM=WEIGHT", help="What structures learn from, instead of ce=0.5 and "
    "logits=0.5 under --distill: ce, logits, hidden, attention, unsupervised, supervised; also "
    "temperature=2, contrast_temperature=0.1, attention_form=mse or kl. Repeatable.",
    rich_help_panel=TRAIN)]
Inherit = Annotated[bool | None, typer.Option(
    "--inherit/--fresh", help="Start the training of the structure from what its search has "
    "learned, as bilevel does if nothing is said, or from untrained modules.",
    show_default=False, rich_help_panel=TRAIN)]
CountHead = Annotated[bool, typer.Option(
    "--count-head", help="Let the budget pay for the head too.", rich_help_panel=SEARCH)]
AlsoFull = Annotated[bool, typer.Option(
    "--full", help="Also train full fine-tuning, for reference.", rich_help_panel=SEARCH)]

Seed = Annotated[int, typer.Option(
    "--seed", help="Of everything that is drawn.", rich_help_panel=TRAIN)]
Steps = Annotated[int, typer.Option(
    "--steps", help="Steps of the search, and of each training.", rich_help_panel=TRAIN)]
BatchSize = Annotated[int, typer.Option(
    "--batch-size", help="Examples per step.", rich_help_panel=TRAIN)]
Accumulate = Annotated[int, typer.Option(
    "--accumulate", help="Batches per training step.", rich_help_panel=TRAIN)]
MaxLength = Annotated[int, typer.Option(
    "--max-length", help="Tokens per example.", rich_help_panel=TRAIN)]
Tau = Annotated[float, typer.Option(
    "--tau", help="Relative output change per step, from which each kind's learning rate "
    "follows.", rich_help_panel=TRAIN)]
Lr = Annotated[float | None, typer.Option(
    "--lr", help="One learning rate for every kind, instead of --tau.", rich_help_panel=TRAIN)]
Precision = Annotated[str, typer.Option(
    "--precision", help="fp32, or bf16 for the matrix products.", rich_help_panel=TRAIN)]
Device = Annotated[str, typer.Option(
    "--device", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=TRAIN)]
Test = Annotated[bool, typer.Option(
    "--test", help="Score on the test split, once, at the end.", rich_help_panel=TRAIN)]


def assignments(texts: Sequence[str], strategy: str) -> dict[str, str]:
    """`STRATEGY.KEY=VALUE` -> {KEY: VALUE} of the strategy that runs.

    Raises InputError for another form and for a key of another strategy.
    """
    name, found = strategy.partition(":")[0], {}
    for text in texts:
        target, sign, value = text.partition("=")
        owner, dot, key = target.partition(".")
        if not (sign and dot and owner and key):
            raise InputError(f"--set must read STRATEGY.KEY=VALUE, such as {name}.KEY=VALUE, but "
                             f"got {text!r}")
        if owner.partition(":")[0] != name:
            raise InputError(f"--set must name a key of the strategy that runs, {name}, but got "
                             f"{text!r}; change --strategy or drop it")
        found[key] = value
    return found


def values(texts: Sequence[str], option: str = "--recovery", form: str = "TERM=WEIGHT",
           example: str = "logits=0.9") -> dict[str, str]:
    """`NAME=VALUE` -> {NAME: VALUE}.  Raises InputError for another form."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (sign and name and value):
            raise InputError(f"{option} must read {form}, such as {example}, but got {text!r}")
        found[name] = value
    return found


def settings(ctx: typer.Context) -> dict[str, Any]:
    """The command's options that are fields of Settings; what was not given is left out.

    A task of a run on several, by its name there, is the one that the run was given.
    """
    found = {name: ctx.params[name] for name in SETTINGS if ctx.params.get(name) is not None
             and (source := ctx.get_parameter_source(name)) and source.name != "DEFAULT"}
    if found.get("task") and ctx.params.get("spec"):
        from searchpet.finished import learned

        run = folder_of(ctx.params["spec"])
        found["task"] = ",".join(learned(run, name.strip())[1]
                                 for name in found["task"].split(","))
    return found


def origin(path: Path) -> dict[str, Any]:
    """Model, task, data and length of texts that a spec was made with."""
    from searchpet.apply import asked_before
    from searchpet.run import RunFolder
    from searchpet.spec import Spec

    spec = Spec.load(path)
    before = asked_before(RunFolder(folder_of(path)))
    made = {"model": spec.backbone.name, "task": spec.provenance.get("task")}
    made |= {name: before[name] for name in ("model", "task", "data", "max_length")
             if before.get(name)}
    return {name: value for name, value in made.items() if value}


def at(path: Path) -> Path:
    """Where a spec lies that is named by a path, `searchpet:NAME` or `hf:OWNER/REPOSITORY/NAME`.
    """
    from searchpet.shelf import at as found

    return found(path)


def folder_of(path: Path) -> Path:
    """Where a spec lies: the folder itself, or that of the file."""
    from searchpet.spec import located

    path = located(path)
    return path if path.is_dir() else path.parent
