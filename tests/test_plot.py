"""Figures: what is drawn is what the specs and results say.  Structure, not pixels."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure

from searchpet import canvas, cli, curves, plot
from searchpet.curves import logged, record_of, trainings_of
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.outline import Outline, Place, Share, ordered, outline
from searchpet.realise import pet_grafts, structure
from searchpet.run import RunFolder
from searchpet.spec import Spec
from searchpet.strategies import bilevel
from searchpet.trace import FILE, POINTS, Record, Trace, read
from tests.commands import write_task
from tests.laws import families
from tests.laws.problems import problem

ROLES = ("norm.attention", "attention.query", "attention.key", "attention.value",
         "attention.output", "attention.other", "norm.ffn", "ffn.gate", "ffn.in", "ffn.other",
         "ffn.out", "a_role.of_a_plugin.with_a_name.that_goes_on_and_on")
KINDS = ("lora", "bias", "scale")


def made(layers: int, seed: int = 0, parts: tuple[str, ...] = ("",)) -> Outline:
    """An outline of so many layers and twelve roles, with masks."""
    draw = torch.Generator().manual_seed(seed)
    places, shares = [], []
    for part in parts:
        for layer in range(layers):
            for role in ROLES:
                for kind in KINDS:
                    count = int(torch.randint(0, 9, (), generator=draw))
                    if count:
                        kept = torch.randperm(64, generator=draw)[:count].sort().values.tolist()
                        places.append(Place((part, role), layer, f"{part}{layer}.{role}", kind,
                                            tuple(kept), 10 * count))
            kept_share = (layer % 3) / 2
            shares.append(Share((part, "attention.output"), layer, "heads", kept_share))
    rows = ordered({(part, role) for part in parts for role in ROLES})
    return Outline(f"spec{seed}", rows, layers, tuple(places), tuple(shares), True)


def artist(figure: Figure, name: str, axes: int = 0) -> PatchCollection:
    found = [c for c in figure.axes[axes].collections if c.get_label() == name]
    assert len(found) == 1, name
    assert isinstance(found[0], PatchCollection)
    return found[0]


def ticks(axis: Any) -> list[Any]:
    """Labels of the ticks that are in view."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of visible tick labels of one axis, and of titles and legends, that touch."""
    figure.draw_without_rendering()
    groups = []
    for axes in figure.axes:
        groups += [ticks(axes.xaxis), ticks(axes.yaxis)]
    for legend in figure.legends:
        groups.append(legend.get_texts())
    bad = []
    for group in groups:
        shown = [(t.get_text(), t.get_window_extent()) for t in group
                 if t.get_text() and t.get_visible()]
        bad += [(a, b) for i, (a, one) in enumerate(shown) for b, two in shown[i + 1:]
                if one.shrunk(0.98, 0.9).overlaps(two.shrunk(0.98, 0.9))]
    return bad


def beyond(figure: Figure) -> list[str]:
    """Texts that leave the sheet."""
    figure.draw_without_rendering()
    size = figure.bbox
    texts = [t for axes in figure.axes for t in [*ticks(axes.xaxis), *ticks(axes.yaxis),
                                                 axes.title, axes._left_title]]
    texts += [t for legend in figure.legends for t in legend.get_texts()]
    texts += [figure._suptitle] if figure._suptitle else []
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts
             if t.get_text() and t.get_visible()]
    return [name for name, box in boxes
            if box.x0 < -2 or box.y0 < -2 or box.x1 > size.x1 + 2 or box.y1 > size.y1 + 2]


@pytest.mark.parametrize(("layers", "parts"), [
    (1, ("",)), (6, ("",)), (24, ("encoder", "decoder")), (80, ("",))])
def test_a_structure_has_a_bar_for_each_position(layers: int, parts: tuple[str, ...]) -> None:
    one = made(layers, parts=parts)
    figure = plot.structure(one)
    for kind in KINDS:
        assert len(artist(figure, kind).get_paths()) == sum(p.kind == kind for p in one.places)
    cells, gone = artist(figure, "cells"), one.gone()
    crossed = len(artist(figure, "gone").get_paths()) if gone else 0
    assert crossed == len(gone)
    assert len(cells.get_paths()) + crossed == len(one.rows) * layers
    totals = Counter[Any]()
    for place in one.places:
        totals[place.row] += place.parameters
    right = figure.axes[0].child_axes[0]
    assert [t.get_text() for t in right.get_yticklabels()] == [f"{totals[r]:,}" for r in one.rows]
    assert not overlaps(figure)
    assert not beyond(figure)


