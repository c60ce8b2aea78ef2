import pytest
import torch
from harness import in_float64
from mokd_weights import mlp_head_state, t_head_of

from ssl_distill.backbones.position import resize_position_embedding
from ssl_distill.heads.prototype import FreePrototypes, PrototypeHead
from ssl_distill.heads.t_head import THead


def as_map(tokens):
    """Row-major tokens (B, N, D) as a square map."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def test_golden(golden):
    for name in golden.cases("mokd/thead_*"):
        case = golden(name)
        t = in_float64(case)
        is_map = "fmap_global" in t
        inputs = {key: t[f"{'fmap' if is_map else 'tokens'}_{key}"].requires_grad_() for key in ("global", "local")}
        maps = {key: value if is_map else as_map(value) for key, value in inputs.items()}
        head = t_head_of(case.params, maps["global"].shape[1], case.params["pos_grid"], t)

        logits = {key: head(value) for key, value in maps.items()}
        sum((value * t["upstream"]).sum() for value in logits.values()).backward()

        # Float32 inputs, float64 results stored in float32.
        expect = {"rtol": 2e-6, "atol": 1e-7}
        for key in ("global", "local"):
            torch.testing.assert_close(logits[key], t[f"logits_{key}"], **expect)
            if is_map:
                torch.testing.assert_close(head.query(maps[key].mean((2, 3))), t[f"pooled_{key}"], **expect)
            torch.testing.assert_close(inputs[key].grad, t[f"grad_{'fmap' if is_map else 'tokens'}_{key}"], **expect)
        torch.testing.assert_close(head.search(maps["global"], t["query"][None])[0], t["logits_search"], **expect)
        torch.testing.assert_close(head.last_layer.weight_g.grad, t["grad_last_g"], **expect)
        if "grad_pos_embed" in t:
            torch.testing.assert_close(head.pos_embed.grad, t["grad_pos_embed"], **expect)


def test_golden_position_resizing(golden):
    for name in golden.cases("mokd/pos_resize_*"):
        case = golden(name)
        grids = [(case.params[f"{which}_grid"],) * 2 for which in ("src", "dst")]
        resized = resize_position_embedding(case.tensors["pos_in"].double(), *grids, 0, "dino_v1")
        torch.testing.assert_close(resized, case.tensors["pos_out"].double(), rtol=1e-6, atol=1e-7)


def test_golden_mlp_head(golden):
    case = golden("mokd/mlp_head")
    t, params = in_float64(case), case.params
    head = PrototypeHead(
        t["x"].shape[1],
        len(t["last_v"]),
        hidden_dim=params["hidden"],
        bottleneck_dim=params["bottleneck"],
        num_layers=params["nlayers"],
        prototypes=FreePrototypes,
    ).double()
    head.load_state_dict(mlp_head_state(t))
    x = t["x"].requires_grad_()
    logits = head(x)
    logits.backward(t["upstream"])
    found = {"logits": logits, "grad_x": x.grad, "grad_w1": head.mlp[0].weight.grad}
    found |= {"grad_last_v": head.last_layer.weight_v.grad, "grad_last_g": head.last_layer.weight_g.grad}
    torch.testing.assert_close(found, {name: t[name] for name in found}, rtol=2e-6, atol=1e-7)


def test_search_depends_on_its_query_alone():
    torch.manual_seed(0)
    head = THead(10, 7, (3, 2), embed_dim=8, depth=1, num_heads=2)
    feature_map, queries = torch.randn(2, 10, 3, 2), torch.randn(3, 2, 8)
    logits = head.search(feature_map, queries)
    assert logits.shape == (3, 2, 7)
    assert head.search(feature_map, queries[:0]).shape == (0, 2, 7)
    changed = queries.clone()
    changed[1, 0] = 10 * torch.randn(8)
    others = head.search(feature_map, changed)
    different = (others - logits).abs().amax(-1) > 1e-5
    assert different.nonzero().tolist() == [[1, 0]]


def test_shapes():
    head = THead(8, 7, (4, 3), embed_dim=8, depth=1, num_heads=2)
    assert isinstance(head.projection, torch.nn.Identity)
    assert head(torch.randn(2, 8, 2, 5)).shape == (2, 7)
    query = head.query(torch.randn(3, 2, 8, requires_grad=True))
    assert query.shape == (3, 2, 8)
    assert not query.requires_grad


def test_a_convnets_map_is_projected_whatever_its_width():
    """As in the official code, whose ConvNet always has its 1x1 convolution and whose ViT never."""
    sizes = {"in_dim": 8, "num_prototypes": 7, "grid": (2, 2), "embed_dim": 8, "depth": 1, "num_heads": 2}
    assert isinstance(THead(**sizes, is_tokens=False).projection, torch.nn.Linear)
    assert isinstance(THead(**sizes, is_tokens=True).projection, torch.nn.Identity)


def test_initialisation():
    head = THead(512, 100, (7, 7), depth=1)
    assert head.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert head.projection.weight.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)
    assert head.last_layer.weight_v.std().item() == pytest.approx(0.0295, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 10, "num_heads": 3}, "`num_heads` must divide `embed_dim` 10, got 3"),
        ({"depth": 0}, "`depth` must be at least 1, got 0"),
        ({"num_prototypes": 0}, "`num_prototypes` must be at least 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        THead(**{"in_dim": 4, "num_prototypes": 4, "grid": (2, 2), **arguments})
