import pytest
import torch
from harness import quiet_trainer
from small_methods import small_crops, small_ibot, small_odis

from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.data.shapes import ShapesData
from ssl_distill.losses.object_view import mean_over_images, mean_over_valid
from ssl_distill.optim.parameters import adamw
from ssl_distill.views import MaskedCrops, ObjectCrops


def random_views(attend=1.0, valid=1.0):
    """Views of 3 images with these shares of attended patches and valid views."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(2, 3, 16, generator=generator)
    return ObjectCrops(
        torch.randn(2, 3, 3, 32, 32, generator=generator),
        torch.randn(1, 3, 3, 16, 16, generator=generator),
        torch.rand(2, 3, 16, generator=generator) < 0.3,
        share < attend,
        torch.rand(3, 3, generator=generator) < valid,
        torch.zeros(2, 3, dtype=torch.long),
        torch.zeros(2, 3, dtype=torch.bool),
    )


class OneStep:
    """Stands for a trainer at its first step."""

    global_step, max_epochs, estimated_stepping_batches, num_training_batches = 0, 1, 10, 10
    accumulate_grad_batches, log_every_n_steps = 1, 1


def losses(method, views):
    method._trainer = OneStep()
    return method.losses(views)


def test_without_objects_it_is_ibot():
    views = random_views()
    torch.manual_seed(0)
    odis = losses(small_odis(drop_path_rate=0.0), views)
    torch.manual_seed(0)
    ibot = losses(small_ibot(drop_path_rate=0.0), MaskedCrops(*views[:3]))
    torch.testing.assert_close(odis["object"], ibot["class"])
    torch.testing.assert_close(odis["patch"], ibot["patch"])


def test_both_networks_attend_to_the_object():
    everything, some = random_views(), random_views(attend=0.3)
    method = small_odis(drop_path_rate=0.0)
    for network in (method.teacher, method.student):
        calls = [
            network.teach(views.global_crops, views.masked, views.attend)
            if network is method.teacher
            else network(views.global_crops, views.local_crops, views.masked, method.mask_token, views.attend)
            for views in (everything, some)
        ]
        first, second = (call.class_logits for call in calls)
        assert (first[:2] - second[:2]).abs().max() > 1e-4
        torch.testing.assert_close(first[2:], second[2:])  # local crops are never masked


@pytest.mark.parametrize("average", [mean_over_valid, mean_over_images])
def test_nothing_valid(average):
    """A rank without any valid view: finite, every parameter in the graph, the center stays."""
    method = small_odis(average=average)
    method.object_center.value.fill_(0.5)
    before = method.object_center.value.clone()
    terms = losses(method, random_views(attend=0.0, valid=0.0))
    assert terms["object"].item() == 0
    torch.stack(list(terms.values())).sum().backward()
    without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    method.on_before_optimizer_step(adamw(method.student.parameters()))
    assert torch.equal(method.object_center.value, before)
    assert method.patch_center.value.any()


def test_nothing_masked_leaves_the_mask_token_in_the_graph():
    views = random_views()._replace(masked=torch.zeros(2, 3, 16, dtype=torch.bool))
    method = small_odis()
    terms = losses(method, views)
    assert terms["patch"].item() == 0
    terms["patch"].backward()
    assert method.mask_token.grad is not None


@pytest.mark.parametrize("missing", ["whole_image", "skip"])
def test_health_tells_of_images_without_objects(missing, tmp_path):
    method = small_odis(augment=ObjectCropAugment(small_crops(), patch_size=8, min_area=0.05, missing=missing))
    quiet_trainer(tmp_path, max_epochs=1).fit(
        method, ShapesData("scene", num_images=16, batch_size=8, bank_size=4, query_size=4)
    )
    health = method.monitor()
    assert (health["valid_fraction"] == 1) == (missing == "whole_image")  # some scenes have no object so large
    assert health["valid_fraction"] > 0.1
    assert health["redraws_mean"] >= 0
    assert 0 <= health["fallback_rate"] < 1
    assert 1 <= health["object_patches_mean"] < 16


def test_errors():
    with pytest.raises(ValueError, match=r"`augment.patch_size` must be that of the backbone, 8 x 8 pixels, got 4"):
        small_odis(augment=ObjectCropAugment(small_crops(), patch_size=4))
