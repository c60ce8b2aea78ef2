"""Clouds as pictures: from above, by class or by feature, and over what a camera saw."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from ssl_distill.lidar.frames import IGNORED

_POINT_SIZE = 3.0
_SHOWN = 0.98  # share of the points that a picture from above is cut to, so that a few far ones do not shrink it


def feature_colors(features: Float[Tensor, "N D"]) -> Float[Tensor, "N 3"]:
    """The first three principal components as red, green and blue in [0, 1]; equal colours mean like features."""
    features = features.detach().float()
    centered = features - features.mean(0)
    _, _, directions = torch.linalg.svd(centered.T @ centered)
    components = centered @ directions[:3].T
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    return ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def draw_birdseye(
    xyz: Float[np.ndarray, "N 3"],
    panels: dict[str, Int[np.ndarray, "N"] | Float[np.ndarray, "N 3"]],
    class_names: Sequence[str],
    path: str | Path,
) -> None:
    """Save a scan from above, once per panel.

    Args:
        xyz: Points in metres; the higher are drawn over the lower.
        panels: Title to classes, 255 for none, or to colours.
        class_names: For the legend.
        path: Image file to write.
    """
    palette = class_colors(len(class_names))
    figure = Figure(figsize=(4.5 * len(panels), 5.4), layout="constrained")
    order = xyz[:, 2].argsort()
    reach = float(np.quantile(np.abs(xyz[:, :2]).max(1), _SHOWN)) if len(xyz) else 1.0
    for i, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        colors = values if values.ndim == 2 else palette[np.where(values == IGNORED, len(class_names), values)]
        axes.scatter(xyz[order, 0], xyz[order, 1], s=_POINT_SIZE, c=colors[order], linewidths=0)
        axes.set_title(title)
        axes.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
        axes.set_xlabel("x in m")
        axes.set_ylabel("y in m")
    handles = [
        matplotlib.lines.Line2D([], [], marker="o", linestyle="", color=color, label=name)
        for name, color in zip(class_names, palette, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(class_names), 8), fontsize=8)
    figure.savefig(path, dpi=110)


def draw_pairs(
    image: Float[Tensor, "3 H W"],
    pixels: Int[Tensor, "M 2"],
    values: Float[Tensor, "M"],
    path: str | Path,
    title: str = "distance in m",
) -> None:
    """Save a picture with the points that it is paired with.

    Args:
        image: In [0, 1].
        pixels: Row and column of every point.
        values: Shown as colour, such as distances.
        path: Image file to write.
        title: What the colours are.
    """
    figure = Figure(figsize=(9, 9 * image.shape[1] / image.shape[2] + 0.6), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(image.permute(1, 2, 0).cpu().numpy())
    row, column = pixels.cpu().numpy().T
    points = axes.scatter(column, row, s=4, c=values.cpu().numpy(), cmap="turbo", linewidths=0)
    figure.colorbar(points, ax=axes, label=title)
    axes.set_axis_off()
    figure.savefig(path, dpi=110)


def class_colors(count: int) -> Float[np.ndarray, "_ 3"]:
    """A colour for each class, and grey for none."""
    strong_then_pale = np.r_[0:20:2, 1:20:2]
    colors = matplotlib.colormaps["tab20"](strong_then_pale[np.arange(count) % 20])[:, :3]
    return np.concatenate([colors, [[0.8, 0.8, 0.8]]])
