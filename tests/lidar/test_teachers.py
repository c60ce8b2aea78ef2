import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_distill.backbones.position import resize_position_embedding
from ssl_distill.lidar.read_out import corner_aligned, half_pixel, read_out
from ssl_distill.lidar.teachers import PatchStats, TokenCache, ViTTeacher


class Stored(nn.Module):
    """A block that says what was recorded."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, x, **kwargs):
        return self.tokens


def tiny_vit_teacher(dim, patch_size, image_size):
    kwargs = {"embed_dim": dim, "num_heads": 1, "depth": 1, "patch_size": patch_size, "img_size": image_size}
    return ViTTeacher("vit_tiny_patch16_224", pretrained=False, kwargs=kwargs)


def test_golden_features(golden):
    """Normalisation, prefix tokens and layout through the real teacher, whose last block is made to say the tokens."""
    case = golden("scalr/teacher_features")
    t, p = case.tensors, case.params
    dim = t["tokens_with_cls"].shape[2]
    image_size = tuple(t["images"].shape[2:])
    teacher = tiny_vit_teacher(dim, p["patch_size"], image_size)
    for name in ("mean", "std"):
        torch.testing.assert_close(getattr(teacher, name).flatten(), torch.tensor(p[name]))
    seen = []
    teacher.backbone.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher.backbone.blocks = nn.Sequential(Stored(t["tokens_with_cls"]))
    tokens = teacher(t["images"])
    assert tokens.shape[2:] == (p["grid_height"], p["grid_width"])
    torch.testing.assert_close(seen[0], t["encoder_input"], rtol=2e-6, atol=2e-6)
    for i in range(len(tokens)):
        pixels = t[f"pairing_images_{i}"].clone()
        pixels[:, 0] = i
        sampled = read_out(tokens, pixels, image_size)
        torch.testing.assert_close(sampled, t[f"sampled_{i}"], rtol=2e-6, atol=2e-6)
    rows, columns = image_size
    image, row, column = torch.meshgrid(
        torch.arange(len(tokens)), torch.arange(rows), torch.arange(columns), indexing="ij"
    )
    everywhere = torch.stack([image, row, column], 3).flatten(0, 2)
    whole = read_out(tokens, everywhere, image_size).view(len(tokens), rows, columns, dim).permute(0, 3, 1, 2)
    torch.testing.assert_close(whole, t["feature_map"], rtol=2e-6, atol=2e-6)


def test_golden_position_embedding(golden):
    case = golden("scalr/teacher_pos_embed")
    p = case.params
    grid_from, grid_to = (p["src_grid"], p["src_grid"]), (p["grid_height"], p["grid_width"])
    ours = resize_position_embedding(case.tensors["pos_embed"], grid_from, grid_to, mode="dino_v1")
    torch.testing.assert_close(ours, case.tensors["pos_embed_resized"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("placement", "align_corners"), [(corner_aligned, True), (half_pixel, False)])
@pytest.mark.parametrize("grid", [(4, 7), (1, 3), (2, 1)])
def test_reading_equals_upsampling(placement, align_corners, grid):
    torch.manual_seed(0)
    patch = 6
    tokens = torch.randn(2, 5, *grid, dtype=torch.float64, requires_grad=True)
    size = (grid[0] * patch, grid[1] * patch)
    pixels = torch.stack([torch.randint(n, (300,)) for n in (2, *size)], 1)
    whole = F.interpolate(tokens, size, mode="bilinear", align_corners=align_corners)
    image, row, column = pixels.T
    ours = read_out(tokens, pixels, size, placement)
    torch.testing.assert_close(ours, whole[image, :, row, column], rtol=1e-10, atol=1e-10)
    in_float32 = read_out(tokens.float(), pixels, size, placement)
    torch.testing.assert_close(in_float32, whole[image, :, row, column].float(), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours.sin().sum(), tokens)
    (expected,) = torch.autograd.grad(whole[image, :, row, column].sin().sum(), tokens)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert read_out(tokens, pixels[:0], size, placement).shape == (0, 5)


def test_vit_gives_the_last_block_before_the_norm():
    torch.manual_seed(0)
    teacher = tiny_vit_teacher(16, 4, (12, 20)).eval()
    images = torch.rand(2, 3, 12, 20)
    normed = teacher.backbone.forward_features((images - teacher.mean) / teacher.std)
    tokens = teacher.backbone.norm(teacher(images).flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens, normed[:, 1:])
    assert teacher.num_features == 16
    assert teacher.patch_size == 4
    assert teacher(torch.rand(1, 3, 8, 24)).shape == (1, 16, 2, 6)


def test_patch_stats():
    torch.manual_seed(0)
    images = torch.rand(3, 3, 12, 16)
    teacher = PatchStats(4)
    raw = teacher(images)
    assert raw.shape == (3, 16, 3, 4)
    normed = (images - teacher.mean) / teacher.std
    patch = normed[1, :, 4:8, 8:12]
    torch.testing.assert_close(raw[1, :3, 1, 2], patch.mean((1, 2)))
    torch.testing.assert_close(raw[1, 3, 1, 2], patch[0].mean() - patch[1].mean())
    torch.testing.assert_close(raw[1, 5:8, 1, 2], patch.std((1, 2), correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw[1, 10:13, 1, 2], normed[1, :, 0:12, 4:16].mean((1, 2)))
    torch.testing.assert_close(raw[1, 13:16, 1, 2], raw[1, :3, 1, 2] - raw[1, 10:13, 1, 2])
    steps = (normed[1, :, 4:8, 9:13] - normed[1, :, 4:8, 8:12]).abs().mean()
    torch.testing.assert_close(raw[1, 8, 1, 2], steps)
    assert not raw[:, 8, :, :3].equal(raw[:, 9, :, :3])

    teacher.fit([images[:2], images[2:]])
    fitted = teacher(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(fitted.mean(1), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(fitted.std(1), torch.ones(16), rtol=1e-4, atol=1e-4)
    assert set(teacher.state_dict()) == {"center", "scale"}


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += len(images)
        return images.repeat(1, 2, 1, 1)[:, :, ::2, ::2]


def test_cache():
    teacher, images = Counting(), torch.rand(5, 3, 4, 4)
    cache = TokenCache(1.0)
    for pictures in ([0, 1, 2], [2, 1, 4], [4, 4, 0]):
        torch.testing.assert_close(cache(teacher, images[pictures], pictures), Counting()(images[pictures]))
    assert teacher.calls == 4
    assert len(cache) == 4

    size = 6 * 2 * 2 * 4
    small = TokenCache(2.5 * size / 2**30)
    for _ in range(2):
        torch.testing.assert_close(small(teacher, images, [0, 1, 2, 3, 4]), Counting()(images))
    assert len(small) == 2
    assert len(TokenCache(0)) == 0


def test_errors():
    with pytest.raises(ValueError, match=r"`image_size` .* patch size 4, got \(10, 20\); try \(8, 20\)"):
        PatchStats(4).check_image_size((10, 20))
    PatchStats(4).check_image_size((12, 20))
    with pytest.raises(ValueError, match="`patch_size` must be at least 2, got 1"):
        PatchStats(1)
    with pytest.raises(ValueError, match="`name` must be a transformer with patches, resnet18"):
        ViTTeacher("resnet18", pretrained=False)
    with pytest.raises(ValueError, match="capacity must be at least 0 GiB"):
        TokenCache(-1)
