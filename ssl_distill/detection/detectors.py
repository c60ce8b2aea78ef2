"""torchvision's two-stage detectors on trained backbones."""

from typing import Any

from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from ssl_distill.detection.backbone import PyramidBackbone, backbone_with_fpn

_ASPECT_RATIOS = (0.5, 1.0, 2.0)


class PyramidFasterRCNN(FasterRCNN):
    """Faster R-CNN whose anchors and normalisation fit the backbone.

    Args:
        path_or_name: As `backbone_with_fpn` takes it.
        num_classes: Background included.
        image_size: Images are resized to a shorter side of so many pixels, but no longer side than five thirds of it.
        anchor_scale: Side of a level's anchors in units of its reduction.
        settings: Further arguments of torchvision's class, in the place of what follows from the backbone too.
        **backbone: Further arguments of `backbone_with_fpn`.
    """

    def __init__(
        self,
        path_or_name: str,
        num_classes: int,
        image_size: int = 800,
        anchor_scale: float = 8.0,
        settings: dict[str, Any] | None = None,
        **backbone: Any,
    ) -> None:
        pyramid = backbone_with_fpn(path_or_name, **backbone)
        super().__init__(pyramid, num_classes, **{**_fitting(pyramid, image_size, anchor_scale), **(settings or {})})


class PyramidMaskRCNN(PyramidFasterRCNN, MaskRCNN):
    """Mask R-CNN whose anchors and normalisation fit the backbone; arguments are those of `PyramidFasterRCNN`."""


def _fitting(pyramid: PyramidBackbone, image_size: int, anchor_scale: float) -> dict[str, Any]:
    if anchor_scale <= 0:
        raise ValueError(f"`anchor_scale` must be positive, got {anchor_scale}.")
    sizes = tuple((round(anchor_scale * reduction),) for reduction in pyramid.reductions)
    return {
        "min_size": image_size,
        "max_size": image_size * 5 // 3,
        "image_mean": pyramid.image_mean,
        "image_std": pyramid.image_std,
        "rpn_anchor_generator": AnchorGenerator(sizes, (_ASPECT_RATIOS,) * len(sizes)),
    }
