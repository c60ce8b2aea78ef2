"""Time of a training step under Lightning's Trainer, against the same step in a plain loop.

Run: python tools/bench/trainer.py [--steps 100] [--rounds 5]
Protocol: `DINO` with a tiny ViT, 2 crops of 32 px, batch 64, generated shapes, the command's callbacks that run in
every step (teacher, schedules, last layer, health, throughput); no evaluation, checkpoint or logger. The plain loop
takes the same batches through the same augmentation, method, optimiser and teacher's update.
Times: CPU seconds per step, one process, one thread, sides alternate, medians. Each run makes one step more than the
counted ones, which both sides leave out.
"""

import argparse
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from measure import ratio, spread

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.callbacks.ema_teacher import ema_update
from ssl_distill.callbacks.health import Health
from ssl_distill.callbacks.throughput import Throughput
from ssl_distill.data.batch import ImageBatch
from ssl_distill.data.shapes import ShapesData
from ssl_distill.draws import Draws
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.methods.dino import DINO
from ssl_distill.optim.parameters import adamw, clip_each_tensor, decay_groups

BATCH = 64


class Clock(Callback):
    """CPU seconds from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.start = self.end = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        self.end = time.process_time()
        if batch_idx == 0:
            self.start = self.end


def method() -> DINO:
    """The same method for both sides."""
    seed_everything(0, verbose=False)
    augment = MultiCropAugment(global_size=32, num_local=0)
    return DINO("vit_nano_patch8_32", num_prototypes=1024, augment=augment)


def under_trainer(data: ShapesData, steps: int) -> float:
    """CPU seconds per step."""
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps + 1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        callbacks=[Health(), Throughput(), clock],
    )
    trainer.fit(method(), data)
    return (clock.end - clock.start) / steps


def plain_loop(data: ShapesData, steps: int) -> float:
    """CPU seconds per step."""
    dino = method()
    data.setup("fit")
    optimizer = adamw(decay_groups(dino.student))
    for group in optimizer.param_groups:
        group.update(lr=1e-4, weight_decay=0.04 if group["decayed"] else 0.0)
    batches = iter(data.train_dataloader())
    start = 0.0
    for step in range(steps + 1):
        batch: ImageBatch = next(batches)
        views = dino.augment(batch, Draws(0, 0))
        logits = dino.teacher([views.global_crops])
        targets = dino.targets(logits, 0.04)
        dino.targets.observe(logits)
        loss = cross_view_entropy(targets, dino.student.logits(dino.student.features(views)), 0.1)
        loss.backward()
        clip_each_tensor(dino.student.parameters(), 3.0)
        dino.targets.update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema_update(dino.student, dino.teacher, 0.996)
        if step == 0:
            start = time.process_time()
    return (time.process_time() - start) / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    data = ShapesData(num_images=(arguments.steps + 1) * BATCH, batch_size=BATCH, bank_size=10, query_size=10)
    sides = {"Trainer": under_trainer, "plain loop": plain_loop}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            times[name].append(side(data, arguments.steps))
    print(f"DINO step, tiny ViT, batch {BATCH}, {arguments.steps} steps a run, n = {arguments.rounds}")
    print(f"{'s per step':12}{'median':>10}{'min':>10}{'max':>10}")
    for name, seconds in times.items():
        print(f"{name:12}{spread(seconds)}")
    print(f"the Trainer takes {ratio(times['Trainer'], times['plain loop']):.3f}x the time")


if __name__ == "__main__":
    main()
