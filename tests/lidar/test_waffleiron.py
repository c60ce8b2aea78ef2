import copy

import pytest
import torch
from lidar_clouds import random_clouds
from torch import nn

from ssl_distill.export import export_backbone
from ssl_distill.lidar.batch import PaddedClouds, PointBatch, join_clouds, pad_clouds
from ssl_distill.lidar.grids import flatten, grid_indices, inflate
from ssl_distill.lidar.official import load_official, load_waffleiron, our_name, read_official
from ssl_distill.lidar.waffleiron import ChannelMixing, Embedding, SpatialMixing, WaffleIron, drop_path

NORMS = {"batchnorm": nn.BatchNorm1d, "layernorm": nn.LayerNorm}


def close(actual, expected, tolerance, name=""):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


def rows(tokens):
    """(B, C, N) to (B * N, C)."""
    return tokens.transpose(1, 2).flatten(0, 1)


def pairs(grids):
    return [tuple(grid) for grid in grids]


def padded(case, feat="feat"):
    t = case.tensors
    return PaddedClouds(t[feat], t["cell_ind"], t["neighbors_emb"], t["occupied_cells"].bool())


PARTS = {
    "embed.": "embedding.",
    "waffleiron.spatial_mix.0.": "layers.0.spatial.",
    "waffleiron.channel_mix.0.": "layers.0.channel.",
}


def check_gradients(module, case, prefix, tolerance):
    """Gradients and batch-norm statistics of one part of a published network, by our names."""
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    found |= {name: value for name, value in module.named_buffers() if "running" in name}
    expected = {f"{prefix}{name}": value for kind in ("grad/", "after/") for name, value in case.under(kind).items()}
    expected = {our_name(name).removeprefix(PARTS[prefix]): value for name, value in expected.items()}
    assert set(found) == set(expected)
    for name, value in found.items():
        close(value, expected[name].reshape(value.shape), tolerance, name)


def load_part(module, case, prefix):
    state = case.under("state/")
    load_official(module, {our_name(prefix + key).removeprefix(PARTS[prefix]): value for key, value in state.items()})


def test_golden_flatten_and_inflate(golden):
    case = golden("waffleiron/flatten_inflate")
    t, grids = case.tensors, pairs(case.params["grids"])
    clouds, channels, num_points = t["tokens"].shape
    neighbors = torch.zeros(clouds, 1, num_points, dtype=torch.long)
    points = PaddedClouds(t["tokens"], t["cell_ind"], neighbors, t["occupied"].bool()).flat()
    tokens = points.features.clone().requires_grad_()
    total = 0.0
    for axis, index in enumerate(grid_indices(points, grids)):
        part = flatten(tokens, index)
        whole = torch.zeros(clouds, channels, *grids[axis])
        (top, left), (_, rows_, columns) = index.corner, index.shape
        whole[:, :, top : top + rows_, left : left + columns] = part.detach()
        close(whole.flatten(2), t[f"grid_{axis}"], 1e-6)
        close(index.weight, t[f"point_weight_{axis}"].flatten(), 1e-6)
        inflated = inflate(part, index)
        close(inflated, rows(t[f"inflated_{axis}"]), 1e-6)
        total = total + part.square().sum()
    total.backward()
    close(tokens.grad, rows(t["grad_tokens_of_sum_of_squares"]), 1e-6)


def test_golden_embedding(golden):
    case = golden("waffleiron/embedding")
    t, p = case.tensors, case.params
    embedding = Embedding(p["channels_in"], p["channels_out"])
    load_part(embedding, case, "embed.")
    clouds, _, num_points = t["features"].shape
    start = num_points * torch.arange(clouds)[:, None, None]
    inputs = rows(t["features"]), rows(t["neighbors"] + start)
    close(embedding.eval()(*inputs), rows(t["out_eval"]), 1e-5)
    out = embedding.train()(*inputs)
    close(out, rows(t["out_train"]), 1e-5)
    (out * rows(t["loss_weight"])).sum().backward()
    check_gradients(embedding, case, "embed.", 1e-4)


@pytest.mark.parametrize("kind", ["channel_mix", "spatial_mix"])
@pytest.mark.parametrize("norm", NORMS)
def test_golden_mixing(golden, kind, norm):
    case = golden(f"waffleiron/{kind}_{norm}")
    t, grid = case.tensors, tuple(case.params["grid"])
    mixing = {"channel_mix": ChannelMixing, "spatial_mix": SpatialMixing}[kind](case.params["channels"], NORMS[norm])
    prefix = f"waffleiron.{kind}.0."
    load_part(mixing, case, prefix)
    clouds, _, num_points = t["tokens"].shape
    cells = t.get("cell_ind", torch.zeros(clouds, num_points, dtype=torch.long))[:, None]
    real = t.get("occupied", torch.ones(clouds, num_points)).bool()
    points = PaddedClouds(t["tokens"], cells, torch.zeros_like(cells), real).flat()
    (index,) = grid_indices(points, (grid,))
    tokens = points.features.clone().requires_grad_()
    close(tokens + mixing.eval()(tokens, index), rows(t["out_eval"]), 1e-5)
    out = tokens + mixing.train()(tokens, index)
    close(out, rows(t["out_train"]), 1e-5)
    (out * rows(t["loss_weight"])).sum().backward()
    close(tokens.grad, rows(t["grad_tokens"]), 1e-4)
    check_gradients(mixing, case, prefix, 1e-4)


