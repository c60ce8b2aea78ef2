"""Time and peak memory of a MOKD step against a DINO step of each of its two networks on the same crops.

Run: python tools/bench/mokd.py [--large] [--steps 20]
Protocol: fixed random crops; teachers and students forward, losses, centers, backward, gradient clipping, AdamW, EMA.
MOKD trains two heads per model, DINO one, which is MOKD's first: the ratio is what the token heads, the feature search
and the cross-distillation cost beside two separate runs. One process, one thread, sides alternate, medians over the
steps, first step of each side left out. Memory: peak resident size of a process that runs one side only, minus its size
before the first step (Linux only).
"""

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from measure import added_peak_mib, paired_times, ratio, spread

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.callbacks.ema_teacher import ema_update
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.heads.t_head import THead
from ssl_distill.methods.dino import DINO
from ssl_distill.methods.mokd import MOKD, Learner
from ssl_distill.optim.parameters import clip_each_tensor
from ssl_distill.views import MultiCrop

CASES: dict[str, dict[str, Any]] = {
    "small": {
        "backbones": {"cnn": "convnet_nano", "vit": "vit_nano_patch8_32"},
        "batch": 64,
        "crops": [(2, 32), (2, 16)],
        "K": 1024,
        "head": {"hidden_dim": 256, "bottleneck_dim": 64},
        "token_head": {"embed_dim": 64, "depth": 1, "num_heads": 4},
    },
    "large": {
        "backbones": {"cnn": "resnet18", "vit": "vit_tiny_patch16_224"},
        "batch": 4,
        "crops": [(2, 224), (4, 96)],
        "K": 16384,
        "head": {},
        "token_head": {"embed_dim": 192, "num_heads": 3},
    },
}


def mokd_step(case: dict[str, Any]) -> Callable[[], float]:
    """A step of both models together."""
    head, token_head = partial(PrototypeHead, **case["head"]), partial(THead, **case["token_head"])
    first, second = (
        Learner(name, backbone, head=head, token_head=token_head) for name, backbone in case["backbones"].items()
    )
    return step_of(MOKD(first, second, num_prototypes=case["K"], augment=augment_of(case)), case)


def dino_steps(case: dict[str, Any]) -> Callable[[], float]:
    """A step of each of two separate runs."""
    head = partial(PrototypeHead, **case["head"])
    steps = [
        step_of(DINO(backbone, num_prototypes=case["K"], head=head, augment=augment_of(case)), case)
        for backbone in case["backbones"].values()
    ]
    return lambda: sum(step() for step in steps)


def augment_of(case: dict[str, Any]) -> MultiCropAugment:
    """Only its sizes matter here."""
    (_, global_size), (num_local, local_size) = case["crops"]
    return MultiCropAugment(global_size, local_size, num_local)


def step_of(method: Any, case: dict[str, Any]) -> Callable[[], float]:
    """A training step of a method, without a trainer."""
    torch.manual_seed(0)
    views = MultiCrop(*(torch.randn(count, case["batch"], 3, size, size) for count, size in case["crops"]))
    optimizer = method.configure_optimizers()
    for group in optimizer.param_groups:
        group.update(lr=1e-4, weight_decay=0.04 if group["decayed"] else 0.0)
    method.trainer = SimpleNamespace(  # what schedules and logging ask for
        estimated_stepping_batches=1000,
        num_training_batches=100,
        accumulate_grad_batches=1,
        global_step=0,
        log_every_n_steps=50,
    )

    def step() -> float:
        loss = torch.stack(list(method.losses(views).values())).sum()
        loss.backward()
        clip_each_tensor(method.parameters(), 3.0)
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema_update(method.student, method.teacher, 0.996)
        return loss.item()

    return step


SIDES = {"two DINO": dino_steps, "MOKD": mokd_step}


def two_steps(side: str, case: dict[str, Any]) -> Callable[[], object]:
    """What memory is measured of: the second step meets the optimiser's state."""
    step = SIDES[side](case)
    return lambda: [step() for _ in range(2)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="ResNet-18 and ViT-Ti/16 at 224 px instead of 32 px ones")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "large" if arguments.large else "small"
    case = CASES[name]

    memory = {side: added_peak_mib(two_steps, side, case) for side in SIDES}
    steps = {side: make(case) for side, make in SIDES.items()}
    first_loss = {side: step() for side, step in steps.items()}
    times = paired_times(steps, arguments.steps)

    print(
        f"step, {' + '.join(case['backbones'].values())}, batch {case['batch']}, crops {case['crops']}, K {case['K']}"
    )
    print(f"{'':10}{'median s':>10}{'min':>10}{'max':>10}{'peak MiB':>10}{'first loss':>12}   n = {arguments.steps}")
    for side, seconds in times.items():
        print(f"{side:10}{spread(seconds)}{memory[side]:10.0f}{first_loss[side]:12.4f}")
    slower = ratio(times["MOKD"], times["two DINO"])
    print(f"MOKD takes {slower:.2f}x the time of both, and {memory['MOKD'] / memory['two DINO']:.2f}x the peak memory")


if __name__ == "__main__":
    main()