def test_bars_grow_with_the_root_of_their_parameters() -> None:
    places = tuple(Place(("", "ffn.in"), layer, f"l{layer}", "bias", (0,), count)
                   for layer, count in enumerate((400, 100, 25)))
    one = Outline("x", (("", "ffn.in"),), 3, places, (), True)
    high = [path.get_extents().height for path in artist(plot.structure(one), "bias").get_paths()]
    assert high == pytest.approx([high[0], high[0] / 2, high[0] / 4])


def test_kinds_look_alike_in_every_figure_and_unlike_each_other() -> None:
    alone, together = canvas.ink(["bias"]), canvas.ink(["mine", "bias", "lora", "theirs"])
    assert alone["bias"] == together["bias"]
    assert len({color for color, _ in together.values()}) == 4
    assert len({hatch for _, hatch in together.values()}) == 4


def test_shares_of_masks_are_filled_as_far_as_they_keep() -> None:
    figure = plot.structure(made(6))
    kept, removed = artist(figure, "kept"), artist(figure, "removed")
    whole = 1 - 2 * 0.08
    assert sum(p.get_extents().height for p in kept.get_paths()) == pytest.approx(3 * whole)
    assert sum(p.get_extents().height for p in removed.get_paths()) == pytest.approx(3 * whole)
    texts = [t.get_text() for t in figure.axes[0].texts if str(t.get_gid()).startswith("share")]
    assert texts == ["0", "50", "100"] * 2


@pytest.mark.parametrize("layers", [6, 24])
def test_changes_count_what_only_one_keeps(layers: int) -> None:
    a, b = made(layers, 0), made(layers, 1)
    figure = plot.changes(a, b)

    def kept(one: Outline) -> set[Any]:
        return {(p.path, p.kind, c) for p in one.places
                for c in (range(len(p.kept)) if p.kind == "lora" else p.kept)}  # atoms are alike

    assert figure.axes[2].get_title(loc="left") == (
        f"kept by both: {len(kept(a) & kept(b)):,}\nonly A: {len(kept(a) - kept(b)):,}, "
        f"only B: {len(kept(b) - kept(a)):,}")
    alone = {(p.row, p.layer) for p in a.places for c in p.kept if (p.path, p.kind, c)
             not in kept(b)}
    assert len(artist(figure, "only A", 2).get_paths()) == len(alone)
    assert not overlaps(figure)
    assert not beyond(figure)


def test_a_structure_and_itself_differ_in_nothing() -> None:
    figure = plot.changes(made(3), made(3))
    assert "only A: 0, only B: 0" in figure.axes[2].get_title(loc="left")
    assert not [c for c in figure.axes[2].collections if str(c.get_label()).startswith("only")]


def test_structures_without_a_common_role_are_not_compared() -> None:
    other = Outline("y", (("", "mixer"),), 1, (Place(("", "mixer"), 0, "m", "bias", (0,), 1),),
                    (), True)
    with pytest.raises(InputError, match="role in common"):
        plot.changes(made(1), other)


@pytest.mark.parametrize("layers", [1, 80])
def test_parameters_add_up_by_layer_and_by_role(layers: int) -> None:
    one = made(layers)
    figure = plot.parameters(one)
    left, right = figure.axes
    assert sum(bar.get_height() for bar in left.patches) == one.total
    assert sum(bar.get_width() for bar in right.patches) == one.total
    assert not overlaps(figure)
    assert not beyond(figure)


