import json
import math

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from ssl_distill.backbones.create import create_backbone
from ssl_distill.data.batch import DenseBatch
from ssl_distill.data.shapes import ShapesData
from ssl_distill.detection.data import CocoBoxes, DetectionData, ShapeScenes
from ssl_distill.detection.dense_probe import DenseLinearProbe
from ssl_distill.detection.detection_probe import DetectionProbe, box_and_mask_average_precision
from ssl_distill.detection.detectors import PyramidFasterRCNN, PyramidMaskRCNN
from ssl_distill.export import export_backbone


def quiet_trainer(folder, **kwargs):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **kwargs,
    )


def scenes(**kwargs):
    options = {
        "num_images": 200,
        "image_size": 32,
        "eval_batch_size": 50,
        "bank_size": 200,
        "query_size": 50,
        "seed": 0,
    }
    return ShapesData("scene", **{**options, **kwargs})


class Seeing(nn.Module):
    """An encoder whose map is the image."""

    num_prefix_tokens = 0

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)

    def forward_features(self, images):
        return self.norm(images * self.scale)

    def forward_head(self, features, pre_logits):
        return features.mean((2, 3))


def painted(count):
    """Batches whose pixels show their own class: red, green or blue in bands."""
    batches = []
    for i in range(count):
        label = torch.randint(0, 3, (8, 4, 1), generator=torch.Generator().manual_seed(i)).repeat_interleave(8, 1)
        label = label.expand(8, 32, 32).clone()
        image = 255 * nn.functional.one_hot(label, 3).permute(0, 3, 1, 2).byte()
        label[:, 0] = 255  # does not count
        batches.append(DenseBatch(image, label, torch.arange(8 * i, 8 * i + 8)))
    return DataLoader(batches, batch_size=None)


def test_dense_probe_reads_a_map(tmp_path):
    """A map that shows the labels is read to the full, one of nothing not; the encoder stays as it is."""
    encoder = Seeing()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    scores = {}
    for kind, prepare in {"image": lambda image: image / 255, "nothing": lambda image: image * 0.0}.items():
        torch.manual_seed(0)
        probe = DenseLinearProbe(encoder, 3, 32, prepare, learning_rate=0.1)
        quiet_trainer(tmp_path, max_epochs=3).fit(probe, painted(10), painted(2))
        scores[kind] = probe.trainer.callback_metrics["dense_probe/miou"].item()
    torch.testing.assert_close(dict(encoder.state_dict()), before, rtol=0, atol=0)
    assert encoder.norm.training
    assert scores["image"] > 0.99
    assert scores["nothing"] < 0.2


def test_dense_probe_takes_transformers(tmp_path):
    data = scenes(num_images=20, bank_size=20, query_size=10, batch_size=10)
    data.setup("fit")
    encoder = create_backbone("vit_nano_patch8_32")
    probe = DenseLinearProbe(encoder, data.num_classes, 32)
    quiet_trainer(tmp_path, max_epochs=1).fit(probe, *data.val_dataloader())
    assert 0 <= probe.trainer.callback_metrics["dense_probe/miou"] <= 1


class BestOverlap(Metric):
    """Stands in for COCO's precision, which needs another package."""

    def __init__(self):
        super().__init__()
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, detections, targets):
        assert all(set(each) == {"boxes", "scores", "labels"} for each in detections)
        assert all(set(each) == {"boxes", "labels"} for each in targets)
        self.images += len(detections)

    def compute(self):
        return {"map": self.images / 10, "map_50": self.images / 5}


FEW = {
    "rpn_pre_nms_top_n_train": 50,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 5,
}


def detector(kind=PyramidFasterRCNN, num_classes=11, **kwargs):
    options = {"image_size": 64, "anchor_scale": 4.0, "settings": FEW, "out_channels": 16, "norm": "train", **kwargs}
    return kind("convnet_nano", num_classes, **options)


