"""Time and peak memory of a DINO step against lightly's loss and head around the same timm ViT in a plain loop.

Run: python tools/bench/step.py [--tiny] [--steps 20]        needs: pip install lightly
Protocol: fixed random crops; teacher and student forward, loss, center, backward, gradient clipping, AdamW, EMA.
Times: one process, sides alternate, medians over the steps, first step of each side left out.
Both heads have their libraries' default widths: hidden 2,048, bottleneck 256.
Memory: peak resident size of a process that runs one side only, minus its size before the first step (Linux only).
"""

import argparse
import copy
from collections.abc import Callable

import torch
from measure import added_peak_mib, paired_times, ratio, spread
from torch import Tensor

from ssl_distill.backbones.create import create_backbone, embed_dim_of
from ssl_distill.callbacks.ema_teacher import ema_update
from ssl_distill.heads.network import Network
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.optim.parameters import adamw, clip_each_tensor, decay_groups
from ssl_distill.targets.center import Center

CASES = {
    "vit_tiny/4": {
        "vit": {"img_size": 32, "patch_size": 4},
        "name": "vit_tiny_patch16_224",
        "batch": 32,
        "crops": [(2, 32), (6, 16)],
        "K": 65536,
    },
    "tiny": {
        "vit": {},
        "name": "vit_nano_patch8_32",
        "batch": 64,
        "crops": [(2, 32), (2, 16)],
        "K": 1024,
    },
}


def backbone_of(case: dict) -> torch.nn.Module:
    """The same timm ViT for both sides."""
    return create_backbone(case["name"], **case["vit"])


def crops_of(case: dict) -> list[Tensor]:
    """One stack of crops per resolution."""
    return [torch.randn(views, case["batch"], 3, size, size) for views, size in case["crops"]]


def our_step(case: dict) -> Callable[[], float]:
    """A step built from this package's parts."""
    torch.manual_seed(0)
    backbone = backbone_of(case)
    student = Network(backbone, PrototypeHead(embed_dim_of(backbone), case["K"]))
    teacher = copy.deepcopy(student).requires_grad_(False)
    center, optimizer = Center(case["K"]), adamw(decay_groups(student))
    for group in optimizer.param_groups:
        group.update(lr=1e-4, weight_decay=0.04 if group["decayed"] else 0.0)
    stacks = crops_of(case)

    def step() -> float:
        with torch.no_grad():
            teacher_logits = teacher(stacks[:1])
            targets = center(teacher_logits, 0.04)
            center.observe(teacher_logits)
        loss = cross_view_entropy(targets, student(stacks), 0.1)
        loss.backward()
        center.update()
        clip_each_tensor(student.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema_update(student, teacher, 0.996)
        return loss.item()

    return step


def lightly_step(case: dict) -> Callable[[], float]:
    """The same step as lightly's DINO example writes it, views one by one."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum

    torch.manual_seed(0)
    backbone = backbone_of(case)
    head, teacher_head = (  # its weight norm cannot be copied
        DINOProjectionHead(embed_dim_of(backbone), 2048, 256, case["K"], freeze_last_layer=0) for _ in range(2)
    )
    teacher_head.load_state_dict(head.state_dict())
    teacher_backbone = copy.deepcopy(backbone)
    for module in (teacher_backbone, teacher_head):
        module.requires_grad_(False)
    criterion = DINOLoss(case["K"], warmup_teacher_temp_epochs=0)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4, weight_decay=0.04)
    views = [view for stack in crops_of(case) for view in stack]

    def step() -> float:
        update_momentum(backbone, teacher_backbone, 0.996)
        update_momentum(head, teacher_head, 0.996)
        with torch.no_grad():
            teacher_out = [teacher_head(teacher_backbone(view)) for view in views[:2]]
        student_out = [head(backbone(view)) for view in views]
        loss = criterion(teacher_out, student_out, epoch=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


SIDES = {"ours": our_step, "lightly": lightly_step}


def three_steps(side: str, case: dict) -> Callable[[], object]:
    """What memory is measured of: the second step meets the optimiser's state."""
    step = SIDES[side](case)
    return lambda: [step() for _ in range(3)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="tiny ViT, 2+2 crops, K 1,024 instead of ViT-Ti/4, 2+6, K 65,536"
    )
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "tiny" if arguments.tiny else "vit_tiny/4"
    case = CASES[name]

    memory = {side: added_peak_mib(three_steps, side, case) for side in SIDES}
    steps = {side: make(case) for side, make in SIDES.items()}
    first_loss = {side: step() for side, step in steps.items()}
    times = paired_times(steps, arguments.steps)

    print(f"DINO step, {name}, batch {case['batch']}, crops {case['crops']}, K {case['K']}, n = {arguments.steps}")
    print(f"{'':10}{'median s':>10}{'min':>10}{'max':>10}{'peak MiB':>10}{'first loss':>12}")
    for side, seconds in times.items():
        print(f"{side:10}{spread(seconds)}{memory[side]:10.0f}{first_loss[side]:12.4f}")
    faster = ratio(times["lightly"], times["ours"])
    print(f"ours is {faster:.2f}x as fast, with {memory['ours'] / memory['lightly']:.2f}x the peak memory")


if __name__ == "__main__":
    main()