def test_frequency_counts_coordinates_over_specs() -> None:
    row = (("", "ffn.in"),)
    specs = [Outline(str(i), row, 1, (Place(row[0], 0, "m", "bias", kept, 3),), (), True)
             for i, kept in enumerate([(0, 1), (0, 2), (0, 1)])]
    figure = plot.frequency(specs)
    assert [bar.get_height() for bar in figure.axes[1].patches] == [1, 1, 1]  # 2; 1; 0
    cell = figure.axes[0].images[0].get_array()
    assert float(cell[0, 0]) == pytest.approx((3 + 2 + 1) / 9)
    assert "67%" in [text.get_text() for text in figure.axes[0].texts]  # in the words of the bar
    assert "100%" in [tick.get_text() for tick in figure.axes[2].get_yticklabels()]
    assert "share 56%" in figure._suptitle.get_text()  # 1/3, 1, 1/3
    with pytest.raises(InputError, match="two specs or more"):
        plot.frequency(specs[:1])


def test_the_knee_is_where_more_budget_stops_paying() -> None:
    points = [plot.Scored("mine", n, s + d) for n, s in ((10, 0.5), (100, 0.8), (1000, 0.85),
                                                         (10_000, 0.86)) for d in (-0.01, 0.01)]
    figure = plot.budget([*points, plot.Scored("other", 10, 0.4), plot.Scored("other", 99, 0.5)])
    (mark,) = [line for line in figure.axes[0].lines if line.get_gid()]
    assert list(mark.get_xdata()) == [100]
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["mine, knee at 100", "other"]
    with pytest.raises(InputError, match="two budgets or more"):
        plot.budget(points[:2])


def test_cost_shows_found_filled_and_controls_open() -> None:
    figure = plot.cost([plot.Scored("bilevel", 100, 0.9), plot.Scored("random", 90, 0.7, False),
                        plot.Scored("full fine-tuning", 10**6, 0.95, False)])
    filled = [bool((c.get_facecolor()[0][:3] != 1).any()) for c in figure.axes[0].collections]
    assert filled == [True, False, False]
    assert not overlaps(figure)


def test_transfer_has_a_number_in_each_cell_and_frames_what_is_at_home() -> None:
    rows = [{"source": s, "target": t, "score": 0.5 + 0.1 * i + 0.01 * k}
            for i, (s, t) in enumerate([("b", "a"), ("b", "b"), ("a", "a")]) for k in range(2)]
    figure = plot.transfer(rows)
    axes = figure.axes[0]
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert texts[(0, 0)] == "0.705\n±0.007"  # found on a, trained on a
    assert texts[(1, 0)] == "–"
    assert len([p for p in axes.patches if str(p.get_gid()).startswith("own")]) == 2
    with pytest.raises(InputError, match="source, target and score"):
        plot.transfer([{"source": "a", "score": 1}])


def test_colours_of_a_transfer_are_relative_to_the_tasks_own() -> None:
    scores = {("a", "a"): 0.9, ("b", "a"): 0.45, ("b", "b"): 0.2, ("a", "b"): 0.1}
    rows = [{"source": s, "target": t, "score": v} for (s, t), v in scores.items()]
    figure = plot.transfer(rows)
    image = figure.axes[0].images[0]
    assert image.get_array().tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert figure.axes[1].get_ylabel() == "relative to the task's own"
    assert plot.transfer([rows[0], rows[3]]).axes[1].get_ylabel() == "score"  # none on b itself


def test_a_grids_table_is_a_transfer_matrix(tmp_path: Path) -> None:
    rows = [{"task": t, "method": m, "budget": "1%", "metric": "accuracy", "split": "test",
             "seed": s, "score": 0.5 + 0.1 * s}
            for t in "ab" for m in ("from a", "from b", "shared") for s in range(2)]
    table = tmp_path / "results.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))  # the last line without its end
    axes = plot.draw([table], "transfer").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "shared"]
    assert {t.get_text() for t in axes.texts} == {"0.550\n±0.071"}
    assert len(plot.draw([table], "transfer", "a").axes[0].get_xticklabels()) == 1
    table.write_text("".join(json.dumps(row | {"split": row["seed"]}) + "\n" for row in rows))
    with pytest.raises(InputError, match="metric and split for each task, but a has 2"):
        plot.draw([table], "transfer")


def test_a_spec_on_a_shelf_is_drawn_by_its_name(tmp_path: Path) -> None:
    figure = plot.draw(["searchpet:minilm-agreement-0.01"])
    assert "2,271" in figure.get_suptitle() or any(
        "2,271" in axes.get_title() + axes.get_title("left") for axes in figure.axes)


