"""`--recovery TERM=WEIGHT`: every term trains, settings remember it, wrong ones are one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from searchpet import cli, teach
from searchpet.errors import InputError
from searchpet.recovery import TERMS, Objective, Recovery
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.settings import Settings
from searchpet.spec import Spec
from tests.commands import cut_off, write_task

SMALL = ["--steps", "10", "--batch-size", "8", "--max-length", "16", "--tau", "0.5", "--quiet"]
SEARCH = ["search", "--model", "tiny", "--task", "films", "--budget", "2%", "--controls", "0"]
TRAIN = ["train", "found", *SMALL]


def sharp(tiny_folder: Path, folder: Path) -> None:
    """A BERT whose attention heads look at different tokens, without dropout."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    config = transformers.BertConfig.from_pretrained(
        tiny_folder, initializer_range=0.3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with a task, a backbone, and structures: `found`, pruned, and `whole`."""
    folder = tmp_path_factory.mktemp("recovery")
    write_task(folder / "films")
    sharp(tiny_folder, folder / "tiny")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are killed: the numbers must be the same
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("SEARCHPET_DATA", raising=False)
        pruned = ["--keep-flops", "60%", "--masks", "prune/heads_neurons", "--out", "found"]
        assert cli.main([*SEARCH, *SMALL, *pruned]) == 0
        assert cli.main([*SEARCH, *SMALL, "--out", "whole"]) == 0
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def session(home: Path) -> Session:
    return Session(Settings(model="tiny", task="films", steps=30, batch_size=16,
                            max_length=16))


def delta(run: str) -> bytes:
    return Path(run, "delta.safetensors").read_bytes()


def line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


# --- what is learned ---


@pytest.mark.parametrize("term", TERMS)
def test_each_term_lowers_its_own_loss_in_a_pruned_training(
    home: Path, session: Session, term: str
) -> None:
    """Measured on all of the training split before and after, without dropout."""
    needs = term not in ("ce", "unsupervised")
    recovery = teach.losses("full" if needs else None, {term: 1})
    assert recovery == Recovery(**dict.fromkeys(TERMS, 0.0) | {term: 1.0})
    teaching = teach.taught(session, RunFolder("teacher").sub("full"),
                            "full" if needs else None, recovery)
    everything = session.splits["train"].batch(range(48))
    found: list[float] = []

    def measured(objective: Objective, student: nn.Module) -> None:
        student.eval()
        with torch.no_grad():
            terms = objective.terms(everything)
        assert list(terms) == [term]
        found.append(float(terms[term]))

    kept: list[Any] = []

    def watched(student: nn.Module, batch: dict[str, torch.Tensor]) -> Objective:
        kept.append(teaching(student, batch))
        measured(kept[0], student)
        return kept[0]  # type: ignore[no-any-return]

    session.teaching = watched
    session.fit(Spec.load("found"), None, 0, after=lambda model: measured(kept[0], model))
    session.teaching = None
    before, after = found
    assert after < before


def test_the_default_is_what_it_was(home: Path, session: Session) -> None:
    """`--distill` alone trains on half the labels and half the logits, and on nothing else."""
    folder, spec = RunFolder("teacher").sub("full"), Spec.load("whole")
    new = teach.taught(session, folder, "full")
    model = teach.full(session, folder).eval().requires_grad_(False)

    def old(student: nn.Module, batch: dict[str, torch.Tensor]) -> Objective:
        return Objective(student, model, Recovery(ce=0.5, logits=0.5), batch)

    for name, teaching in (("new", new), ("old", old)):
        session.teaching = teaching
        session.fit(spec, RunFolder("same").sub(name), 0)
    session.teaching = None
    assert delta("same/new") == delta("same/old")


def test_terms_by_name_replace_the_default_and_options_do_not(home: Path) -> None:
    runs = {"plain": [], "ce": ["--recovery", "ce=1"], "half": ["--distill", "whole"],
            "named": ["--distill", "whole", "--recovery", "ce=0.5", "--recovery", "logits=0.5"],
            "cold": ["--distill", "whole", "--recovery", "temperature=1"]}
    for name, words in runs.items():
        assert cli.main([*TRAIN, *words, "--out", name]) == 0
    assert delta("plain") == delta("ce") != delta("half") == delta("named") != delta("cold")
    settings = {name: json.loads(Path(name, "settings.json").read_text()) for name in runs}
    assert settings["plain"]["recovery"] is settings["half"]["recovery"] is None
    assert settings["cold"]["recovery"] == vars(Recovery(ce=0.5, logits=0.5, temperature=1.0))


@pytest.mark.slow
def test_a_search_with_every_term_is_the_same_after_a_kill(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [word for term in TERMS for word in ("--recovery", f"{term}=0.3")]
    words = [*SEARCH, *SMALL, "--controls", "1", "--keep-flops", "60%", "--masks",
             "prune/heads_neurons", "--distill", "full", *every]
    assert cli.main([*words, "--out", "uncut"]) == 0
    killed = cut_off([*words, "--out", "cut"], "SIGKILL train 4", home)
    assert killed.returncode == -9, killed.stderr
    changed = ["0.4" if word == "0.3" else word for word in words]
    changed[changed.index("hidden=0.3")] = "hidden=0.4"
    assert "recovery was" in line([*changed, "--out", "cut", "--resume"], capsys)
    assert cli.main([*words, "--out", "cut", "--resume"]) == 0
    for run in ("", "/controls/random-0", "/controls/random-unit-0"):
        assert delta(f"cut{run}") == delta(f"uncut{run}")


def test_plain_attention_is_asked_for_only_while_it_is_needed(
    home: Path, session: Session
) -> None:
    with session.fresh(0) as model:
        before = model.config._attn_implementation  # type: ignore[union-attr]
        batch = session.splits["train"].batch(range(8))
        logits = model.eval()(**batch).logits
    terms = teach.losses("full", {"attention": 1, "attention_form": "kl"})
    assert terms is not None and before != "eager"
    session.teaching = teach.taught(session, RunFolder("teacher").sub("full"), "full", terms)
    session.fit(Spec.load("whole"), None, 0)
    session.teaching = None
    with session.fresh(0) as model:
        assert model.config._attn_implementation == before  # type: ignore[union-attr]
        assert torch.equal(model.eval()(**batch).logits, logits)


def test_banks_are_bounded_and_the_same_each_time(
    home: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = Recovery(unsupervised=1, supervised=1)
    with session.fresh(0) as model:
        own = model
        first, again = (teach._banks(session, recovery, session.load(0)) for _ in range(2))
        assert own is model
    for term in ("unsupervised", "supervised"):
        (one,), (other,) = first[term], again[term]
        assert torch.equal(one.rows, other.rows) and one.place == other.place
        assert len(one.rows) == 48


# --- refusals ---


@pytest.mark.parametrize(("words", "message"), [
    (["--recovery", "logit=1"], "but got 'logit'; did you mean 'logits'?"),
    (["--recovery", "logits"], "--recovery must read TERM=WEIGHT, such as logits=0.9"),
    (["--recovery", "ce=-1"], "ce must be a finite number >= 0, but got -1.0"),
    (["--recovery", "ce=nan"], "ce must be a finite number >= 0"),
    (["--recovery", "ce=much"], "--recovery ce must be a number such as ce=0.5"),
    (["--recovery", "ce=0"], "must be > 0, but all are 0"),
    (["--recovery", "ce=1", "--recovery", "temperature=0"], "temperature must be a finite number"),
    (["--recovery", "hidden=1", "--recovery", "ce=1"],
     "--recovery hidden must have a teacher, but --distill is not given; add --distill full"),
    (["--recovery", "temperature=3"], "--recovery logits must have a teacher"),
    (["--distill", "full", "--recovery", "unsupervised=1"], "add logits=1 or drop --distill"),
    (["--distill", "full", "--recovery", "attention_form=kul"], "did you mean 'kl'?"),
])
@pytest.mark.parametrize("command", ["search", "train"])
def test_wrong_input_is_one_line_before_any_work(
    home: Path, command: str, words: list[str], message: str,
    capsys: pytest.CaptureFixture[str]
) -> None:
    base = TRAIN if command == "train" else [*SEARCH, *SMALL]
    assert message in line([*base, *words, "--out", "wrong"], capsys)
    assert not Path("wrong").exists()


def test_a_reference_learns_from_the_task_alone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--full", "--model", "tiny", "--task", "films", *SMALL, "--out", "wrong"]
    assert "must train a spec" in line([*words, "--recovery", "ce=1"], capsys)
    assert "must train a spec" in line([*words, "--distill", "full"], capsys)


@pytest.fixture(scope="module")
def foreign(home: Path, tiny_folder: Path) -> str:
    """A run on another architecture with the same tokens."""
    config = transformers.DistilBertConfig(
        vocab_size=len(transformers.AutoTokenizer.from_pretrained(tiny_folder)), dim=16,
        hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.DistilBertModel(config).save_pretrained("distil")
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained("distil")
    words = [*SEARCH, *SMALL, "--space", "lora_ranks", "--out", "foreign"]
    words[words.index("tiny")] = "distil"
    assert cli.main(words) == 0
    return "foreign"


@pytest.mark.parametrize(("term", "message"), [
    ("hidden", "architecture bert, but got distilbert; leave them out and use logits"),
    ("attention", "architecture bert, but got distilbert"),
    ("supervised", "student's 32 channels, but has 16; leave supervised out"),
])
def test_a_teacher_that_cannot_teach_a_term_is_refused_before_the_search(
    home: Path, foreign: str, term: str, message: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path
) -> None:
    words = [*SEARCH, *SMALL, "--distill", foreign, "--out", str(tmp_path / "run")]
    assert message in line([*words, "--recovery", f"{term}=1"], capsys)
    assert not (tmp_path / "run/spec.json").exists()
    assert cli.main([*words, "--recovery", "logits=1", "--resume"]) == 0


@pytest.mark.parametrize("term", ["hidden", "attention"])
def test_a_student_that_lost_an_attention_learns_from_what_is_left(
    home: Path, term: str, tmp_path: Path
) -> None:
    """One sublayer's attention is removed: hidden still has all layers, attention has not."""
    (home / "blocks.toml").write_text(
        'description = "attention sublayers"\n[[rule]]\nkind = "sublayers"\ngrain = "module"\n'
        'select = {role = "attention.block"}\n')
    words = [*SEARCH, *SMALL, "--keep-flops", "85%", "--masks", "blocks.toml", "--distill",
             "full", "--recovery", f"{term}=1", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["removed"]
    gone = [e for e in Spec.load(tmp_path / "run").entries if e.kind == "sublayers"]
    assert len(gone) == 1 and gone[0].kept == []


def test_a_student_that_lost_a_layer_learns_hidden_states_and_attention(
    home: Path, tmp_path: Path
) -> None:
    words = [*SEARCH, *SMALL, "--keep-flops", "55%", "--masks", "prune/layers", "--distill",
             "full", "--recovery", "hidden=1", "--recovery", "attention=1"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["removed"]


def test_numbers_have_no_classes_to_contrast(session: Session) -> None:
    """Of a regression `supervised` is refused by name."""
    recovery = Recovery(ce=0, supervised=1)
    banks = teach._banks(session, recovery, session.load(0))
    texts = session.splits["train"].batch(range(4))
    real = texts | {"labels": texts["labels"].float()}
    with session.fresh(0) as model, pytest.raises(InputError, match="supervised needs classes"):
        Objective(model, None, recovery, real, banks)
