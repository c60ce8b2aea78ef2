import math

import pytest
import torch

from ssl_distill.losses.koleo import KoLeo, koleo


def test_golden(golden):
    case = golden("dino/v2_koleo")
    x = case.tensors["x"].requires_grad_()
    loss = koleo(x)
    loss.backward()
    torch.testing.assert_close(loss, case.tensors["loss"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(x.grad, case.tensors["grad_x"], rtol=1e-6, atol=1e-9)


def test_each_view_is_spread_for_itself():
    views = torch.randn(2, 6, 5)
    torch.testing.assert_close(KoLeo(0.1)(views), 0.1 * (koleo(views[0]) + koleo(views[1])))


def test_length_does_not_matter():
    views = torch.randn(6, 5, dtype=torch.float64)
    unit = torch.nn.functional.normalize(views, dim=1)
    torch.testing.assert_close(koleo(1.1e-8 * unit), koleo(views))
    pair = torch.eye(2, 5)  # at a distance of the square root of 2
    torch.testing.assert_close(koleo(pair), torch.tensor(-0.5 * math.log(2)))


def test_the_defaults_are_dinov2s():
    views = torch.randn(2, 6, 5)
    torch.testing.assert_close(KoLeo()(views), KoLeo(0.1)(views))


def test_errors():
    with pytest.raises(ValueError, match=r"`features` .* got 1"):
        koleo(torch.ones(1, 4))
