import csv
from itertools import chain

import pytest
from optuna.trial import TrialState, create_trial
from PIL import Image

from ssl_distill.sweeps.boss import choose_elders
from ssl_distill.sweeps.file import Parameter, Sweep
from ssl_distill.sweeps.search import draw_again, finished, grid_of, open_study, suggest
from ssl_distill.sweeps.table import draw_parallel, write_table

PARAMETERS = {
    "rate": Parameter("log_uniform_values", (), 1e-4, 1e-2),
    "depth": Parameter("int_uniform", (), 1, 4),
    "coarse": Parameter("q_uniform", (), 0.0, 1.0, 0.25),
    "log_coarse": Parameter("q_log_uniform_values", (), 1.0, 100.0, 2.0),
    "kind": Parameter("categorical", ([1, 2], "x", None)),
    "fixed": Parameter("constant", (7,)),
}


def search(method="random", parameters=PARAMETERS, **kwargs):
    options = {
        "min_iter": None,
        "eta": 2,
        "run_cap": None,
        "maximize": True,
        "command": ("ssl-distill", "fit"),
        **kwargs,
    }
    return Sweep(method, "val/score", parameters=parameters, **options)


@pytest.mark.parametrize("method", ["bayes", "random"])
def test_values_lie_where_the_file_says(method, tmp_path):
    study = open_study(search(method), tmp_path, seed=0)
    seen = []
    for _ in range(40):
        trial = study.ask()
        values = suggest(trial, PARAMETERS)
        seen.append(values)
        study.tell(trial, values["depth"])
    assert all(1e-4 <= values["rate"] <= 1e-2 for values in seen)
    assert {values["depth"] for values in seen} == {1, 2, 3, 4}
    assert {values["coarse"] for values in seen} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert all(values["log_coarse"] % 2 == 0 or values["log_coarse"] == 1.0 for values in seen)
    assert [any(values["kind"] == kind for values in seen) for kind in ([1, 2], "x", None)] == [True] * 3
    assert {values["fixed"] for values in seen} == {7}
    again = open_study(search(method), tmp_path, seed=0)  # goes on with what is there
    assert len(again.trials) == 40
    assert finished(again)[0].value == 4


def test_grid_is_everything_once(tmp_path):
    parameters = {"depth": PARAMETERS["depth"], "kind": PARAMETERS["kind"]}
    study = open_study(search("grid", parameters), tmp_path, seed=0)
    study.optimize(lambda trial: float(suggest(trial, parameters)["depth"]), 12)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 12
    with pytest.raises(ValueError, match=r"`parameters\.rate` must have `values` for `method: grid`"):
        grid_of(search("grid"))


def test_the_worse_half_is_ended(tmp_path):
    study = open_study(search(min_iter=2, eta=2, maximize=False), tmp_path, seed=0)
    ended = []
    for losses in ([1.0, 1.0, 1.0, 1.0], [2.0, 2.0], [0.5, 0.5]):
        trial = study.ask()
        for step, loss in enumerate(losses):
            trial.report(loss, step + 1)
        ended.append(trial.should_prune())
        study.tell(trial, losses[-1])
    assert ended == [False, True, False]


def drawn(study, num):
    values = []
    for _ in range(num):
        trial = study.ask()
        values.append(suggest(trial, PARAMETERS))
        study.tell(trial, values[-1]["depth"])
    return values


@pytest.mark.parametrize("method", ["bayes", "random"])
def test_a_search_that_is_gone_on_with_draws_what_an_undisturbed_one_does(method, tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = drawn(open_study(search(method), tmp_path / "whole", seed=0), 14)  # 10 of them before there is a model
    parts = [drawn(open_study(search(method), tmp_path / "parts", seed=0), num) for num in (2, 3, 9)]
    assert [*chain(*parts)] == whole
    assert len({values["rate"] for values in whole}) == 14
    other = open_study(search(method), tmp_path, seed=1)
    assert not {values["rate"] for values in drawn(other, 14)} & {values["rate"] for values in whole}


@pytest.mark.parametrize("method", ["bayes", "random", "grid"])
def test_processes_that_share_a_search_draw_differently(method, tmp_path):
    parameters = {"depth": PARAMETERS["depth"], "kind": PARAMETERS["kind"]} if method == "grid" else PARAMETERS
    studies = [open_study(search(method, parameters), tmp_path, seed=0) for _ in range(2)]
    trials = [study.ask() for study in studies for _ in range(3)]
    assert len({str(suggest(trial, parameters)) for trial in trials}) == 6


@pytest.mark.parametrize("method", ["random", "grid"])
def test_a_trial_that_was_cut_short_is_made_again(method, tmp_path):
    parameters = {"depth": PARAMETERS["depth"], "kind": PARAMETERS["kind"]}
    study = open_study(search(method, parameters), tmp_path, seed=0)
    drawn_first = suggest(cut := study.ask(), parameters)
    draw_again(study, cut.number)
    assert study.trials[0].state == TrialState.FAIL
    again = open_study(search(method, parameters), tmp_path, seed=0)
    trial = again.ask()
    assert suggest(trial, parameters) == drawn_first
    again.tell(trial, 1.0)
    if method == "grid":
        again.optimize(lambda trial: float(suggest(trial, parameters)["depth"]), 11)
        assert len({tuple(trial.params.values()) for trial in finished(again)}) == 12


def test_another_metric_is_refused(tmp_path):
    open_study(search(), tmp_path, seed=0)
    other = Sweep(**{**vars(search()), "metric": "train/loss"})
    with pytest.raises(ValueError, match="holds a search by val/score, not train/loss; give another folder"):
        open_study(other, tmp_path, seed=0)


def test_elders_are_two_of_the_three_best():
    assert choose_elders([], 0) is None
    assert choose_elders([4], 0) is None
    drawn = {choose_elders([4, 1, 7, 2, 0], seed) for seed in range(60)}
    assert {elder for pair in drawn for elder in pair} == {4, 1, 7}
    assert len(drawn) == 6  # each pair in both orders, none of them twice the same
    assert choose_elders([4, 1, 7], 3) == choose_elders([4, 1, 7], 3)


def rows():
    yield {"trial": 0, "state": "complete", "value": 0.2, "rate": 1e-3, "kind": "x", "student_of": ""}
    yield {"trial": 1, "state": "pruned", "value": 0.1, "rate": 1e-2, "kind": [1, 2], "student_of": ""}
    yield {"trial": 2, "state": "complete", "value": 0.4, "rate": 1e-4, "kind": "x", "student_of": 0}
    yield {"trial": 3, "state": "fail", "value": "", "rate": 1e-4, "kind": "x"}


def test_table_and_picture(tmp_path):
    write_table(list(rows()), tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["value"] for row in table] == ["0.2", "0.1", "0.4", ""]
    assert table[1]["kind"] == "[1, 2]"
    draw_parallel(list(rows()), {"rate": True, "kind": False}, "val/score", tmp_path / "parallel.png")
    with Image.open(tmp_path / "parallel.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
    draw_parallel([], {"rate": True}, "val/score", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_unfinished_trials_have_no_place_among_the_best(tmp_path):
    study = open_study(search(), tmp_path, seed=0)
    study.add_trial(create_trial(value=1.0))
    study.ask()
    study.add_trial(create_trial(value=3.0))
    assert [trial.value for trial in finished(study)] == [3.0, 1.0]