def test_golden_drop_path(golden):
    case = golden("waffleiron/drop_path")
    x = case.tensors["x"]
    cloud = torch.arange(len(x)).repeat_interleave(x.shape[2])
    out = drop_path(rows(x), cloud, case.tensors["u"].flatten(), case.params["drop_prob"])
    close(out, rows(case.tensors["out_train"]), 1e-6)


class Segmenter(nn.Module):
    """The backbone with a published head, whose names it keeps."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def load(self, state):
        load_official(self.backbone, state)
        head = {name.removeprefix("classif."): value for name, value in state.items() if name.startswith("classif.")}
        load_official(self.head, head)

    def forward(self, points):
        return self.head(self.backbone(points))


def test_golden_segmenter(golden):
    for name in golden.cases("waffleiron/segmenter_*"):
        case = golden(name)
        t, p = case.tensors, case.params
        channels, classes = p["channels"], p["num_classes"]
        if "hidden" in p:
            head = nn.Sequential(nn.Linear(channels, p["hidden"]), nn.ReLU(), nn.Linear(p["hidden"], classes))
        else:
            head = nn.Linear(channels, classes)
        activation = nn.GELU if p.get("activation", "").startswith("gelu") else nn.ReLU
        network = Segmenter(
            WaffleIron(pairs(p["grids"]), channels, p["depth"], p["channels_in"], NORMS[p["norm"]], activation), head
        )
        network.load(case.under("state/"))
        if "occupied_cells" not in t:
            t["occupied_cells"] = torch.ones_like(t["feat"][:, 0])
        points = padded(case).flat()
        network.eval()
        if "tokens_after_embed_eval" in t:
            embedded = network.backbone.embedding(points.features, points.neighbors)
            close(embedded, rows(t["tokens_after_embed_eval"]), 1e-4, name)
            close(network.backbone(points), rows(t["tokens_after_backbone_eval"]), 1e-4, name)
        close(network(points), rows(t["out_eval"]), 1e-4, name)
        out = network.train()(points)
        close(out, rows(t["out_train"]), 1e-4, name)
        (out * rows(t["loss_weight"]))[points.real].sum().backward()
        found = {key: value.grad for key, value in network.named_parameters()}
        if case.under("after/"):
            found |= {key: value for key, value in network.named_buffers() if "running" in key}
        found = {key.removeprefix("backbone.").replace("head.", "classif."): value for key, value in found.items()}
        expected = {our_name(key): value for kind in ("grad/", "after/") for key, value in case.under(kind).items()}
        assert set(found) == set(expected)
        for key, value in found.items():
            close(value, expected[key].reshape(value.shape), 1e-3, f"{name} {key}")


def test_golden_collate(golden):
    case = golden("scalr/collate_distill")
    t = case.tensors
    clouds = [
        PointBatch(
            t[f"in{i}_feat"][0].T,
            t[f"in{i}_cell_ind"][0].T,
            t[f"in{i}_neighbors"][0].T,
            torch.tensor([t[f"in{i}_feat"].shape[2]]),
        )
        for i in range(2)
    ]
    batch = join_clouds(clouds)
    for prefix, size in (("out", None), ("outfixed", case.params["num_points_fixed"])):
        ours = pad_clouds(batch, size)
        names = ("feat", "cell_ind", "neighbors_emb", "occupied_cells")
        for name, value in zip(names, ours, strict=True):
            assert torch.equal(value.to(t[f"{prefix}_{name}"].dtype), t[f"{prefix}_{name}"]), name
        again = ours.ragged()
        for ours_part, part in zip(again[:4], batch[:4], strict=True):
            assert torch.equal(ours_part, part)


@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_the_company(norm):
    """Alone or in a batch, ragged or padded: the same tokens in eval mode."""
    clouds, grids = random_clouds([30, 5, 18])
    network = WaffleIron(grids, 8, 4, norm=NORMS[norm]).double().eval()
    clouds = [cloud._replace(features=cloud.features.double()) for cloud in clouds]
    alone = torch.cat([network(cloud) for cloud in clouds])
    batch = join_clouds(clouds)
    close(network(batch), alone, 1e-10)
    close(network(pad_clouds(batch, 40).ragged()), alone, 1e-10)


def test_padding_does_not_touch_batch_statistics():
    clouds, grids = random_clouds([30, 5])
    batch = join_clouds(clouds)
    network = WaffleIron(grids, 8, 2, norm=nn.BatchNorm1d)
    other = copy.deepcopy(network)
    close(network(batch), other(pad_clouds(batch, 50).ragged()), 1e-5)
    close(dict(network.named_buffers()), dict(other.named_buffers()), 1e-6)


def test_cut_grids_are_exact():
    """A cloud in a corner of a large grid, against the convolution of the whole grid."""
    clouds, _ = random_clouds([25, 20], grids=((4, 4),))
    batch = join_clouds(clouds)
    grid = (64, 48)
    for top, left in ((0, 0), (30, 20), (60, 44)):
        cells = (batch.cells // 4 + top) * grid[1] + batch.cells % 4 + left
        points = batch._replace(cells=cells)
        (index,) = grid_indices(points, (grid,))
        assert index.shape[1] <= 6
        assert index.shape[2] <= 6
        mixing = SpatialMixing(5).double()
        tokens = points.features.double()
        whole = index._replace(cell=points.cloud * grid[0] * grid[1] + cells[:, 0], shape=(2, *grid), corner=(0, 0))
        close(mixing(tokens, index), mixing(tokens, whole), 1e-10)


def test_counts_survive_half_precision():
    """5,000 points in one cell, more than bfloat16 can count."""
    size = 5000
    neighbors = torch.zeros(size, 2, dtype=torch.long)
    cells = torch.zeros(size, 1, dtype=torch.long)
    points = PointBatch(torch.ones(size, 1), cells, neighbors, torch.tensor([size]))
    (index,) = grid_indices(points, ((3, 3),))
    for dtype in (torch.bfloat16, torch.float16):
        mean = flatten(torch.full((size, 2), 1.5, dtype=dtype), index)
        assert mean.dtype == dtype
        close(mean[0, :, 0, 0].float(), torch.full((2,), 1.5), 1e-2)


def test_checkpointing_changes_nothing():
    clouds, grids = random_clouds([30, 12])
    batch = join_clouds(clouds)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = WaffleIron(grids, 8, 3, drop_path_rate=0.5, checkpointing=checkpointing)
        torch.manual_seed(1)
        network(batch).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    close(*gradients, 1e-6)


def test_drop_path_drops_whole_clouds():
    clouds, grids = random_clouds([30, 12, 9, 20])
    batch = join_clouds(clouds)
    torch.manual_seed(0)
    network = WaffleIron(grids, 8, 1, drop_path_rate=0.5)
    cloud = batch.cloud
    residual = torch.ones(len(cloud), 8)
    seen = set()
    for _ in range(20):
        dropped = network.drop_path(residual, cloud, 4)
        for i in range(4):
            values = dropped[cloud == i].unique().tolist()
            assert len(values) == 1
            seen.update(values)
    assert seen == {0.0, 2.0}
    assert torch.equal(network.eval().drop_path(residual, cloud, 4), residual)


def test_empty_cloud_among_others():
    clouds, grids = random_clouds([30, 12])
    nobody = PointBatch(torch.empty(0, 5), torch.empty(0, 3).long(), torch.empty(0, 5).long(), torch.tensor([0]))
    network = WaffleIron(grids, 8, 2).eval()
    close(network(join_clouds([clouds[0], nobody, clouds[1]])), network(join_clouds(clouds)), 1e-6)
    assert network(nobody).shape == (0, 8)


def test_parameter_counts():
    """Those of the published networks."""
    for channels, millions in ((768, 59.44), (384, 15.12), (256, 6.84)):
        with torch.device("meta"):
            network = WaffleIron(channels=channels)
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_golden_weights_as_an_official_checkpoint(golden, tmp_path):
    case = golden("waffleiron/segmenter_layernorm")
    state = {f"module.{name}": value for name, value in case.under("state/").items()}
    torch.save({"model_point": state, "epoch": 3}, tmp_path / "official.pth")
    p = case.params
    network = WaffleIron(pairs(p["grids"]), p["channels"], p["depth"], p["channels_in"])
    load_official(network, read_official(tmp_path / "official.pth"))
    points = padded(case).flat()
    close(network.eval()(points), rows(case.tensors["tokens_after_backbone_eval"]), 1e-4)
    torch.save({"weights": state}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="model_point"):
        read_official(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"it lacks layers\.0"):
        load_official(network, {key: value for key, value in state.items() if "spatial_mix.0" not in key})


def test_export_and_load(tmp_path):
    clouds, grids = random_clouds([30])
    network = WaffleIron(grids, 8, 2, norm=nn.BatchNorm1d, activation=nn.GELU).eval()
    export_backbone(network, tmp_path / "lidar.safetensors")
    again = load_waffleiron(tmp_path / "lidar.safetensors", drop_path_rate=0.2)
    assert torch.equal(again(clouds[0]), network(clouds[0]))
    assert again.drop_path.drop_prob == 0.2
    export_backbone(nn.Linear(2, 2), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a WaffleIron"):
        load_waffleiron(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "`channels` must be at least 1, got 0"),
        ({"grids": []}, "`grids` must be one or more pairs"),
        ({"grids": [(4, 0)]}, "`grids` must be one or more pairs"),
        ({"drop_path_rate": 1.0}, "`drop_path_rate` must lie in"),
        ({"checkpointing": True, "norm": nn.BatchNorm1d}, "`checkpointing` needs a norm without statistics"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        WaffleIron(**{"channels": 8, "depth": 1, **arguments})


def test_pad_errors():
    clouds, _ = random_clouds([30])
    with pytest.raises(ValueError, match="`num_points` must be at least 30"):
        pad_clouds(clouds[0], 20)
