from PIL import Image

from ssl_distill.callbacks.curves import curve_panels, draw_curves
from ssl_distill.callbacks.metrics_file import MetricsFile


def test_encoders_share_a_panel_and_panels_are_in_reading_order():
    rows = [
        {"step": 3, "epoch": 0, "val/teacher/knn_top1": 0.5, "val/student/knn_top1": 0.6, "val/score": 0.6},
        {
            "step": 4,
            "train/health/entropy": 1.0,
            "schedule/momentum": 0.9,
            "train/class": float("nan"),
            "train/loss": 2.0,
        },
        {"step": 5, "train/loss": 1.0, "train/class": 1.0},
    ]
    panels = curve_panels(rows)
    assert list(panels) == [
        "train/loss", "train/class", "schedule/momentum", "train/health/entropy", "val/knn_top1", "val/score"
    ]  # fmt: skip
    assert panels["val/knn_top1"] == {"teacher": [(3, 0.5)], "student": [(3, 0.6)]}
    assert panels["train/class"] == {"": [(5, 1.0)]}


def test_picture(tmp_path):
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    for step in range(3):
        MetricsFile(tmp_path, from_step=step).log_metrics({"train/loss": 1 / (step + 1)}, step)
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 100