def test_coordinates_of_two_architectures_are_not_compared() -> None:
    specs = [families.spec_of(model, space := families.space(
        model, families.rule("bias", "channel")), families.some(len(space), 0))
        for model in map(families.model, ("bert", "roberta"))]
    for draw in (lambda: plot.changes(*specs), lambda: plot.frequency(specs)):
        with pytest.raises(InputError, match="must be on one architecture for their coordinates"):
            draw()


def test_the_front_is_apart_from_the_other_trials() -> None:
    trials = [{"score": 0.1 * i, "flops": float(i % 4)} for i in range(8)]
    figure = plot.front(trials, [i > 5 for i in range(8)], {"score": "score", "flops": "FLOPs"})
    rest, best = figure.axes[0].collections
    assert (len(rest.get_offsets()), len(best.get_offsets())) == (6, 2)


# --- the record of a search ---------------------------------------------------------------------


def searched(folder: Path | None, steps: int) -> tuple[Any, Record | None]:
    """A bilevel search on a tiny model, with a record where there is a folder."""
    model = families.model("bert")
    space = families.space(model, families.rule("bias", "channel"), families.rule("lora", "atom"))
    made_up = problem(model, space, 60, steps=steps)
    if folder is not None:
        made_up.watch = Trace(RunFolder(folder), space, 60, steps)
    found = bilevel.search(made_up)
    made_up.net.remove()
    return found, read(RunFolder(folder)) if folder else None


def test_a_search_finds_the_same_with_and_without_a_record(tmp_path: Path) -> None:
    (plain, _), (watched, record) = searched(None, 6), searched(tmp_path, 6)
    assert torch.equal(plain.score, watched.score)
    assert torch.equal(plain.keep, watched.keep)
    assert record is not None
    assert [point.step for point in record.points] == [1, 2, 3, 4, 5, 6]
    for point in record.points:
        assert point.expected == pytest.approx(60, rel=1e-3)
        assert sum(group[0] for group in point.groups) == pytest.approx(60, rel=1e-2)
        assert all(low <= middle <= high <= most for _, low, middle, high, most in point.groups)


def test_a_record_stays_small_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = families.model("bert")
    space = families.space(model, families.rule("bias", "channel"))
    p, price = torch.full((len(space),), 0.25, dtype=torch.float64), space.cost.double()
    figures = {"expected": p.sum(), "hard": p.sum(), "entropy": p.mean()}

    def run(first: int, last: int) -> None:
        trace = Trace(RunFolder(tmp_path), space, 60, 1234)
        for step in range(first, last):
            trace(step, p, price, figures)

    run(0, 700)
    run(650, 1234)  # a killed search repeats what was not saved
    record = read(RunFolder(tmp_path))
    assert record is not None
    steps = [point.step for point in record.points]
    assert steps == sorted(set(steps))
    assert len(steps) <= POINTS
    assert steps[-1] == 1234
    assert (tmp_path / FILE).stat().st_size < 200_000


@pytest.mark.parametrize("text", ["[]", "{}", '{"steps": 1, "limit": 1, "groups": [], "points": '
                                  '[{"step": 1, "expected": 1, "hard": 1, "entropy": 0, '
                                  '"groups": [[1, 1, 1, 1, 1]]}]}'])
def test_a_damaged_record_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match="edited or damaged"):
        read(RunFolder(tmp_path))


def record(groups: int, points: int) -> Record:
    return Record.model_validate({
        "steps": points, "limit": 100,
        "groups": [{"name": f"decoder some_role.number_{i}", "masks": i % 5 == 4, "units": 3,
                    "parameters": 9} for i in range(groups)],
        "points": [{"step": s + 1, "expected": 100, "hard": s, "entropy": 0.5,
                    "groups": [[1 + i, 0.001, 0.01, 0.1, 0.5] for i in range(groups)]}
                   for s in range(points)]})


@pytest.mark.parametrize(("groups", "points"), [(1, 1), (12, 100), (25, 30)])
def test_curves_of_a_search_hold_every_point_and_role(groups: int, points: int) -> None:
    made_up = record(groups, points)
    figure = plot.search(made_up)
    expected, hard = figure.axes[0].lines[:2]
    assert list(expected.get_xdata()) == list(range(1, points + 1))
    assert list(hard.get_ydata()) == list(range(points))
    panels = plot.probabilities(made_up)
    assert len(panels.axes) == groups
    assert not overlaps(panels)
    shares = plot.shares(made_up)
    roles = sum(not group.masks for group in made_up.groups)
    assert len(shares.axes[0].lines) == roles
    shares.draw_without_rendering()
    labels = sorted(t.get_window_extent().y0 for t in shares.axes[0].texts)
    assert all(b - a > 5 for a, b in pairwise(labels))


