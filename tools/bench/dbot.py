"""Time of a dBOT step whose encoder drops hidden patches, against the same step with an encoder that sees all.

Run: python tools/bench/dbot.py [--tiny] [--steps 20]
Protocol: fixed random images; the encoder alone, forward and backward; then the whole step: teacher and student
forward, loss, backward, gradient clipping, AdamW. Without dropping, the encoder computes on all patches and the decoder
gets the same quarter of its tokens. CPU time, one process, sides alternate, medians, first turn of each side left out.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import paired_times, ratio, spread

from ssl_distill.augment.masked_image import divide_patches
from ssl_distill.backbones.create import create_backbone, embed_dim_of
from ssl_distill.backbones.feature_teacher import StagedFeatures
from ssl_distill.backbones.vit import Tokens
from ssl_distill.heads.decoder import FeatureDecoder, class_and_patches
from ssl_distill.heads.masked_student import MaskedStudent
from ssl_distill.losses.masked_feature import smooth_l1, standardize
from ssl_distill.methods.dbot import dbot_adamw
from ssl_distill.optim.parameters import decay_groups

CASES: dict[str, dict[str, Any]] = {
    "vit_base/16": {
        "name": "vit_base_patch16_224",
        "size": 224,
        "batch": 8,
        "decoder": {"decoder_dim": 512, "depth": 8, "num_heads": 16},
    },
    "vit_micro/4": {
        "name": "vit_micro_patch4_32",
        "size": 32,
        "batch": 64,
        "decoder": {"decoder_dim": 64, "depth": 2, "num_heads": 4},
    },
}


def work_of(case: dict[str, Any], drop: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """The encoder alone, and the whole step, on random images."""
    torch.manual_seed(0)
    encoder: Any = create_backbone(case["name"])
    width, grid = embed_dim_of(encoder), encoder.patch_embed.grid_size
    student = MaskedStudent(encoder, FeatureDecoder(width, width, grid, **case["decoder"]))
    copy: Any = create_backbone(case["name"])
    teacher = StagedFeatures(copy, len(copy.blocks))
    teacher.follow(student.backbone, len(copy.blocks))
    optimizer = dbot_adamw(decay_groups(student))
    for group in optimizer.param_groups:
        group.update(lr=1e-4, weight_decay=0.05 if group["decayed"] else 0.0)
    images = torch.randn(case["batch"], 3, case["size"], case["size"])
    kept, hidden = divide_patches(torch.rand(case["batch"], grid[0] * grid[1]), 0.75)

    def visible() -> Tokens:
        if drop:
            return student.backbone.tokens(images, keep=kept)
        class_token, *_ = tokens = student.backbone.tokens(images)
        return Tokens(class_token, class_and_patches(tokens, kept)[:, 1:])

    def encode() -> None:
        torch.cat(visible(), dim=1).square().mean().backward()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        targets = standardize(class_and_patches(teacher(images), hidden))
        smooth_l1(student.decoder(visible(), kept, hidden), targets).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return encode, step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="ViT of width 128 on 32 px instead of ViT-B/16")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "vit_micro/4" if arguments.tiny else "vit_base/16"
    dropping, seeing_all = (work_of(CASES[name], drop) for drop in (True, False))
    print(f"dBOT, {name}, batch {CASES[name]['batch']}, n = {arguments.steps}")
    print(f"{'':22}{'median s':>10}{'min':>10}{'max':>10}")
    for part, fast, slow in zip(("encoder", "step"), dropping, seeing_all, strict=True):
        times = paired_times({"dropping": fast, "seeing all": slow}, arguments.steps)
        for side, seconds in times.items():
            print(f"{part:9}{side:13}{spread(seconds)}")
        print(f"dropping 75 % of the patches: {part} {ratio(*reversed(times.values())):.2f}x as fast")


if __name__ == "__main__":
    main()
