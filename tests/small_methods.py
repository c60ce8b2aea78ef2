"""Methods on tiny networks and 32 px, for tests."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ssl_distill.augment.aligned_crop import AlignedCropAugment
from ssl_distill.augment.masked_crop import MaskedCropAugment
from ssl_distill.augment.masked_image import MaskedImageAugment
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.projection_teacher import ProjectionTeacher
from ssl_distill.heads.decoder import FeatureDecoder
from ssl_distill.heads.dense import DenseProjection
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.heads.t_head import THead
from ssl_distill.heads.token import SeparateTokenHead, TokenHead
from ssl_distill.lidar.point_evaluation import PointEvaluation
from ssl_distill.lidar.teachers import PatchStats
from ssl_distill.lidar.waffleiron import WaffleIron
from ssl_distill.methods.dbot import DBOT
from ssl_distill.methods.dino import DINO
from ssl_distill.methods.ibot import IBOT
from ssl_distill.methods.mokd import MOKD, Learner
from ssl_distill.methods.odis import ODIS
from ssl_distill.methods.pcd import PCD
from ssl_distill.methods.scalr import ScaLR
from ssl_distill.methods.udi import UDI
from ssl_distill.optim.parameters import adamw
from ssl_distill.optim.schedules import Cosine, EpochCosine, EpochRamp


def prototype_head(in_dim, num_prototypes):
    return PrototypeHead(in_dim, num_prototypes, hidden_dim=32, bottleneck_dim=16)


def token_head(in_dim, num_prototypes):
    return TokenHead(in_dim, num_prototypes, hidden_dim=32, bottleneck_dim=16)


def separate_token_head(in_dim, num_prototypes):
    return SeparateTokenHead(in_dim, num_prototypes, num_patch_prototypes=24, hidden_dim=32, bottleneck_dim=16)


def small_crops(**kwargs):
    sizes = {"global_size": 32, "local_size": 16, "num_local": 2, "global_scale": (0.25, 1.0)}
    return MultiCropAugment(**{**sizes, **kwargs})


def aligned_crops(**kwargs):
    options = {"global_size": 32, "local_size": 16, "num_local": 2, "patch_size": 8}
    return AlignedCropAugment(**{**options, "global_window": 2, "local_window": 1, **kwargs})


def small(kind, **kwargs):
    options = {
        "backbone": "vit_nano_patch8_32",
        "num_prototypes": 32,
        "head": token_head,
        "learning_rate": Cosine(1e-3, 1e-5, warmup_epochs=1),
        "momentum": Cosine(0.9, 1.0),
    }
    return kind(**{**options, **kwargs})


def small_dino(**kwargs):
    return small(DINO, **{"head": prototype_head, "augment": small_crops(), **kwargs})


def small_ibot(**kwargs):
    return small(IBOT, **{"augment": MaskedCropAugment(small_crops(), patch_size=8), **kwargs})


def small_odis(**kwargs):
    return small(ODIS, **{"augment": ObjectCropAugment(small_crops(), patch_size=8), **kwargs})


def small_udi(**kwargs):
    return small(UDI, **{"augment": aligned_crops(), **kwargs})


def small_decoder(embed_dim, target_dim, grid, drop_path_rate):
    return FeatureDecoder(embed_dim, target_dim, grid, drop_path_rate, decoder_dim=16, depth=1, num_heads=2)


def small_dbot(**kwargs):
    options = {
        "backbone": "vit_nano_patch8_32",
        "decoder": small_decoder,
        "stage_starts": (0, 1),
        "initial_teacher_depth": 1,
        "augment": MaskedImageAugment(global_size=32, patch_size=8),
        "learning_rate": EpochCosine(1e-3, 0.0, warmup_epochs=0.5),
        "reference_batch": None,
    }
    return DBOT(**{**options, **kwargs})


def small_learner(name, backbone, **kwargs):
    return Learner(
        name,
        backbone,
        head=partial(PrototypeHead, hidden_dim=32, bottleneck_dim=16, norm=nn.BatchNorm1d),
        token_head=partial(THead, embed_dim=64, depth=1, num_heads=2),
        learning_rate=Cosine(2e-3, 1e-5),
        teacher_temperature=EpochRamp(0.04, 0.07, epochs=50),
        **kwargs,
    )


def small_mokd(first="convnet_nano", second="vit_nano_patch8_32", num_local=2, **kwargs):
    return MOKD(
        small_learner("first", first),
        small_learner("second", second, cross_weight=0.5),
        num_prototypes=32,
        augment=MultiCropAugment(global_size=32, local_size=16, num_local=num_local),
        reference_batch=None,
        **kwargs,
    )


NO_BATCH_NORM = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "output_stride": 16}


def small_mokd_without_batch_norm(drop_path_rate=0.1):
    """A ConvNet and a ViT without batch norm, whose statistics ranks do not share on CPUs."""
    head = partial(PrototypeHead, hidden_dim=32, bottleneck_dim=16)
    common = {"head": head, "drop_path_rate": drop_path_rate, "learning_rate": Cosine(1e-3, 1e-5, warmup_epochs=1)}
    first = replace(small_learner("cnn", "convnext_atto"), backbone_kwargs=NO_BATCH_NORM, **common)
    return MOKD(
        first,
        replace(small_learner("vit", "vit_nano_patch8_32"), **common),
        num_prototypes=32,
        augment=MultiCropAugment(global_size=32, local_size=16, num_local=2),
        reference_batch=None,
        momentum=Cosine(0.9, 1.0),
    )


def dense_head(in_dim, out_dim):
    return DenseProjection(in_dim, out_dim, hidden_dim=32)


def small_teacher(backbone="convnet_nano", seed=5):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(128, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    return ProjectionTeacher(create_backbone(backbone), head)


def small_pcd(**kwargs):
    defaults = {
        "teacher": small_teacher(),
        "backbone": "convnet_nano",
        "head": dense_head,
        "queue_size": 50,
        "augment": TwoViewAugment(32),
        "optimizer": adamw,
        "learning_rate": Cosine(1e-3, 1e-3),
        "reference_batch": None,
    }
    return PCD(**{**defaults, **kwargs})


GRIDS = ((64, 64), (64, 24), (64, 24))  # those of the street


def small_scalr(drop_path_rate=0.0, **kwargs):
    defaults = {
        "backbone": WaffleIron(GRIDS, 8, 2, drop_path_rate=drop_path_rate),
        "teacher": PatchStats(),
        "learning_rate": Cosine(2e-3, 2e-3),
        "evaluation": PointEvaluation(steps=50, points_per_step=512, calibration_batches=2),
    }
    return ScaLR(**{**defaults, **kwargs})
