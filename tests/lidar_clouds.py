"""Small clouds and data modules for tests of the lidar world."""

import torch

from ssl_distill.lidar.batch import PointBatch
from ssl_distill.lidar.street_data import SynthStreetData


def random_clouds(sizes, grids=((9, 7), (9, 5), (7, 5)), num_neighbors=4, seed=0):
    """Batches of one cloud each, and the grids that their cells fit."""
    generator = torch.Generator().manual_seed(seed)
    clouds = []
    for size in sizes:
        cells = [torch.randint(rows * columns, (size,), generator=generator) for rows, columns in grids]
        neighbors = torch.randint(size, (size, num_neighbors), generator=generator)
        neighbors = torch.cat([torch.arange(size)[:, None], neighbors], 1)
        features = torch.randn(size, 5, generator=generator)
        clouds.append(PointBatch(features, torch.stack(cells, 1), neighbors, torch.tensor([size])))
    return clouds, grids


def street_data(**kwargs):
    """Few scenes."""
    return SynthStreetData(**{"num_scenes": 8, "batch_size": 4, "bank_size": 3, "query_size": 2, "seed": 0, **kwargs})
