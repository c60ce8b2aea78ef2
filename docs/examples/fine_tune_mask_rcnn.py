"""Fine-tune Mask R-CNN from an exported backbone, on generated scenes or on any COCO-style json.

Run: python docs/examples/fine_tune_mask_rcnn.py runs/pcd_fashion_collages/backbone.safetensors
     python docs/examples/fine_tune_mask_rcnn.py backbone.safetensors --coco IMAGES TRAIN.json IMAGES VAL.json
Needs: pip install 'ssl-distill[detection]'
"""

import argparse
from collections.abc import Sequence

import lightning.pytorch as pl

from ssl_distill.data.shapes import ShapesData
from ssl_distill.detection.data import CocoBoxes, DetectionData, ShapeScenes
from ssl_distill.detection.detection_probe import DetectionProbe, box_and_mask_average_precision
from ssl_distill.detection.detectors import PyramidMaskRCNN

# Small pictures of few objects: the usual numbers of proposals would cost most of the time.
FEW_PROPOSALS = {
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_test": 50,
    "box_batch_size_per_image": 32,
    "box_detections_per_img": 10,
}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="exported by ssl-distill, or a timm name for random weights")
    parser.add_argument("--coco", nargs=4, metavar=("IMAGES", "JSON", "VAL_IMAGES", "VAL_JSON"))
    parser.add_argument("--size", type=int, default=64, help="shorter side of the images in pixels")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--val-images", type=int, default=200, help="generated scenes to measure on")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    pl.seed_everything(given.seed, verbose=False)

    if given.coco:
        images, annotations, val_images, val_annotations = given.coco
        train, val = CocoBoxes(images, annotations), CocoBoxes(val_images, val_annotations)
        detector = PyramidMaskRCNN(given.backbone, len(train.class_names), given.size)
    else:
        scenes = ShapesData("scene", image_size=given.size, seed=given.seed)
        train, val = ShapeScenes(scenes, 2000), ShapeScenes(scenes, given.val_images, first=10_000)
        kwargs = {"settings": FEW_PROPOSALS, "out_channels": 32, "norm": "train"}
        detector = PyramidMaskRCNN(given.backbone, len(train.class_names), given.size, anchor_scale=4.0, **kwargs)
    probe = DetectionProbe(detector, metric=box_and_mask_average_precision)
    trainer = pl.Trainer(
        max_steps=given.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = DetectionData(train, val, given.batch_size)
    trainer.fit(probe, data.train_dataloader())
    (scores,) = pl.Trainer(logger=False).validate(probe, data.val_dataloader())
    return scores


if __name__ == "__main__":
    main()
