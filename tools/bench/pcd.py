"""Time and peak memory of PCD's chunked contrastive loss against the same loss in one piece.

Run: python tools/bench/pcd.py [--maps 64 8] [--queue 65536] [--rounds 3]
Protocol: forward and backward over random maps of 7 x 7 pixels with 256 channels, one thread, float32.
Time: one process, sides alternate, medians over the rounds, one round before them is left out.
Memory: peak resident size of a process that runs one side only, minus its size before the first pass.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import added_peak_mib, paired_times, ratio, spread
from torch import Tensor

from ssl_distill.losses.pixel_contrast import pixel_contrast

CHANNELS = 256
PIXELS = 49
TEMPERATURE = 0.2


def dense(students: Tensor, teachers: Tensor, negatives: Tensor) -> Tensor:
    """All logits at once, gradient by autograd."""
    student, teacher = F.normalize(students, dim=1), F.normalize(teachers, dim=1)
    positive = (student * teacher).sum(1, keepdim=True)
    logits = torch.cat([positive, student @ negatives.T], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def chunked(students: Tensor, teachers: Tensor, negatives: Tensor) -> Tensor:
    """Ours."""
    return pixel_contrast(students, teachers, negatives, TEMPERATURE)


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"dense": dense, "chunked": chunked}


def inputs(num_maps: int, queue_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student pixels, teacher pixels, negatives."""
    torch.manual_seed(0)
    students, teachers = torch.randn(2, num_maps * PIXELS, CHANNELS)
    negatives = torch.randn(queue_size, CHANNELS)
    negatives /= negatives.norm(dim=1, keepdim=True)  # in place: a temporary would raise the peak beforehand
    return students.requires_grad_(), teachers, negatives


def once(side: str, students: Tensor, teachers: Tensor, negatives: Tensor) -> float:
    """One forward and backward pass."""
    students.grad = None
    loss = SIDES[side](students, teachers, negatives)
    loss.backward()
    return loss.item()


def one_pass(side: str, num_maps: int, queue_size: int) -> Callable[[], object]:
    """What memory is measured of."""
    once(side, *inputs(1, 64))  # libraries that are loaded at the first pass
    return partial(once, side, *inputs(num_maps, queue_size))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, nargs="+", default=[64, 8], help="numbers of maps")
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    memory = {(n, side): added_peak_mib(one_pass, side, n, arguments.queue) for n in arguments.maps for side in SIDES}
    print(f"pixel contrast, {PIXELS} pixels per map, {CHANNELS} channels, {arguments.queue} negatives")
    print(
        f"{'maps':>5} {'':8}{'median s':>10}{'min':>10}{'max':>10}{'peak MiB':>10}{'loss':>10}   n = {arguments.rounds}"
    )
    for num_maps in arguments.maps:
        tensors = inputs(num_maps, arguments.queue)
        losses = {side: once(side, *tensors) for side in SIDES}
        times = paired_times({side: partial(once, side, *tensors) for side in SIDES}, arguments.rounds)
        for side, seconds in times.items():
            print(f"{num_maps:5} {side:8}{spread(seconds)}{memory[num_maps, side]:10.0f}{losses[side]:10.4f}")
        print(f"{num_maps:5} chunked is {ratio(times['dense'], times['chunked']):.2f}x as fast")


if __name__ == "__main__":
    main()
