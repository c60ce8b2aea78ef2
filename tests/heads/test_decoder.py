import pytest
import torch
from masked_weights import our_names

from ssl_distill.augment.masked_image import divide_patches
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.feature_teacher import FrozenFeatures
from ssl_distill.backbones.vit import Tokens, VisionTransformer
from ssl_distill.heads.decoder import FeatureDecoder, class_and_patches
from ssl_distill.heads.masked_student import MaskedStudent
from ssl_distill.losses.masked_feature import smooth_l1, standardize


def golden_student(params, weights):
    """Our student with official weights."""
    sizes = {name: params[name] for name in ("img_size", "patch_size", "embed_dim", "num_heads", "mlp_ratio", "depth")}
    backbone = VisionTransformer(**sizes)
    decoder = FeatureDecoder(
        params["embed_dim"],
        params["embed_dim"],
        backbone.patch_embed.grid_size,
        decoder_dim=params["decoder_embed_dim"],
        depth=params["decoder_depth"],
        num_heads=params["decoder_num_heads"],
        mlp_ratio=params["mlp_ratio"],
    )
    student = MaskedStudent(backbone, decoder).double()
    missing = student.load_state_dict(our_names(weights), strict=False)
    assert set(missing.missing_keys) <= {"backbone.pos_embed", "_extra_state"}
    assert not missing.unexpected_keys
    return student


def test_golden(golden):
    case = golden("dbot/forward")
    tensors, params = case.tensors, case.params
    student = golden_student(params, case.under("student."))
    sizes = {name: params[name] for name in ("img_size", "patch_size", "embed_dim", "num_heads", "mlp_ratio")}
    deep = VisionTransformer(depth=params["teacher_depth"], **sizes).double()
    deep.load_state_dict({**case.under("teacher."), "pos_embed": student.backbone.pos_embed})
    teacher = FrozenFeatures(deep, student_patch_size=params["patch_size"]).double()

    images, expect = tensors["images"].double(), {"rtol": 1e-6, "atol": 1e-8}
    kept, hidden = divide_patches(tensors["noise"], params["mask_ratio"])
    places = torch.arange(tensors["noise"].shape[1]).expand(len(images), -1)
    torch.testing.assert_close(student(images, kept, places).detach(), tensors["pred"], **expect)

    targets = standardize(class_and_patches(teacher(images), hidden))
    loss = smooth_l1(student(images, kept, hidden), targets)
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensors["loss"], **expect)
    parameters = dict(student.named_parameters())
    for name, gradient in our_names(case.under("grad.")).items():
        torch.testing.assert_close(parameters[name].grad, gradient, **expect)


def test_hidden_patches_are_not_seen():
    torch.manual_seed(0)
    backbone = create_backbone("vit_nano_patch8_32")
    student = MaskedStudent(backbone, FeatureDecoder(64, 24, (4, 4), decoder_dim=16, depth=1, num_heads=2)).eval()
    kept, hidden = divide_patches(torch.rand(2, 16), 0.75)
    images = torch.randn(2, 3, 32, 32)
    changed = images.clone()
    for image, patches in zip(changed, hidden, strict=True):
        for patch in patches.tolist():
            row, column = 8 * (patch // 4), 8 * (patch % 4)
            image[:, row : row + 8, column : column + 8] = 9.0
    predictions = student(images, kept, hidden)
    assert predictions.shape == (2, 1 + 12, 24)
    assert torch.equal(predictions, student(changed, kept, hidden))


def test_class_and_patches():
    tokens = Tokens(torch.zeros(1, 1, 2), torch.arange(6.0).view(1, 3, 2))
    wanted = torch.tensor([[2, 0]])
    assert class_and_patches(tokens, wanted).tolist() == [[[0.0, 0.0], [4.0, 5.0], [0.0, 1.0]]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 0}, "`depth` must be at least 1, got 0"),
        ({"decoder_dim": 30, "num_heads": 4}, "`decoder_dim` must be a multiple of `num_heads` 4, got 30"),
        ({"decoder_dim": 18, "num_heads": 2}, "must be a multiple of 4"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FeatureDecoder(8, 8, (2, 2), **kwargs)
