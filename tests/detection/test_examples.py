import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from ssl_distill.backbones.create import create_backbone
from ssl_distill.export import export_backbone

SCRIPT = Path(__file__).parents[2] / "docs/examples/fine_tune_mask_rcnn.py"


@pytest.mark.parametrize("data", ["scenes", "coco"])
def test_fine_tune_mask_rcnn(data, tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.chdir(tmp_path)
    export_backbone(create_backbone("convnet_nano"), "backbone.safetensors", {"mean": [0.5] * 3, "std": [0.5] * 3})
    arguments = ["backbone.safetensors", "--steps", "2", "--batch-size", "2", "--val-images", "2"]
    if data == "coco":
        Image.effect_noise((80, 64), 50).convert("RGB").save("a.png")
        images = [{"id": i, "file_name": "a.png", "height": 64, "width": 80} for i in range(2)]
        boxes = [{"image_id": i, "category_id": 5, "bbox": [10, 10, 40, 30]} for i in range(2)]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "noise"}]}
        Path("boxes.json").write_text(json.dumps(content))
        arguments += ["--coco", ".", "boxes.json", ".", "boxes.json"]
    scores = runpy.run_path(str(SCRIPT))["main"](arguments)
    assert set(scores) == {"detection/ap", "detection/ap50", "detection/mask_ap", "detection/mask_ap50"}
    assert all(0 <= value <= 1 for value in scores.values())