def test_detection_probe_runs_its_schedule(tmp_path):
    torch.manual_seed(0)
    data = scenes(image_size=64)
    rates = []

    class Probe(DetectionProbe):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    probe = Probe(detector(), warmup_steps=2, milestones=(0.5,), metric=BestOverlap)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(probe, DetectionData(ShapeScenes(data, 12), ShapeScenes(data, 4, first=200), batch_size=2))
    assert [round(rate / 0.02, 3) for rate in rates] == [0.333, 0.667, 1.0, 0.1, 0.1, 0.1]
    metrics = trainer.callback_metrics
    assert metrics["detection/ap"] == pytest.approx(0.4)
    assert metrics["detection/ap50"] == pytest.approx(0.8)
    assert math.isfinite(metrics["detection/loss_classifier"])


class TwoBoxes(nn.Module):
    """A detector that knows two boxes."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [10.0 + self.shift, 10.0, 20.0 + self.shift, 20.0]])
        found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([1, 1])}
        return [found for _ in images]


@pytest.mark.parametrize(
    ("shift", "ap", "ap50"),
    [
        (0.0, 1.0, 1.0),
        # IoU 3 / 5: right for the thresholds 0.5 and 0.55. Above, the better half of the recalls remains: 51 of 101.
        (2.5, (2 + 8 * 51 / 101) / 10, 1.0),
        (9.0, 51 / 101, 51 / 101),
    ],
)
def test_average_precision(shift, ap, ap50, tmp_path):
    """Of two boxes of one class, the first found exactly, the other shifted sideways."""
    pytest.importorskip("pycocotools")
    probe = DetectionProbe(TwoBoxes(shift))
    target = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0], [10.0, 10.0, 20.0, 20.0]]), "labels": torch.tensor([1, 1])}
    loader = DataLoader([([torch.zeros(3, 32, 32)] * 2, [target] * 2)] * 2, batch_size=None)
    quiet_trainer(tmp_path).validate(probe, loader, verbose=False)
    metrics = probe.trainer.callback_metrics
    assert metrics["detection/ap"] == pytest.approx(ap, abs=1e-5)
    assert metrics["detection/ap50"] == pytest.approx(ap50, abs=1e-5)
    assert probe.detector.seen == 4


class Copies(nn.Module):
    """A detector that answers with given boxes and masks."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images):
        return [next(self.answers) for _ in images]


def test_average_precision_of_masks(tmp_path):
    """Boxes are right; the masks of every second scene are as large as their boxes."""
    pytest.importorskip("pycocotools")
    few = ShapeScenes(scenes(image_size=64), 6)
    answers = []
    for i, (_, target) in enumerate(few):
        masks = target["masks"][:, None].float()
        if i % 2:
            for mask, (left, top, right, bottom) in zip(masks, target["boxes"].long().tolist(), strict=True):
                mask[0, top:bottom, left:right] = 1
        answers.append({**target, "masks": masks * 0.8, "scores": torch.ones(len(masks))})
    probe = DetectionProbe(Copies(answers), metric=box_and_mask_average_precision)
    quiet_trainer(tmp_path).validate(probe, DetectionData(few, few, batch_size=2).val_dataloader(), verbose=False)
    metrics = probe.trainer.callback_metrics
    assert metrics["detection/ap"] == pytest.approx(1.0)
    assert 0.3 < metrics["detection/mask_ap"] < metrics["detection/mask_ap50"] <= 1.0


def test_detectors_fit_their_backbone(tmp_path):
    """Normalisation, anchors by level, and masks."""
    path = tmp_path / "backbone.safetensors"
    export_backbone(create_backbone("convnet_nano"), path, {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]})
    found = PyramidMaskRCNN(str(path), 3, image_size=64, settings=FEW, out_channels=8, levels=[4, 8])
    assert (found.transform.image_mean, found.transform.image_std) == ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    assert (found.transform.min_size, found.transform.max_size) == ((64,), 106)
    assert found.rpn.anchor_generator.sizes == ((32,), (64,), (128,))
    detections = found.eval()([torch.rand(3, 64, 64)])[0]
    assert {"boxes", "labels", "scores", "masks"} == set(detections)
    image, target = ShapeScenes(scenes(image_size=64), 1)[0]
    losses = found.train()([image], [target | {"labels": target["labels"].clamp(max=2)}])
    assert losses["loss_mask"].isfinite()


