import numpy as np
import torch
from PIL import Image

from ssl_distill.lidar.frames import IGNORED
from ssl_distill.lidar.pictures import class_colors, draw_birdseye, draw_pairs, feature_colors


def test_like_features_have_like_colors():
    torch.manual_seed(0)
    kinds = torch.randn(4, 16)
    kind = torch.randint(4, (500,))
    colors = feature_colors(kinds[kind] + 0.01 * torch.randn(500, 16))
    assert colors.min() >= 0
    assert colors.max() <= 1
    means = torch.stack([colors[kind == each].mean(0) for each in range(4)])
    assert max(colors[kind == each].std(0).max() for each in range(4)) < 0.1
    assert torch.pdist(means).min() > 0.3
    assert feature_colors(torch.ones(9, 5)).isfinite().all()


def test_classes_have_their_own_colors():
    colors = class_colors(20)
    assert len(np.unique(colors, axis=0)) == 21, "20 classes and none"


def test_scan_from_above(tmp_path):
    """The upper right quarter is of the second class, the lower left of none, the others of the first."""
    x, y = np.meshgrid(np.linspace(-20, 20, 80), np.linspace(-20, 20, 80))
    labels = np.where((x > 0) & (y > 0), 1, 0)
    labels[(x < 0) & (y < 0)] = IGNORED
    xyz = np.stack([x.ravel(), y.ravel(), np.zeros(6400)], 1)
    draw_birdseye(xyz, {"truth": labels.ravel()}, ("road", "car"), tmp_path / "above.png")
    image = np.asarray(Image.open(tmp_path / "above.png").convert("RGB")) / 255
    shown = image[: int(0.85 * len(image))]  # without the legend
    rows, columns = {}, {}
    for name, color in zip(("road", "car", "none"), class_colors(2), strict=True):
        row, column = np.nonzero(np.abs(shown - color).max(2) < 0.02)
        assert len(row) > 500
        rows[name], columns[name] = row.mean(), column.mean()
    assert rows["car"] < rows["road"] - 50 < rows["none"] - 100
    assert columns["none"] < columns["road"] - 50 < columns["car"] - 100


def test_pairs_over_a_picture(tmp_path):
    """Points are where their pixels are: in the upper half."""
    pixels = torch.stack([torch.arange(40), torch.arange(40) * 4], 1)
    draw_pairs(torch.ones(3, 80, 160), pixels, torch.arange(40.0), tmp_path / "pairs.png")
    image = np.asarray(Image.open(tmp_path / "pairs.png").convert("RGB"))
    colored = np.ptp(image[:, : image.shape[1] * 3 // 4], axis=2) > 60  # left of the colour bar
    rows = np.flatnonzero(colored.any(1))
    assert len(rows) > 40
    assert rows.max() < len(image) * 0.55
