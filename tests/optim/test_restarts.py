from itertools import pairwise

import pytest
import torch

from ssl_distill.optim.restarts import Restarts, stage_of
from ssl_distill.optim.schedules import EpochCosine, Position


def test_golden(golden):
    case = golden("dbot/lr_schedule")
    for name, params in case.params.items():
        starts = params.get("stage_epochs", [0, params.get("epochs")])
        rate = Restarts(EpochCosine(params["lr"], params["min_lr"], params["warmup_epochs"]), starts[:-1])
        epochs = case.tensors[f"{name}_epoch"].tolist()
        rates = torch.tensor([rate.value(epoch, starts[-1]) for epoch in epochs], dtype=torch.float64)
        torch.testing.assert_close(rates, case.tensors[f"{name}_lr"], rtol=0, atol=1e-12)
        scaled = rates * params["lr_scale_second_group"]  # what `Schedules` does with a group's `lr_scale`
        torch.testing.assert_close(scaled, case.tensors[f"{name}_lr_scaled_group"], rtol=0, atol=1e-12)


def test_golden_stages(golden):
    case = golden("dbot/stage_plan")
    for params in case.params["cases"]:
        *starts, end = params["stage_epochs"]
        tensors = case.under(f"{params['key']}_")
        stages = [stage_of(starts, epoch) for epoch in range(end)]
        assert stages == tensors["stage_index"].tolist()
        switches = [int(after > before) for before, after in pairwise(stages)]
        assert [*switches, 0] == tensors["swap_after_epoch"].tolist()


def test_at_a_position():
    rate = Restarts(EpochCosine(1.0, 0.0, warmup_epochs=1), (0, 2)).scaled(2.0)
    values = [rate.at(Position(step, 12, 3)) for step in range(12)]
    assert values[:4] == pytest.approx([0.0, 2 / 3, 4 / 3, 2.0])
    assert values[6:10] == pytest.approx([0.0, 2 / 3, 4 / 3, 2.0])
    assert values[11] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Restarts(EpochCosine(1.0), []), "`stage_starts` must be growing epochs from 0 on"),
        (lambda: Restarts(EpochCosine(1.0), [1, 2]), r"`stage_starts` must be growing .* got \[1, 2\]"),
        (lambda: Restarts(EpochCosine(1.0), [0, 2, 2]), "`stage_starts` must be growing"),
        (
            lambda: Restarts(EpochCosine(1.0, 0.0, 40), [0, 30]),
            "`warmup_epochs` must be below the length of every stage, the shortest has 30 epochs, got 40",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
