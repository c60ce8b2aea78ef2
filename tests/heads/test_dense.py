import pytest
import torch
import torch.nn.functional as F
from harness import in_float64
from torch import nn

from ssl_distill.backbones.projection_teacher import head_of
from ssl_distill.heads.dense import DenseProjection, MapAttention, SpatialAdaptor, SpatialGELU, SpatialReLU

EXPECT = {"rtol": 2e-6, "atol": 1e-7}
_NORM = {"weight", "bias", "running_mean", "running_var"}


def golden_head(t, eps):
    """The vector head of a golden file."""
    layers, number = {}, 0
    count = len([name for name in t if name.startswith("w") and name[1:].isdigit()])
    for i in range(1, count + 1):
        layers[f"{number}.weight"] = t[f"w{i}"]
        if f"b{i}" in t:
            layers[f"{number}.bias"] = t[f"b{i}"]
        prefix = "bn_" if count == 2 else f"bn{i}_"
        if i < count:
            layers |= {f"{number + 1}.{part}": t[f"{prefix}{part}"] for part in _NORM}
        number += 3
    head = head_of(layers, nn.ReLU).double().eval()
    assert all(layer.eps == eps for layer in head if isinstance(layer, nn.BatchNorm1d))
    return head


def test_golden(golden):
    for name in golden.cases("pcd/adaptor_*"):
        case = golden(name)
        t = in_float64(case)
        head = golden_head(t, case.params["bn_eps"])
        adapted = SpatialAdaptor(head)
        if "tokens_with_cls" in t:
            patches = t["tokens_with_cls"][:, 1:].transpose(1, 2)
            side = round(patches.shape[2] ** 0.5)
            patches = patches.unflatten(2, (side, side))
            pooled = F.adaptive_avg_pool2d(adapted(patches), case.params["out_grid"])
            torch.testing.assert_close(pooled, t["map_head_out"], **EXPECT)
            torch.testing.assert_close(head(patches.mean((2, 3))), t["vector_head_on_mean_patch"], **EXPECT)
            continue
        maps = t["random_map"]
        expected = t["map_head_on_random"] if "map_head_on_random" in t else t["map_head_out"]
        torch.testing.assert_close(adapted(maps), expected, **EXPECT)
        torch.testing.assert_close(head(maps.mean((2, 3))), t["vector_head_on_pooled"], **EXPECT)
        torch.testing.assert_close(adapted(maps).mean((2, 3)), head(maps.mean((2, 3))), rtol=1e-9, atol=1e-12)
        if "const_vector" not in t:
            continue
        constant = t["const_vector"][:, :, None, None].expand(-1, -1, *maps.shape[2:])
        torch.testing.assert_close(adapted(constant), t["map_head_on_const"], **EXPECT)
        torch.testing.assert_close(adapted.layers[:2](maps), t["mid_after_bn"], **EXPECT)
        plain = nn.Sequential(*adapted.layers[:2], nn.ReLU(), adapted.layers[3])
        torch.testing.assert_close(plain(maps), t["map_head_with_plain_relu"], **EXPECT)
        torch.testing.assert_close(adapted.train()(maps), t["map_head_train_mode"], **EXPECT)
        torch.testing.assert_close(adapted.layers[1].running_mean, t["train_bn_running_mean"], **EXPECT)
        torch.testing.assert_close(adapted.layers[1].running_var, t["train_bn_running_var"], **EXPECT)


def test_golden_spatial_relu(golden):
    case = golden("pcd/spatial_relu")
    x = case.tensors["x"].requires_grad_()
    y = SpatialReLU()(x)
    y.backward(case.tensors["upstream"])
    torch.testing.assert_close(y, case.tensors["y"], rtol=0, atol=0)
    torch.testing.assert_close(x.grad, case.tensors["grad_x"], rtol=0, atol=0)


def head(activation, width=16, norm=True):
    layers = [nn.Linear(8, width), *([nn.BatchNorm1d(width)] if norm else []), activation(), nn.Linear(width, 5)]
    made = nn.Sequential(*layers)
    made.train()(torch.randn(64, 8))  # statistics other than the initial ones
    return made.eval()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("norm", [True, False])
def test_pooled_map_equals_vector_head(activation, norm):
    torch.manual_seed(0)
    vector_head = head(activation, norm=norm)
    maps = torch.randn(3, 8, 5, 4)
    torch.testing.assert_close(SpatialAdaptor(vector_head)(maps).mean((2, 3)), vector_head(maps.mean((2, 3))))


def test_gates_at_half_precision_and_zero():
    maps = torch.full((1, 1, 7, 7), 1.0, dtype=torch.bfloat16)
    maps[0, 0, 0, :2] = torch.tensor([-300.0, 252.5])
    # The sum is -300 + 252.5 + 47 < 0 in float32; bfloat16 would round it to a positive number on the way.
    assert float(maps.float().sum()) < 0
    assert (SpatialReLU()(maps) == 0).all()
    assert (SpatialGELU()(torch.zeros(1, 1, 2, 2)) == 0).all()


def test_map_attention_equals_torch():
    torch.manual_seed(0)
    ours = MapAttention(12, num_heads=3)
    maps = torch.randn(2, 12, 3, 4)
    torch.testing.assert_close(ours(maps), maps, rtol=0, atol=0)
    nn.init.normal_(ours.attention.proj.weight)
    nn.init.normal_(ours.attention.proj.bias)

    tokens = ours.norm(maps.flatten(2).transpose(1, 2))
    theirs, _ = F.multi_head_attention_forward(
        *[tokens.transpose(0, 1)] * 3,
        embed_dim_to_check=12,
        num_heads=3,
        in_proj_weight=ours.attention.qkv.weight,
        in_proj_bias=ours.attention.qkv.bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=ours.attention.proj.weight,
        out_proj_bias=ours.attention.proj.bias,
        need_weights=False,
    )
    expected = maps + theirs.permute(1, 2, 0).view_as(maps)
    torch.testing.assert_close(ours(maps), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden_dim", "out_dim", "num_layers", "parameters"),
    [(4096, 256, 2, 5_259_264), (8192, 8192, 3, 339_804_160)],
)
def test_shapes(hidden_dim, out_dim, num_layers, parameters):
    with torch.device("meta"):
        projection = DenseProjection(512, out_dim, hidden_dim, num_layers)
        assert projection(torch.empty(2, 512, 7, 7)).shape == (2, out_dim, 7, 7)
    assert sum(parameter.numel() for parameter in projection.parameters()) == parameters


class Broken(nn.Linear):
    """Not the layer that its base is."""


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(3, 3), nn.LayerNorm(3)], "got LayerNorm as layer '1': it does not commute"),
        ([nn.Linear(3, 3), nn.Tanh()], "got Tanh as layer '1'"),
        ([nn.Linear(3, 3), nn.GELU(approximate="tanh")], "got GELU as layer '1'"),
        ([Broken(3, 3)], "got Broken as layer '0'"),
        ([nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)], "must have running statistics .* layer '1'"),
        ([nn.ReLU()], "must have a Linear layer, got none"),
    ],
)
def test_errors(layers, message):
    with pytest.raises(ValueError, match=message):
        SpatialAdaptor(nn.Sequential(*layers))


def test_errors_of_sizes():
    with pytest.raises(ValueError, match="`num_heads` must divide the map's 12 channels, got 8"):
        MapAttention(12)
    with pytest.raises(ValueError, match="`hidden_dim` must be at least 1, got 0"):
        DenseProjection(3, 3, 0)