def test_scenes():
    data = scenes()
    for image, target in ShapeScenes(data, 20):
        assert image.shape == (3, 32, 32)
        assert image.max() <= 1
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) > 0
        assert target["labels"].min() >= 1
        assert target["labels"].max() <= 10
        for box, mask in zip(target["boxes"].long(), target["masks"], strict=True):
            left, top, right, bottom = box.tolist()
            assert mask.sum() == mask[top:bottom, left:right].sum() > 0
    assert torch.equal(ShapeScenes(data, 1, first=7)[0][0], data.sample(7).image / 255)


def coco_json(folder, **changes):
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}],
        "categories": [{"id": 30, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"image_id": 7, "category_id": 30, "bbox": [2, 3, 10, 5]},
            {"image_id": 7, "category_id": 4, "bbox": [4, 4, 4, 4], "segmentation": [[4, 4, 8, 4, 8, 8, 4, 8]]},
            {"image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
        **changes,
    }
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder / "boxes.json"


def test_coco(tmp_path):
    """Any numbers of categories; crowds are left out; masks where there are, else boxes."""
    examples = CocoBoxes(tmp_path, coco_json(tmp_path))
    assert examples.class_names == ("background", "cat", "dog")
    image, target = examples[0]
    assert image.shape == (3, 20, 30)
    torch.testing.assert_close(target["boxes"], torch.tensor([[2.0, 3.0, 12.0, 8.0], [4.0, 4.0, 8.0, 8.0]]))
    assert target["labels"].tolist() == [2, 1]
    assert target["masks"].shape == (2, 20, 30)
    assert target["masks"][0].sum() == 50
    assert 16 <= target["masks"][1].sum() <= 25  # PIL draws the pixels on a polygon's edge too


def test_detection_probe_on_coco(tmp_path):
    pytest.importorskip("pycocotools")
    examples = CocoBoxes(tmp_path, coco_json(tmp_path))
    probe = DetectionProbe(detector(num_classes=3), warmup_steps=0)
    quiet_trainer(tmp_path, max_epochs=1).fit(probe, DetectionData(examples, examples, batch_size=1))
    assert 0 <= probe.trainer.callback_metrics["detection/ap"] <= 1


def test_an_image_without_objects(tmp_path):
    more = [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}]
    more.append({"id": 8, "file_name": "a.png", "height": 20, "width": 30})
    examples = CocoBoxes(tmp_path, coco_json(tmp_path, images=more))
    image, target = examples[1]
    assert [tuple(value.shape) for value in target.values()] == [(0, 4), (0,), (0, 20, 30)]
    losses = detector(num_classes=3)([image], [target])
    assert all(loss.isfinite() for loss in losses.values())


def test_errors(tmp_path, unchecked):
    encoder = create_backbone("convnet_nano")
    with pytest.raises(ValueError, match="`num_classes` must be at least 2, background included, got 1"):
        DenseLinearProbe(encoder, 1, 32)
    with pytest.raises(ValueError, match="`milestones` must be shares of the run between 0 and 1"):
        DetectionProbe(encoder, milestones=(1.5,), metric=BestOverlap)
    with pytest.raises(ValueError, match=r"`annotations` .*none\.json does not exist"):
        CocoBoxes(tmp_path, tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json .*`images`, got None"):
        CocoBoxes(tmp_path, tmp_path / "other.json")
    with pytest.raises(ValueError, match="must give every object a `category_id` of its categories"):
        CocoBoxes(tmp_path, coco_json(tmp_path, categories=[]))
    with pytest.raises(ValueError, match="`data` must have the mode scene, whose pictures have boxes, got single"):
        ShapeScenes(ShapesData(), 1)
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        ShapeScenes(scenes(), 0)
    coco = CocoBoxes(tmp_path, coco_json(tmp_path))
    with pytest.raises(ValueError, match="`val` must have the classes of `train`"):
        DetectionData(coco, ShapeScenes(scenes(), 1), batch_size=1)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        DetectionData(coco, coco, batch_size=0)
    with pytest.raises(ValueError, match="`anchor_scale` must be positive, got 0"):
        detector(anchor_scale=0)
