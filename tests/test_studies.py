"""Studies without trainings: which trials are compared, repeated, kept; whose a folder is."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console

from searchpet import views
from searchpet.ask import Ask
from searchpet.collect import fitting, keep, open_store, own, winner
from searchpet.errors import InputError
from searchpet.question import Question, knobs_for
from searchpet.roster import again, me, root, standing, trials_of
from searchpet.run import RunFolder
from searchpet.settings import Settings
from searchpet.study import create, pruner, sampler
from searchpet.trials import figures, summary, write
from searchpet.tunefile import TuneFile, read_tune
from searchpet.worker import Worker
from searchpet.workers import Crew, _Watch

RUNGS = (25, 100)


def asked(**given: Any) -> Question:
    return Question(Settings(steps=100), Ask(), read_tune("default"), 8, RUNGS, **given)


def study_in(folder: Path, **given: Any) -> optuna.Study:
    return create(f"sqlite:///{folder}/study.db", "one", ["maximize"], {"what": "test"},
                  resume=False)


def reported(study: optuna.Study, value: float) -> Trial:
    trial = study.ask()
    trial.report(value, RUNGS[0])
    return trial


# --- pruning ---


def test_what_was_cut_off_is_compared_once(tmp_path: Path) -> None:
    """The same decisions whether or not a trial died after its first rung."""
    decisions = []
    for cut in (False, True):
        (folder := tmp_path / str(cut)).mkdir()
        study = study_in(folder)
        study.pruner = pruner("halving", RUNGS)
        first = reported(study, 0.9)
        assert not first.should_prune()
        if cut:
            study.tell(first.number, state=TrialState.FAIL)
            again(study, trials_of(study)[0])
            first = reported(study, 0.9)
            assert root(trials_of(study)[first.number]) == 0
            assert not first.should_prune()
        found = []
        for value in (0.5, 0.95, 0.6, 0.91, 0.92, 0.93, 0.94):
            trial = reported(study, value)
            found.append(trial.should_prune())
        decisions.append(found)
    assert decisions[0] == decisions[1]
    # a quarter goes on, one at least: the best so far, and of eight the two best
    assert decisions[0] == [True, False, True, True, True, True, False]


def test_what_may_be_chance_decides_nothing(tmp_path: Path) -> None:
    """At chance all scores are noise; pruning by it would keep whoever was lucky."""
    study = study_in(tmp_path)
    study.pruner = pruner("halving", RUNGS, noise=0.03)
    assert not any(reported(study, value).should_prune()
                   for value in (0.5, 0.51, 0.49, 0.52, 0.495, 0.5, 0.505, 0.49))
    assert not reported(study, 0.7).should_prune()
    assert reported(study, 0.48).should_prune()  # of nine, two go on: 0.7 and 0.52


def test_hyperband_has_brackets_that_begin_later(tmp_path: Path) -> None:
    study, rungs = study_in(tmp_path), (20, 80, 320)
    study.pruner = pruner("hyperband", rungs)
    ended: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for number in range(40):
        trial = study.ask()
        trial.report(1.0 - number / 100, rungs[0])  # each is worse than those before
        bracket = study.pruner.bracket(trials_of(study)[number])  # type: ignore[attr-defined]
        ended[bracket].append(trial.should_prune())
    assert len(ended[0]) > len(ended[2]) > 0
    assert not any(ended[1] + ended[2])  # they are not compared yet
    assert not ended[0][0] and all(ended[0][1:])


def test_nsga2_has_generations_within_the_trials_asked_for() -> None:
    assert sampler("nsga2", 0, 50)._population_size == 10  # type: ignore[attr-defined]
    assert sampler("nsga2", 0, 5)._population_size == 4  # type: ignore[attr-defined]


# --- trials that end otherwise ---


class Scripted(Worker):
    """Runs what it is given instead of a trial."""

    script: Any = None

    def _run(self, trial: Trial) -> Any:
        self.begin(trial)
        return self.script(self, trial)


def scripted(study: optuna.Study, script: Any, said: list[str], **given: Any) -> Scripted:
    session: Any = SimpleNamespace(splits={"validation": range(100)})
    worker = Scripted(asked(**given), study, session, Path(), said.append)
    worker.script = script
    return worker


@pytest.mark.parametrize("last_word", [False, True])
def test_a_trial_that_was_taken_away_does_not_stop_its_worker(
    tmp_path: Path, last_word: bool
) -> None:
    """As where a computer slept for a minute: another worker has given the trial to others."""
    study, said = study_in(tmp_path), list[str]()

    def run(worker: Worker, trial: Trial) -> float:
        if trial.number == 0:
            study.tell(trial.number, state=TrialState.FAIL)
            again(study, trials_of(study)[0])
            if not last_word:
                trial.set_user_attr("seconds", 1.0)
        return 0.5

    scripted(study, run, said).work()
    now = standing(study)
    assert (now.complete, now.failed, now.waiting, now.fresh) == (8, 0, 0, 8)
    assert len(study.trials) == 9  # one repetition, not two
    assert said == ["trial 0 was taken for dead, and is repeated"]


def test_a_trial_without_memory_fails_alone(tmp_path: Path) -> None:
    study, said = study_in(tmp_path), list[str]()

    class Hungry(Worker):
        def _tried(self, trial: Trial, frozen: FrozenTrial, values: Any) -> dict[str, float]:
            if trial.number == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return {"score": 0.5}

    session: Any = SimpleNamespace(splits={"validation": range(100)})
    Hungry(asked(sampler="random"), study, session, tmp_path, said.append).work()
    now = standing(study)
    assert (now.complete, now.failed) == (7, 1)
    assert "memory must hold a trial" in study.trials[1].user_attrs["failure"]
    assert "Tried to allocate" in said[1]


def test_two_containers_of_one_host_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    where = me().split("/")[0]
    assert len(where.split(".")) >= 3  # the host, its boot, the room for processes


# --- limits ---


def ended(study: optuna.Study, score: float, flops: float, most: float = 100) -> Trial:
    trial = study.ask()
    trial.set_user_attr("score", score)
    trial.set_user_attr("trainable", 10.0)
    trial.set_user_attr("flops", flops)
    trial.set_constraint("flops", flops - most)
    return trial


def test_what_breaks_a_limit_does_not_keep_others_from_being_stored(tmp_path: Path) -> None:
    study, question = study_in(tmp_path), asked(limits={"flops": 100.0})
    (run := tmp_path / "run").mkdir()
    (run / "spec.json").write_text("{}")
    store = tmp_path / "store"
    open_store(str(store), make=True)
    stored = []
    for score, flops in ((0.95, 200), (0.6, 50), (0.5, 50), (0.7, 50)):
        trial = ended(study, score, flops)
        keep(study, question, str(store), trial, run)
        stored.append(len(list(store.iterdir())))
        study.tell(trial, score)
    assert stored == [0, 1, 1, 2]
    assert winner(study, question).number == 3
    assert [t.number for t in fitting(study)] == [1, 2, 3]


def test_a_study_in_which_nothing_fits_yet_can_be_looked_at(tmp_path: Path) -> None:
    study, question = study_in(tmp_path), asked(limits={"flops": 100.0})
    study.tell(ended(study, 0.9, 200), 0.9)
    found = summary(study, question)
    assert found["front"] == [] and found["complete"] == 1


def test_a_table_shows_what_is_limited(tmp_path: Path) -> None:
    """Else nobody sees why a better score is not the best."""
    study, question = study_in(tmp_path), asked(limits={"flops": 100.0})
    for score, flops in ((0.9, 200), (0.6, 50)):
        study.tell(ended(study, score, flops), score)
    console = Console(file=io.StringIO(), width=80)
    for part in views.study(summary(study, question)):
        console.print(part, markup=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "* best of those with flops <= 100" in text
    rows = [line.split() for line in text.splitlines() if "complete  0." in line]
    assert rows == [["0", "complete", "0.9000", "200"], ["1", "*", "complete", "0.6000", "50"]]
    write(study, question, tmp_path / "drawn")
    page = (tmp_path / "drawn" / "study.html").read_text()
    assert "judged by score,\nflops at most 100." in page and "<th>flops</th>" in page


def test_of_equal_scores_the_cheapest_wins() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for score, size in ((0.6, 500), (0.6, 100), (0.5, 1), (0.6, 100)):
        study.tell(study.ask(), (score, size))
    best = winner(study, asked(metrics=("score", "trainable")))
    assert best.number == 1 and best.number in {t.number for t in study.best_trials}


def test_a_limit_on_flops_takes_knobs_that_can_lower_them() -> None:
    assert knobs_for(("score", "flops"), None, "bilevel") == "inference"
    assert knobs_for(("score",), None, "bilevel") == "default"


# --- importance ---


def test_a_knob_that_was_never_turned_has_no_importance(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {
        "strategy": optuna.distributions.CategoricalDistribution(("bilevel", "random:unit")),
        "tau": optuna.distributions.FloatDistribution(0.01, 1.0, log=True)}
    study, question = study_in(tmp_path), asked()
    for score in (0.5, 0.6, 0.7):  # the defaults, and they alone
        study.enqueue_trial({"strategy": "bilevel", "tau": 0.1})
        study.tell(study.ask(knobs), score)
    assert summary(study, question)["importances"] == {}
    assert "importance" not in figures(study, question)
    study.enqueue_trial({"strategy": "random:unit", "tau": 0.1})
    study.tell(study.ask(knobs), 0.9)
    assert list(summary(study, question)["importances"]) == ["strategy"]
    assert "importance" in figures(study, question)


def test_many_trials_do_not_stretch_a_figure(tmp_path: Path) -> None:
    study, question = study_in(tmp_path), asked()
    heights = []
    for _ in range(2):
        for _ in range(15):
            trial = reported(study, 0.5)
            study.tell(trial, 0.5)
        png = figures(study, question)["rungs"]
        heights.append(int.from_bytes(png[20:24], "big"))  # pixels, of the header
    assert heights[1] <= heights[0]


# --- what is said meanwhile ---


def test_several_workers_say_how_large_the_front_is(tmp_path: Path) -> None:
    study, said = optuna.create_study(directions=["maximize", "minimize"]), list[str]()
    study.set_user_attr("trials", 4)
    for values in ((0.6, 500), (0.5, 100), (0.4, 200)):
        study.tell(study.ask(), values)
    watch = _Watch(Crew("", "one", tmp_path, 2, ""), study, said.append)
    watch.tell(standing(study))
    assert said[-1].endswith("0 running; 2 on the front")


def test_the_time_left_counts_the_trials_of_this_time_alone(tmp_path: Path) -> None:
    study, said = study_in(tmp_path), list[str]()
    study.set_user_attr("trials", 12)
    for _ in range(9):
        study.tell(study.ask(), 0.5)
    watch = _Watch(Crew("", "one", tmp_path, 2, ""), study, said.append)
    watch.tell(standing(study))
    assert said[-1].startswith("[9/12] ")  # nothing has ended yet by which to judge
    study.tell(study.ask(), 0.5)
    watch.began -= 600
    watch.tell(standing(study))
    assert said[-1].startswith("[10/12, about 20 min left] ")


# --- whose a folder is ---


def test_a_folder_belongs_to_one_study(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = study_in(tmp_path / "a"), study_in(tmp_path / "b")
    folder = RunFolder(tmp_path / "out")
    own(one, folder)
    own(one, folder)
    with pytest.raises(InputError, match="must be a folder of study one alone, but .*out has"):
        own(other, folder)
    run = RunFolder(tmp_path / "run")
    run.sub("trials")
    with pytest.raises(InputError, match="has files of another run; name another"):
        own(one, run)
    own(one, run, begun=True)
    assert [p.name for p in folder.path.iterdir()] == ["study.json"]


def test_a_store_out_of_reach_is_said_before_a_trial(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a folder that can be written here, but"):
        open_store(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


# --- tuning spaces ---


def test_nothing_is_tried_first_where_the_file_says_so() -> None:
    knob = {"name": "tau", "low": 0.1, "high": 1.0}
    space = {"description": "-", "knob": [knob], "first": [{"tau": 0.5}]}
    assert TuneFile.model_validate(space).starts() == [{"tau": 0.1}, {"tau": 0.5}]
    assert TuneFile.model_validate(space | {"known_good": False}).starts() == []


@pytest.mark.parametrize(("name", "choice", "message"), [
    ("layers", "lst 50%", 'layers must read "3"'),
    ("kinds", "lora+bais", "kinds must be some of the base space's, bias, lora, scale, joined by "
                           r"\+, but got 'bais'")])
def test_a_misspelt_choice_is_refused(name: str, choice: str, message: str) -> None:
    good = {"layers": "all", "kinds": "lora"}[name]
    with pytest.raises(ValueError, match=message):
        TuneFile.model_validate(
            {"description": "-", "knob": [{"name": name, "choices": [good, choice]}]})