# --- from files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Any:
    """A folder with two searches, one of which prunes."""
    folder = tmp_path_factory.mktemp("plots")
    write_task(folder / "films")
    (folder / "tiny").symlink_to(tiny_folder)
    job = ["search", "--model", "tiny", "--task", "films", "--steps", "8", "--batch-size", "8",
           "--max-length", "16", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("SEARCHPET_DATA", raising=False)
        assert cli.main([*job, "--budget", "1%", "--out", "one"]) == 0
        assert cli.main([*job, "--budget", "5%", "--space", "wide", "--keep-flops", "60%",
                         "--controls", "0", "--out", "two"]) == 0
        yield folder


def test_an_outline_counts_what_the_model_has(place: Path) -> None:
    for name in ("one", "two"):
        spec = Spec.load(name)
        one = outline(spec)
        assert one.exact
        assert (one.total, one.layers) == (spec.budget.used, 2)
        from searchpet.backbone import load_backbone

        model = load_backbone("tiny", outputs=2, regression=False, seed=0).model
        plan = structure(spec, discover(model))
        counted = Counter[tuple[str, int]]()
        for entry, graft in zip(plan.pet, pet_grafts(plan, 0), strict=True):
            counted[entry.role, entry.layer] += graft.parameters
        mine = {(row[1], layer): sum(held.values()) for (row, layer), held in one.cells().items()}
        assert mine == dict(counted)


def test_a_bare_spec_is_counted_by_its_tensors_or_says_coordinates(
        place: Path, tmp_path: Path) -> None:
    spec = Spec.load("two")
    away = spec.model_copy(update={"backbone": spec.backbone.model_copy(
        update={"name": "nowhere/none"})})
    away.save(tmp_path / "spec.json")
    bare = outline(Spec.load(tmp_path / "spec.json"))
    assert not bare.exact
    assert bare.total == sum(len(place.kept) for place in bare.places)
    (tmp_path / "delta.safetensors").write_bytes(Path("two/delta.safetensors").read_bytes())
    counted = outline(Spec.load(tmp_path / "spec.json"))
    assert (counted.exact, counted.total) == (True, spec.budget.used)


def test_what_pruning_took_is_in_the_picture(place: Path) -> None:
    one = outline(Spec.load("two"))
    plan = {(r.role, r.kind): 0.0 for r in Spec.load("two").plan}
    assert {(s.row[1], s.kind) for s in one.shares} == set(plan)
    figure = plot.structure(one)
    assert artist(figure, "removed").get_paths()


@pytest.mark.parametrize("name", [name for name in plot.FIGURES if name not in
                                  ("transfer", "front", "budget")])
@pytest.mark.parametrize("form", ["svg"])
def test_every_figure_of_a_run_is_text_in_a_file(place: Path, name: str, form: str) -> None:
    inputs = ["one", "two/spec.json"] if name in ("changes", "frequency") else ["one"]
    out = Path(f"figures/{name}.{form}")
    assert cli.main(["plot", *inputs, "--figure", name, "--out", str(out)]) == 0
    words = [e.text or "" for e in ET.parse(out).iter() if e.tag.endswith("text")]
    assert any(word.strip() for word in words)  # fonts as text, not as paths
    assert not list(out.parent.glob("*.partial"))


@pytest.mark.parametrize(("form", "magic"), [("pdf", b"%PDF"), ("png", b"\x89PNG"),
                                             ("svg", b"<?xml")])
def test_the_ending_says_the_format(tmp_path: Path, form: str, magic: bytes) -> None:
    figure = plot.parameters(made(2))
    assert plot.save(figure, tmp_path / f"x.{form}").read_bytes().startswith(magic)


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    files = [plot.save(plot.structure(made(2)), tmp_path / f"{i}.svg") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_inputs_choose_the_figure(place: Path) -> None:
    assert artist(plot.draw(["one"]), "cells")
    assert plot.draw(["one", "two"]).axes[2].get_title(loc="left").startswith("kept by both")
    assert "3 structures" in plot.draw(["one", "two", "one"])._suptitle.get_text()
    rows = [{"task": "a", "metric": "f1", "split": "test", "method": m, "trainable": n,
             "score": 0.5, "keep": k} for m, n, k in (("x", 10, 1), ("x", 99, 1), ("x", 10, 0.6))]
    Path("results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"torn')
    texts = [t.get_text() for t in plot.draw(["results.jsonl"]).legends[0].get_texts()]
    assert texts == ["x", "x, keep 60%"]
    Path("matrix.csv").write_text("source,target,score\na,b,0.5\n")
    assert plot.draw(["matrix.csv"]).axes[0].get_xlabel() == "trained on"


def test_panels_stand_in_the_order_of_the_map(place: Path) -> None:
    record = record_of(RunFolder("one"))
    names = [record.groups[i].name for i in curves._as_read(record)]
    rows = [role for _, role in ordered({("encoder", name) for name in names})]
    assert names == rows and len(names) > 3
    titles = [axes.get_title() for axes in curves.probabilities(record).axes]
    assert titles == [canvas.short(name) for name in names]
    other = record.model_copy(update={"groups": record.groups[::-1]})
    assert [other.groups[i].name for i in curves._as_read(other)] == rows


def test_learning_reads_every_evaluation_and_each_step_once(place: Path) -> None:
    found = trainings_of(RunFolder("one"))
    assert [one.name for one in found] == ["found", "random", "random:unit"]
    assert [curves._named(f) for f in ("random-unit-2", "mine-x")] == ["random:unit 3", "mine-x"]
    history = json.loads(Path("one/training.json").read_text())["history"]
    assert found[0].scores == tuple(map(tuple, history))
    log = Path("one/log.jsonl")
    before = log.read_text()
    log.write_text(before + before + '{"torn')
    try:
        assert logged(RunFolder("one"), "search").keys() == {8}
    finally:
        log.write_text(before)


def test_a_training_that_logged_no_loss_has_no_empty_panel() -> None:
    logged, short = (plot.Learning("found", loss, ((0, 0.5), (8, 0.7)), 8)
                     for loss in (((8, 0.6),), ()))
    assert [len(plot.learning([one]).axes) for one in (logged, short)] == [2, 1]
    assert plot.learning([short]).axes[-1].get_xlabel() == "step of the training"


def test_an_older_run_is_drawn_from_its_log(place: Path, tmp_path: Path) -> None:
    for name in ("log.jsonl", "spec.json"):
        (tmp_path / name).write_text(Path("one", name).read_text())
    old = record_of(RunFolder(tmp_path))
    assert [point.step for point in old.points] == [8]
    assert old.limit == Spec.load("one").budget.limit
    with pytest.raises(InputError, match="search again"):
        plot.shares(old)


@pytest.mark.parametrize(("words", "line"), [
    (["nowhere", "--out", "x.svg"], "nowhere is not there"),
    (["one", "--out", "x.gif"], "format must be one of pdf, png, svg, but got 'gif'"),
    (["one", "--out", "x"], "format must be one of pdf, png, svg, but got 'none'"),
    (["one", "--figure", "structur", "--out", "x.svg"], "did you mean 'structure'"),
    (["one", "--figure", "changes", "--out", "x.svg"], "takes 2 specs or runs, but got 1"),
    (["one", "--figure", "frequency", "--out", "x.svg"], "takes 2 or more specs or runs"),
    (["one/controls/random-0", "--figure", "search", "--out", "x.svg"], "learns no gates"),
    (["one", "--figure", "budget", "--out", "x.svg"], "two budgets or more"),
    (["one", "--figure", "front", "--out", "x.svg"], "holds no study.db"),
    (["films", "--figure", "cost", "--out", "x.svg"], "must hold result.json"),
    (["one", "--task", "other", "--figure", "cost", "--out", "x.svg"], "none is of 'other'"),
])
def test_what_cannot_be_drawn_is_said_in_a_line(
        place: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert cli.main(["plot", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert line in said
    assert not Path("x.svg").exists()
