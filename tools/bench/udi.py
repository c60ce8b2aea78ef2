"""Time of a UDI teacher with one pass for the points of all crops, against one pass for global and one for local ones.

Run: python tools/bench/udi.py [--tiny] [--steps 10]
Protocol: fixed random crops and positions; a whole step (teacher and student forward, losses, backward, AdamW). The
naive teacher runs its backbone twice, once per kind of points, as the official code does. CPU time, one process, sides
alternate, medians over the steps, first turn of each side left out.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from measure import paired_times, ratio, spread
from torch import Tensor

from ssl_distill.augment.aligned_crop import AlignedCropAugment
from ssl_distill.augment.stratified import inside_any
from ssl_distill.backbones.create import create_backbone, embed_dim_of
from ssl_distill.data.batch import ImageBatch
from ssl_distill.draws import Draws
from ssl_distill.heads.srs import SampledAttention
from ssl_distill.heads.token import TokenHead
from ssl_distill.heads.unsqueezed import TeacherLevels, UnsqueezedNetwork
from ssl_distill.losses.consolidated import paired_entropy, point_entropy
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.optim.parameters import adamw, decay_groups
from ssl_distill.targets.consolidated import Consolidation
from ssl_distill.views import AlignedCrops

CASES: dict[str, dict[str, Any]] = {
    "vit_small/16": {"name": "vit_small_patch16_224", "batch": 4, "K": 65536, "hidden": 2048, "crops": {}},
    "vit_nano/8": {
        "name": "vit_nano_patch8_32",
        "batch": 64,
        "K": 1024,
        "hidden": 512,
        "crops": {
            "global_size": 32,
            "local_size": 16,
            "num_local": 4,
            "patch_size": 8,
            "global_window": 2,
            "local_window": 1,
        },
    },
}


def in_one_pass(teacher: UnsqueezedNetwork, views: AlignedCrops) -> TeacherLevels:
    """As the method does."""
    return teacher.teach(views.global_crops, views.other, views.local)


def in_two_passes(teacher: UnsqueezedNetwork, views: AlignedCrops) -> TeacherLevels:
    """Points of global crops without those of local ones, then the other way round."""
    no_local = type(views.local)(*(each[:0] for each in views.local))
    no_global = type(views.other)(*(each[:, :, :0] for each in views.other))
    of_global = teacher.teach(views.global_crops, views.other, no_local)
    return of_global._replace(local_points=teacher.teach(views.global_crops, no_global, views.local).local_points)


def step_of(
    case: dict[str, Any], teach: Callable[[UnsqueezedNetwork, AlignedCrops], TeacherLevels]
) -> Callable[[], float]:
    """One step on random crops."""
    torch.manual_seed(0)
    backbone: Any = create_backbone(case["name"], num_class_tokens=2)
    width = embed_dim_of(backbone)
    srs = SampledAttention(width, backbone.blocks[0].attn.num_heads)
    student = UnsqueezedNetwork(backbone, srs, TokenHead(width, case["K"], hidden_dim=case["hidden"]))
    teacher = copy.deepcopy(student).requires_grad_(False)
    consolidation = Consolidation(case["K"])
    optimizer = adamw(decay_groups(student))
    index = torch.arange(case["batch"])
    image = torch.randint(256, (case["batch"], 3, 256, 256), dtype=torch.uint8)
    batch = ImageBatch(image, torch.full((case["batch"], 2), 256.0), index)
    views = AlignedCropAugment(**case["crops"])(batch, Draws(0, 0))
    there = inside_any(views.own)

    def step() -> float:
        with torch.no_grad():
            targets = consolidation(*teach(teacher, views), teacher.prototypes, 0.04)
        levels = student(views.global_crops, views.local_crops, views.own)
        patch_logits: Tensor = student.prototypes(levels.patch_vectors[there])
        loss = cross_view_entropy(targets.class_targets, levels.class_logits, 0.1)
        loss = loss + paired_entropy(targets.plus_global, targets.plus_local, levels.plus_logits, 0.1)
        loss = loss + point_entropy(targets.patch_targets[there], patch_logits, there, 0.1)
        loss.backward()
        consolidation.update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny ViT on 32 px, K 1,024 instead of ViT-S/16, K 65,536")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "vit_nano/8" if arguments.tiny else "vit_small/16"
    sides = {"one pass": in_one_pass, "two passes": in_two_passes}
    steps = {side: step_of(CASES[name], teach) for side, teach in sides.items()}
    losses = {side: step() for side, step in steps.items()}
    times = paired_times(steps, arguments.steps)
    print(f"UDI step, {name}, batch {CASES[name]['batch']}, n = {arguments.steps}")
    print(f"{'':12}{'median s':>10}{'min':>10}{'max':>10}{'first loss':>12}")
    for side, seconds in times.items():
        print(f"{side:12}{spread(seconds)}{losses[side]:12.5f}")
    print(f"one pass is {ratio(times['two passes'], times['one pass']):.2f}x as fast")


if __name__ == "__main__":
    main()
