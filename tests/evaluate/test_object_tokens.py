import torch

from ssl_distill.backbones.create import create_backbone
from ssl_distill.evaluate.object_tokens import (
    attended_patches,
    object_features,
    pool_first,
    pool_max,
    pool_mean,
    pool_weighted,
)


def test_golden(golden):
    tensors = golden("odis/object_token_pool").tensors
    tokens, valid = tensors["tokens"], tensors["valid"]
    pooled = {
        "first": pool_first(tokens, valid),
        "avg": pool_mean(tokens, valid),
        "max": pool_max(tokens, valid),
        "weighted": pool_weighted(tokens, tensors["weights"]),
    }
    for name, value in pooled.items():
        torch.testing.assert_close(value, tensors[name], rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_no_valid_object_pools_to_zero():
    tokens, valid = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    for pool in (pool_first, pool_mean, pool_max):
        assert not pool(tokens, valid).any()


def test_attended_patches():
    masks = torch.zeros(2, 8, 12, dtype=torch.bool)
    masks[0, 5, 0] = True
    attend = attended_patches(masks, (2, 3))
    assert attend[0].tolist() == [False, False, False, True, False, False]
    assert attend[1].all()


def test_features_depend_on_the_object():
    backbone = create_backbone("vit_nano_patch8_32").train()
    images = torch.randn(2, 3, 32, 32)
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    whole = object_features(backbone, images, masks)  # nothing there: no mask
    with torch.no_grad():
        torch.testing.assert_close(whole, backbone.eval()(images))
    masks[0, :16, :16] = True
    some = object_features(backbone, images, masks)
    assert (some[0] - whole[0]).abs().max() > 1e-4
    torch.testing.assert_close(some[1], whole[1])
