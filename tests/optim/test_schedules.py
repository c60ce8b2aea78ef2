import math

import numpy as np
import pytest
import torch

from ssl_distill.optim.schedules import (
    Cosine,
    EpochCosine,
    EpochRamp,
    Position,
    check_values,
    warn_if_warmup_exceeds_run,
)


def test_golden(golden):
    case = golden("dino/schedules")
    params = case.params
    steps_per_epoch = params["niter_per_ep"]
    total = params["epochs"] * steps_per_epoch
    positions = [Position(step, total, steps_per_epoch) for step in range(total)]
    rate = Cosine(params["lr_base"], params["lr_final"], params["warmup_epochs"], params["start_warmup_value"])
    expect = {
        "lr": rate,
        "weight_decay": Cosine(*params["wd"]),
        "momentum": Cosine(*params["momentum"]),
    }
    for name, schedule in expect.items():
        ours = [schedule.at(position) for position in positions]
        np.testing.assert_allclose(ours, case.tensors[name].numpy(), rtol=1e-6, atol=1e-12)
    ramp = EpochRamp(params["warmup_teacher_temp"], params["teacher_temp"], params["warmup_teacher_temp_epochs"])
    ours = [ramp.at(position) for position in positions[::steps_per_epoch]]
    np.testing.assert_allclose(ours, case.tensors["teacher_temp_per_epoch"].numpy(), rtol=1e-6)
    assert ramp.at(positions[-1]) == ours[-1]


def test_golden_ibot(golden):
    """All of iBOT's schedules."""
    case = golden("ibot/schedules")
    params = case.params
    epochs, steps = params["epochs"], params["steps_per_epoch"]
    positions = [Position(step, epochs * steps, steps) for step in range(epochs * steps)]
    batch = params["batch_size_per_gpu"] * params["world_size"]
    patch = (params["warmup_teacher_patch_temp"], params["teacher_patch_temp"], params["warmup_teacher_temp_epochs"])
    schedules = {
        "lr": Cosine(params["base_lr"], params["min_lr"], params["warmup_epochs"]).scaled(batch / 256),
        "weight_decay": Cosine(params["weight_decay"], params["weight_decay_end"]),
        "momentum": Cosine(params["momentum_teacher"], 1.0),
        "teacher_temp_cls": EpochRamp(
            params["warmup_teacher_temp"], params["teacher_temp"], params["warmup_teacher_temp_epochs"]
        ),
        "teacher_temp_patch": EpochRamp(*patch),
        "teacher_temp_patch_late_mim": EpochRamp(*patch, wait=params["mim_start_epoch_late"]),
    }
    for name, schedule in schedules.items():
        expected = case.tensors[name]
        at = positions if len(expected) == len(positions) else positions[::steps]
        values = torch.tensor([schedule.at(position) for position in at], dtype=torch.float64)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", ["ibot/loss_multicrop", "ibot/loss_nolocal_weighted"])
def test_golden_ibot_at_epoch(golden, name):
    params = golden(name).params
    ramp = EpochRamp(
        params["warmup_teacher_temp2"],
        params["teacher_temp2"],
        params["warmup_teacher_temp_epochs"],
        params["mim_start_epoch"],
    )
    position = Position(params["epoch"], params["nepochs"], 1)
    assert ramp.at(position) == pytest.approx(params["teacher_patch_temp_at_epoch"])


def test_short_runs_squeeze_the_wait_then_the_ramp():
    values = [EpochRamp(0.0, 1.0, epochs=3, wait=4).at(Position(step, 4, 1)) for step in range(4)]
    assert values == [0.0, 0.0, 0.5, 1.0]
    values = [EpochRamp(0.0, 1.0, epochs=3, wait=4).at(Position(step, 2, 1)) for step in range(2)]
    assert values == [0.0, 1.0]
    assert [EpochRamp(0.0, 1.0, wait=1).at(Position(step, 2, 1)) for step in range(2)] == [0.0, 1.0]


def test_warmup_longer_than_the_run_fills_it():
    schedule = Cosine(1.0, 0.0, warmup_epochs=10)
    values = [schedule.at(Position(step, 6, 3)) for step in range(6)]
    np.testing.assert_allclose(values, np.linspace(0, 1, 6))
    with pytest.warns(UserWarning, match=r"`learning_rate` warms up for 10 epochs but the run has 2"):
        warn_if_warmup_exceeds_run("learning_rate", 10, Position(0, 6, 3))
    rate = EpochCosine(1.0, 0.0, warmup_epochs=4)
    assert [rate.at(Position(step, 4, 2)) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert EpochRamp(0.0, 1.0, epochs=10).at(Position(3, 6, 3)) == 1.0


def test_warmup_starts_where_it_is_told_to():
    schedule = Cosine(1.0, 0.0, warmup_epochs=1, warmup_from=0.2)
    assert [schedule.at(Position(step, 10, 5)) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_after_its_end_a_curve_stays_there():
    assert EpochCosine(1.0, 0.1).value(12.0, 10.0) == pytest.approx(0.1)


def test_only_the_peak_is_scaled():
    assert Cosine(1.0, 0.1, 2, 0.01).scaled(4) == Cosine(4.0, 0.1, 2, 0.01)
    assert EpochCosine(1.0, 0.1, 2).scaled(4) == EpochCosine(4.0, 0.1, 2)


@pytest.mark.parametrize("curve", [Cosine, EpochCosine])
def test_errors(curve):
    with pytest.raises(ValueError, match="`warmup_epochs` must be at least 0, got -1"):
        curve(1.0, 0.0, warmup_epochs=-1)


@pytest.mark.parametrize(
    ("least", "most", "above", "knob", "message"),
    [
        (0, math.inf, False, Cosine(-1e-3, 0.0), "`knob` must be at least 0, got -0.001"),
        (0, 1, False, Cosine(0.996, 1.2), "`knob` must be from 0 to 1, got 1.2"),
        (0, math.inf, True, EpochRamp(0.0, 0.07, 30), "`knob` must be above 0, got 0.0"),
        (0, math.inf, True, 0, "`knob` must be above 0, got 0"),
    ],
)
def test_values_out_of_range(least, most, above, knob, message):
    with pytest.raises(ValueError, match=message):
        check_values(least, most, above, knob=knob)
    check_values(-2, 2, above, knob=knob)
