import pytest
import torch
from torch.distributions import Normal, Uniform

from ssl_distill.augment.row_draws import DrawForBatch, RowDraws, image_keys


def test_rows_do_not_depend_on_company():
    key = torch.tensor([5, 9, 5, 7])
    state = torch.get_rng_state()

    def draw(key):
        with RowDraws(key):
            spread = Uniform(torch.tensor(2.0), torch.tensor(3.0)).rsample((len(key), 2))
            return torch.rand(len(key)), spread, torch.randn(len(key), 3, 4, dtype=torch.float64)

    together, alone = draw(key), draw(key[1:2])
    assert [part.dtype for part in together] == [torch.float32, torch.float32, torch.float64]
    for rows, row in zip(together, alone, strict=True):
        assert torch.equal(rows[1:2], row)
        assert torch.equal(rows[0], rows[2])
        assert (rows[0] != rows[1]).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_laws():
    """Every draw is of its own, uniform or normal, and independent of the one before."""
    with RowDraws(torch.arange(40_000)):
        uniform, again = torch.rand(40_000), torch.rand(40_000)
        normal = torch.randn(40_000, 2)
    assert (torch.histc(uniform, 10, 0, 1) / 40_000 - 0.1).abs().max() < 0.006
    assert normal.mean(0).abs().max() < 0.02
    assert (normal.std(0) - 1).abs().max() < 0.015
    pairs = torch.stack([uniform, again, *normal.T])
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(2),
        lambda: torch.rand(()),
        lambda: torch.randperm(3),
        lambda: torch.zeros(3).uniform_(),
        lambda: Normal(torch.zeros(3), torch.ones(3)).sample(),
        lambda: torch.nn.functional.dropout(torch.ones(3)),
    ],
)
def test_other_draws_are_refused(draw):
    state = torch.get_rng_state()
    with RowDraws(torch.arange(3)), pytest.raises(DrawForBatch):
        draw()
    assert torch.equal(torch.get_rng_state(), state)


def test_image_keys():
    uniform = torch.tensor([[0.0, 0.5, 0.1], [0.0, 0.5, 0.9], [0.5, 0.0, 0.1]])
    assert image_keys(uniform).tolist() == [2**23, 2**23, 2**47]
