"""Transfer: laws over pairs of families, depth both ways, pruning, foreign specs, the command."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from searchpet import cli
from searchpet.apply import apply
from searchpet.apportion import Cell, apportion, counts
from searchpet.backbone import Identity, config_hash
from searchpet.budget import fill
from searchpet.counterpart import Source, Target, match, overlaps, source_of
from searchpet.discover import depths, discover
from searchpet.errors import InputError
from searchpet.limits import Limits
from searchpet.oneshot import by_magnitude
from searchpet.pruning import Prune, keep_of
from searchpet.pruning import used as kept_use
from searchpet.spec import Entry, Spec
from searchpet.transfer import Worth, carry
from tests.commands import cut_off, workplace
from tests.laws import families as tiny

PAIRS = [("bert", "llama"), ("llama", "bert"), ("bert", "t5"), ("t5", "bert"), ("bert", "albert"),
         ("albert", "bert"), ("gpt2", "gpt_neox"), ("qwen3", "vit"), ("gemma", "gpt2"),
         ("vit", "gemma"), ("t5", "qwen3"), ("gpt_neox", "t5")]
every_pair = pytest.mark.parametrize(("source", "target"), PAIRS)
SILENT = ("mapped", "approximated", "dropped")


def found(family: str, share: float = 0.1, model: nn.Module | None = None) -> Spec:
    """A spec as a search leaves it, of all kinds."""
    of = tiny.model(family) if model is None else model
    placed = tiny.space(of, *tiny.every_kind(lora={"rank": 2}))
    keep = fill(torch.rand(len(placed), generator=torch.Generator().manual_seed(0)), placed.cost,
                int(share * placed.total))
    spec = tiny.spec_of(of, placed, keep)
    return spec.model_copy(update={"provenance": {"stacks": depths(discover(of))}})


def pruned(family: str, share: str = "60%") -> Spec:
    """A spec of prune masks and PET on what is left."""
    of = tiny.model(family)
    placed = tiny.space(of, tiny.rule("bias", "channel"), tiny.rule("heads", "atom"),
                        tiny.rule("neurons", "atom", {"multiple": 1}),
                        tiny.rule("sublayers"))
    keep = keep_of(Prune("flops", share), of, placed)
    limits = Limits(placed, 100, keep)
    chosen = limits.fill(torch.rand(len(placed), generator=torch.Generator().manual_seed(1)))
    used = limits.parameters(chosen)
    spec = tiny.spec_of(of, placed, chosen, limit=used, used=used, text=str(used))
    return spec.model_copy(update={
        "entries": limits.entries(chosen), "plan": limits.plan(chosen),
        "keep": kept_use(keep, limits.kept(chosen)),
        "provenance": {"stacks": depths(discover(of))}})


def carried(spec: Spec, to: nn.Module, budget: str | None = None, name: str = "there",
            ) -> tuple[Spec, dict[str, Any]]:
    head = tiny.head_of(to)
    count = sum(p.numel() for n, p in to.named_parameters() if n not in head)
    return carry(spec, Identity(name, "r2", config_hash(to.config), count), to, budget, 0,
                 Worth("magnitude", lambda space: by_magnitude(to, space, head, 0)))


def bert(layers: int, **more: Any) -> nn.Module:
    config = transformers.BertConfig(**tiny.TEXT | {"num_hidden_layers": layers} | more)
    return transformers.BertForSequenceClassification(config).eval()


@every_pair
def test_a_spec_fits_the_other_family_within_its_budget(source: str, target: str) -> None:
    spec, to, batch = found(source), tiny.model(target, seed=1), tiny.inputs(target)
    before = tiny.logits(to, batch)
    moved, report = carried(spec, to)
    limit = spec.budget.limit * moved.budget.denominator // spec.budget.denominator
    assert moved.budget.limit == limit and moved.budget.used <= limit
    assert moved.budget.slack == 0  # there are channels, which cost 1
    assert torch.equal(tiny.logits(apply(to, moved), batch), before)
    trained = tiny.sizes(to.searchpet.deltas.parameters())
    assert trained == moved.budget.used
    # every entry of the source has one verdict, and one that gave nothing says why
    assert Counter(e["entry"] for e in report["entries"]) == Counter(e.key for e in spec.entries)
    assert sum(report["counts"].values()) == len(spec.entries)
    assert all(e["verdict"] in SILENT and bool(e["to"]) is (e["verdict"] != "dropped")
               for e in report["entries"])
    assert all(e["why"] for e in report["entries"] if e["verdict"] != "mapped")
    keys = {e.key for e in moved.entries}
    assert all(keys & set(e["to"]) for e in report["entries"] if e["to"])
    assert moved.provenance == {} and Spec.parse(json.loads(moved.text())) == moved


def test_stacks_that_meet_in_one_are_said_to() -> None:
    """What was in encoder and decoder at one depth comes to one place."""
    to = bert(2)
    _, report = carried(found("t5"), to)
    both: dict[str, set[bool]] = defaultdict(set)
    for entry in report["entries"]:
        for key in entry["to"]:
            both[key].add("decoder" in entry["entry"])
    shared = {key for key, stacks in both.items() if len(stacks) == 2}
    assert shared
    for entry in report["entries"]:
        if set(entry["to"]) & shared:
            assert entry["verdict"] == "approximated" and "share a site there" in entry["why"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_same_architecture_keeps_every_entry(family: str) -> None:
    spec = found(family)
    moved, report = carried(spec, tiny.model(family, seed=5), name="retrained")
    assert (moved.entries, moved.budget) == (spec.entries, spec.budget)
    assert (moved.backbone.name, moved.backbone.revision) == ("retrained", "r2")
    assert report["counts"]["mapped"] == len(spec.entries)


def test_the_same_architecture_with_more_budget_keeps_what_there_is_and_adds() -> None:
    spec = found("bert", model=bert(4))
    more, _ = carried(spec, bert(4), str(2 * spec.budget.limit))
    less, _ = carried(spec, bert(4), str(spec.budget.limit // 2))
    own = {e.key: set(e.kept) for e in spec.entries if e.kind in ("bias", "scale")}
    assert own.keys() <= {e.key for e in more.entries}
    assert all(own[e.key] <= set(e.kept) for e in more.entries if e.key in own)
    assert all(set(e.kept) <= own[e.key] for e in less.entries if e.kind in ("bias", "scale"))
    assert more.budget.used == 2 * spec.budget.limit and less.budget.slack == 0


@pytest.mark.parametrize(("layers", "onto"), [(12, 24), (24, 12), (4, 6)])
def test_counts_follow_role_and_relative_depth(layers: int, onto: int) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8}
    spec, to = found("bert", 0.2, bert(layers, **small)), bert(onto, **small)
    moved, _ = carried(spec, to)
    scale = moved.budget.used / spec.budget.used

    def halves(of: Spec, depth: int) -> dict[tuple[str, str, bool], int]:
        sums: dict[tuple[str, str, bool], int] = defaultdict(int)
        for e in of.entries:
            if 0 <= e.layer < depth and e.kind in ("bias", "scale"):
                sums[e.role, e.kind, e.layer >= depth // 2] += len(e.kept)
        return sums

    before, after = halves(spec, layers), halves(moved, onto)
    assert before and before.keys() == after.keys()
    for key, count in before.items():  # one for each rounded end, one for the slack
        assert abs(after[key] - scale * count) <= 3 + 0.06 * count, key


def test_depth_overlaps_sum_to_one() -> None:
    assert overlaps(3, 12, 24) == pytest.approx({6: 0.5, 7: 0.5})
    assert overlaps(5, 24, 12) == pytest.approx({2: 1.0})
    assert overlaps(0, 1, 12) == pytest.approx(dict.fromkeys(range(12), 1 / 12))
    for of, onto in ((7, 5), (12, 18), (80, 3), (1, 1)):
        spreads = [overlaps(i, of, onto) for i in range(of)]
        assert all(sum(s.values()) == pytest.approx(1) for s in spreads)
        onto_each = [sum(s.get(j, 0) for s in spreads) for j in range(onto)]
        assert onto_each == pytest.approx([of / onto] * onto)


def test_apportioning_is_proportional_along_a_chain_and_never_above() -> None:
    cells = [Cell("a", 0.5, torch.arange(10 * i, 10 * i + 10), 3) for i in range(8)]
    assert counts(cells, 1.0) == [1, 0, 1, 0, 1, 0, 1, 0]  # every other one of the depth
    for limit in (0, 1, 3, 17, 100, 240, 1000):
        score = apportion(cells, limit, 80)
        keep = fill(score, torch.full((80,), 3), limit)
        assert int(keep.sum()) == min(80, limit // 3)
        each = keep.view(8, 10).sum(1)
        assert int(each.max() - each.min()) <= 1


@pytest.mark.parametrize(("entry", "role", "kind", "why"), [
    (("norm.embedding", -1), "norm.attention", "bias", "stands in"),
    (("cross_attention.query", 0), None, "lora", "no cross_attention.query in the decoder"),
    (("attention.query", 1), None, "adapter", "adapter does not fit attention.query"),
    (("attention.nonsense", 1), None, "bias", "no attention.nonsense"),
    (("ffn.gate", 0), "ffn.gate", "scale", ""),
])
def test_what_has_no_counterpart_says_why(entry: tuple[str, int], role: str | None, kind: str,
                                          why: str) -> None:
    target = Target(discover(tiny.model("llama")))
    own = Entry(path="encoder.x", role=entry[0], layer=entry[1], kind=kind, options={}, kept=[0])
    m = match(own, Source({"encoder": 2}), target)
    assert why in m.why and (m.verdict == "dropped") is (role is None)
    assert {place[1] for place in m.shares} == ({role} if role else set())


def test_an_encoder_feeds_both_stacks_and_no_cross_attention() -> None:
    moved, report = carried(found("bert", 0.3), tiny.model("t5"))
    assert {"encoder" in e.path for e in moved.entries} == {True, False}
    assert not any(e.role.startswith("cross") for e in moved.entries)
    assert any("cross attention, of which it says nothing" in note for note in report["notes"])


@pytest.mark.parametrize(("source", "target"), [("bert", "gpt2"), ("llama", "bert"),
                                                ("bert", "t5")])
def test_pruning_goes_by_the_plan_and_is_settled_again(source: str, target: str) -> None:
    spec, to = pruned(source), tiny.model(target, seed=2)
    moved, report = carried(spec, to)
    assert moved.keep is not None and spec.keep is not None
    assert (moved.keep.text, moved.keep.measure) == (spec.keep.text, spec.keep.measure)
    assert moved.keep.used <= moved.keep.limit
    assert report["counts"]["dropped"] < len(spec.entries)
    assert moved.budget.used <= moved.budget.limit
    model = apply(to, moved)  # PET on what is left, masks as hooks
    assert tiny.sizes(p for g in model.searchpet.grafts for p in g.delta.parameters()) == \
        moved.budget.used


def test_a_sublayer_that_is_gone_is_gone_at_its_depth() -> None:
    spec = pruned("bert", "70%")
    layers = tiny.PLAIN["num_hidden_layers"]
    plan = tuple(r.model_copy(update={"kept": float(not (r.role == "ffn.block" and r.depth == 1))
                                      if r.kind == "sublayers" else 1.0}) for r in spec.plan)
    to = bert(2 * layers)
    moved, report = carried(spec.model_copy(update={"plan": plan}), to)
    why = {e["why"] for e in report["entries"] if e["verdict"] == "dropped" and "ffn" in e["entry"]
           and ":norm" not in e["entry"]}
    assert why == {"pruning leaves nothing of its places"}
    gone = {(e.role, e.layer) for e in moved.entries if e.kind == "sublayers"}
    assert gone <= {("ffn.block", 2), ("ffn.block", 3)} and gone


def test_without_a_recorded_depth_it_is_estimated_and_said() -> None:
    spec = found("bert", 0.3).model_copy(update={"provenance": {}})
    assert source_of(spec).stacks == {"encoder": 2}
    _, report = carried(spec, tiny.model("gpt2"))
    assert report["notes"][0].startswith("the spec does not say how deep")


@pytest.mark.parametrize(("stacks", "match"), [
    ({"encoder": True}, "must count the blocks"), ({"x": 2}, "must count the blocks"),
    ([1], "must count the blocks"), ({}, "must count the blocks"),
    ({"encoder": 10**9}, "must count the blocks"), ({"encoder": 1}, "must lie in the 1 blocks")])
def test_a_false_depth_is_refused(stacks: Any, match: str) -> None:
    spec = found("bert", 0.3).model_copy(update={"provenance": {"stacks": stacks}})
    with pytest.raises(InputError, match=match):
        carried(spec, tiny.model("gpt2"))


def test_foreign_specs_are_refused_in_one_line() -> None:
    spec, to = found("bert"), tiny.model("gpt2")

    def edited(**changes: Any) -> Spec:
        return spec.model_copy(update={"entries": (spec.entries[0].model_copy(update=changes),)})

    with pytest.raises(InputError, match="did you mean 'lora'"):
        carried(edited(kind="lorra"), to)
    with pytest.raises(InputError, match="option"):
        carried(edited(options={"evil": 1}), to)
    with pytest.raises(InputError, match="finds none: no nowhere in the decoder there"):
        carried(edited(role="nowhere", layer=0), to)
    with pytest.raises(InputError, match="must buy at least one unit"):
        carried(spec, to, "0")


# --- the command line ---------------------------------------------------------------------------

JOB = ["--task", "films", "--steps", "8", "--batch-size", "8", "--max-length", "16"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path,
         tiny_tokenizer: Any) -> Iterator[Path]:
    """A folder with a task, the backbones `tiny` and `deep`, and a spec of `tiny`."""
    folder = tmp_path_factory.mktemp("transfer")
    with workplace(folder, tiny_folder):
        config = transformers.LlamaConfig(**tiny.GATED | {"vocab_size": len(tiny_tokenizer),
                                                          "num_hidden_layers": 3})
        torch.manual_seed(0)
        transformers.LlamaModel(config).save_pretrained("deep")
        tiny_tokenizer.save_pretrained("deep")
        assert cli.main(["search", "--model", "tiny", "--budget", "1%", "--strategy", "random",
                         "--controls", "0", "--out", "found", "--quiet", *JOB]) == 0
        yield folder


def test_the_command_carries_trains_and_reports(home: Path, capsys: Any) -> None:
    words = ["transfer", "found", "--model", "deep", "--controls", "1", "--out", "there",
             "--quiet", *JOB]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "kept in source" in said and "transfer (found)" in said and "random:unit" in said
    spec, source = Spec.load("there"), Spec.load("found")
    result, report = (json.loads((home / "there" / name).read_text())
                      for name in ("result.json", "transfer.json"))
    assert spec.provenance["source"]["hash"] == report["source"]["hash"] == source.hash
    assert spec.provenance["stacks"] == {"decoder": 3} and spec.budget.text == "1%"
    assert result["strategy"] == "transfer" and result["trainable"] == spec.budget.used
    assert "gradients on 8 batches of films" in " ".join(report["notes"])
    assert cli.main(["verify", "there"]) == 0
    assert "WRONG" not in capsys.readouterr().out
    assert cli.main([*words, "--resume"]) == 0  # done already
    assert cli.main(words) == 2


def test_without_training_only_the_structure_is_written(home: Path, capsys: Any) -> None:
    assert cli.main(["transfer", "found", "--model", "deep", "--no-train", "--out", "only",
                     "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((home / "only" / "transfer.json").read_text())
    assert "magnitude" in " ".join(report["notes"])
    files = {f.name for f in (home / "only").iterdir()}
    assert files == {"settings.json", "source.json", "spec.json", "transfer.json"}
    assert cli.main(["train", "only", "--out", "later", "--quiet", *JOB[2:]]) == 0
    assert json.loads((home / "later" / "result.json").read_text())["task"] == "films"


def test_a_killed_transfer_goes_on_to_the_same_numbers(home: Path) -> None:
    words = ["transfer", "found", "--model", "deep", "--quiet", *JOB]
    assert cli.main([*words, "--out", "whole"]) == 0
    cut = cut_off([*words, "--out", "cut"], "SIGKILL train 5", home)
    assert cut.returncode == -9 and not (home / "cut" / "result.json").exists()
    assert cli.main([*words, "--out", "cut", "--resume"]) == 0
    for name in ("spec.json", "transfer.json", "delta.safetensors"):
        one, other = (home / run / name for run in ("whole", "cut"))
        if name == "spec.json":
            assert Spec.load(one).entries == Spec.load(other).entries
        else:
            assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("words", "line"), [
    (["found"], "Missing option '--model'"),
    (["found", "--model", "nowhere", "--task", "films"], "backbone must be a local folder"),
    (["found", "--model", "deep", "--budget", "nine"], "budget must be a share"),
    (["films", "--model", "deep"], "neither"),
    (["searchpet:nothing", "--model", "deep"], "searchpet:NAME must be one of"),
])
def test_wrong_words_are_one_line(home: Path, capsys: Any, words: list[str], line: str) -> None:
    assert cli.main(["transfer", *words, "--out", "wrong", "--no-train"]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
