"""Methods on tiny networks and 32 px, for tests."""

from ssl_distill.augment.aligned_crop import AlignedCropAugment
from ssl_distill.augment.masked_crop import MaskedCropAugment
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.heads.token import SeparateTokenHead, TokenHead
from ssl_distill.methods.dino import DINO
from ssl_distill.methods.ibot import IBOT
from ssl_distill.methods.odis import ODIS
from ssl_distill.methods.udi import UDI
from ssl_distill.optim.schedules import Cosine


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
