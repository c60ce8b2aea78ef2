"""Time and memory of ScaLR's parts against the plain way to do the same.

Run: python tools/bench/scalr.py [--batch 1 4] [--rounds 5]
Protocol: one thread, float32, CPU seconds; sides alternate in one process, a first turn of each is left out, medians
with least and most; ratios are medians of paired quotients. Memory: what one call adds to the peak of a process of its
own. That both sides give the same is checked before.
- read-out: a teacher's 16 x 32 grid of 1,024 channels at 4,000 pixels per picture of 224 x 448, by sampling the grid
  and by upsampling it to the picture first.
- neighbours: 16 nearest of every point, by scipy's tree and by torch's distances in blocks of 1,024 rows.
- preparation: a camera's training sample of a generated street, pictures included.
- step: WaffleIron's forward and backward pass over what cameras see of 4 streets, as it is (ragged clouds, grids cut to
  what is occupied, an index per grid) and dense (padded clouds, whole grids, an index per layer).
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import added_peak_mib, paired_times, ratio, spread
from torch import Tensor

from ssl_distill.draws import Draws
from ssl_distill.lidar.batch import PointBatch, pad_clouds
from ssl_distill.lidar.grids import GridIndex
from ssl_distill.lidar.preparation import Preparation, nearest_neighbors
from ssl_distill.lidar.read_out import read_out
from ssl_distill.lidar.samples import PairedSamples, sample_draws
from ssl_distill.lidar.street import render_scene
from ssl_distill.lidar.street_data import SynthStreetData
from ssl_distill.lidar.waffleiron import WaffleIron

IMAGE_SIZE, PATCH = (224, 448), 14
CHANNELS, PAIRS = 1024, 4000
NEIGHBORS = 16
Work = Callable[[], object]


def compare(title: str, slow: str, fast: str, sides: dict[str, Work], rounds: int, memory: dict[str, float]) -> None:
    """Print times of two sides, their ratio, and their memory."""
    times = paired_times(sides, rounds)
    print(f"\n{title}, n = {rounds}")
    for name in sides:
        peak = f"{memory[name]:10.0f} MiB" if name in memory else ""
        print(f"  {name:12}{spread(times[name])} s{peak}")
    more = f", {memory[slow] / max(memory[fast], 1e-9):.1f}x less memory" if memory else ""
    print(f"  {fast} is {ratio(times[slow], times[fast]):.2f}x as fast as {slow}{more}")


def sampled(tokens: Tensor, pixels: Tensor) -> Tensor:
    """Ours."""
    return read_out(tokens, pixels, IMAGE_SIZE)


def upsampled(tokens: Tensor, pixels: Tensor) -> Tensor:
    """A feature for every pixel, then those that are asked for."""
    features = F.interpolate(tokens, IMAGE_SIZE, mode="bilinear", align_corners=True)
    picture, row, column = pixels.T
    return features[picture, :, row, column]


READ_OUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"upsampling": upsampled, "sampling": sampled}


def read_out_inputs(batch: int) -> tuple[Tensor, Tensor]:
    """Tokens, and pixels of all pictures."""
    torch.manual_seed(0)
    tokens = torch.randn(batch, CHANNELS, IMAGE_SIZE[0] // PATCH, IMAGE_SIZE[1] // PATCH)
    picture = torch.arange(batch).repeat_interleave(PAIRS)
    rows, columns = (torch.randint(side, (len(picture),)) for side in IMAGE_SIZE)
    return tokens, torch.stack([picture, rows, columns], 1)


def read_out_work(side: str, batch: int) -> Work:
    """One call."""
    return partial(READ_OUTS[side], *read_out_inputs(batch))


def torch_neighbors(coordinates: np.ndarray, block: int = 1024) -> np.ndarray:
    """All distances, block by block."""
    points = torch.from_numpy(coordinates)
    exact = "donot_use_mm_for_euclid_dist"
    distances = (torch.cdist(rows, points, compute_mode=exact) for rows in points.split(block))
    return torch.cat([each.topk(NEIGHBORS + 1, largest=False).indices for each in distances]).numpy()


def street_cloud(num_points: int) -> np.ndarray:
    """Points of a few streets one above the other, so that there are as many as wanted."""
    scans = [render_scene(0, index, ()).frame.points[:, :3] for index in range(-(-num_points // 7000))]
    for i, scan in enumerate(scans):
        scan[:, 2] += 20 * i
    return np.random.default_rng(0).permutation(np.concatenate(scans))[:num_points]


def camera_clouds(preparation: Preparation) -> PointBatch:
    """What a camera sees of each of 4 streets."""
    data = SynthStreetData(4, preparation=preparation, seed=0)
    batch: PointBatch = data.training_set().__getitems__(range(4)).points
    return batch


def dense_tokens(network: WaffleIron, points: PointBatch) -> Tensor:
    """WaffleIron over padded clouds and whole grids."""
    tokens = network.embedding(points.features, points.neighbors)
    assert points.real is not None
    real = points.real.float()
    for d, layer in enumerate(network.layers):
        axis = d % len(network.grids)
        rows, columns = network.grids[axis]
        cell = points.cloud * rows * columns + points.cells[:, axis]
        count = torch.zeros(len(points.num_points) * rows * columns).index_add_(0, cell, real)
        weight = real / (count[cell] + 1e-6)
        grid = GridIndex(cell, weight, (len(points.num_points), rows, columns), (0, 0))
        for mix in layer.children():
            tokens = tokens + mix(tokens, grid)
    return tokens


def ragged_tokens(network: WaffleIron, points: PointBatch) -> Tensor:
    """Ours."""
    tokens: Tensor = network(points)
    return tokens


STEPS: dict[str, Callable[[WaffleIron, PointBatch], Tensor]] = {"dense": dense_tokens, "ragged": ragged_tokens}


def step_inputs(side: str, preparation: Preparation, channels: int, depth: int) -> tuple[WaffleIron, PointBatch]:
    """A network, and clouds as a side takes them."""
    torch.manual_seed(0)
    network, points = WaffleIron(preparation.grids, channels, depth), camera_clouds(preparation)
    return network, pad_clouds(points).flat() if side == "dense" else points


def step_work(side: str, *shape: Any) -> Work:
    """A forward and backward pass of a network in training."""
    network, points = step_inputs(side, *shape)

    def work() -> None:
        network.zero_grad()
        STEPS[side](network, points).square().mean().backward()

    return work


def check_steps(*shape: Any) -> None:
    """Both sides say the same of points; in eval mode, since batch norm sees the padding of one."""
    tokens = {}
    for side, forward in STEPS.items():
        network, points = step_inputs(side, *shape)
        with torch.no_grad():
            tokens[side] = forward(network.eval(), points)
        if points.real is not None:
            tokens[side] = tokens[side][points.real]
    torch.testing.assert_close(tokens["dense"], tokens["ragged"], rtol=1e-4, atol=1e-4)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 4], help="pictures; upsampling takes 0.4 GB for each"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    for batch in arguments.batch:
        tokens, pixels = read_out_inputs(batch)
        tokens = tokens[:, :16].double()  # in float32 upsampling rounds places to 1e-6 of a token
        torch.testing.assert_close(sampled(tokens, pixels), upsampled(tokens, pixels), rtol=1e-6, atol=1e-6)
        sides: dict[str, Work] = {side: read_out_work(side, batch) for side in READ_OUTS}
        memory = {side: added_peak_mib(read_out_work, side, batch) for side in READ_OUTS}
        compare(f"read-out of {batch} pictures", "upsampling", "sampling", sides, arguments.rounds, memory)

    for num_points in (5_000, 20_000):
        cloud = street_cloud(num_points)
        found = [cloud[rows] - cloud[:, None] for rows in (nearest_neighbors(cloud, NEIGHBORS), torch_neighbors(cloud))]
        by_tree, by_blocks = np.linalg.norm(found, axis=-1)
        np.testing.assert_allclose(by_tree, by_blocks, atol=1e-5)  # of neighbours equally far either is right
        sides = {"torch": partial(torch_neighbors, cloud), "tree": partial(nearest_neighbors, cloud, NEIGHBORS)}
        compare(f"neighbours of {num_points} points", "torch", "tree", sides, arguments.rounds, {})

    frame = render_scene(0, 0).frame
    draws, samples, preparation = sample_draws(Draws(0, 0), 0), PairedSamples(IMAGE_SIZE), Preparation()
    sides = {"sample": partial(samples.sample, frame, 0, draws, preparation)}
    times = paired_times(sides, arguments.rounds)["sample"]
    print(f"\npreparation of a sample, n = {arguments.rounds}\n  {spread(times)} s")
    print(f"  {len(frame.points) / np.median(times):,.0f} points of the scan per second and process")

    street = SynthStreetData(4).preparation
    for preparation, channels, depth in ((street, 32, 4), (Preparation(), 64, 6)):
        shape = (preparation, channels, depth)
        check_steps(*shape)
        sides = {side: step_work(side, *shape) for side in STEPS}
        memory = {side: added_peak_mib(step_work, side, *shape) for side in sides}
        title = f"step, {depth} layers of {channels}, grids {preparation.grids}"
        compare(title, "dense", "ragged", sides, arguments.rounds, memory)


if __name__ == "__main__":
    main()
