import pytest
import torch
from torch.utils.data import DataLoader

from ssl_distill.data import shared_batch
from ssl_distill.data.module import BatchSet
from ssl_distill.data.shared_batch import empty_images

PREFETCHED = 2  # batches per loader process, DataLoader's default


def numbered(positions):
    """Images full of their position, and how many buffers this process has."""
    images = empty_images((len(positions),), 3, 6)
    for row, position in enumerate(positions):
        images[row] = torch.full((3, 6, 6), position, dtype=torch.uint8)
    return images, len(shared_batch._buffers)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_received_batch_stays_what_it_is(context):
    loader = DataLoader(
        BatchSet(numbered, range(60)),
        batch_size=4,
        num_workers=1 if context == "spawn" else 2,
        collate_fn=tuple,
        multiprocessing_context=context,
        persistent_workers=True,
    )
    next(iter(loader))  # an epoch that is broken off
    received = [batch for _ in range(3) for batch in loader]
    for number, (images, num_buffers) in enumerate(received):
        expected = torch.arange(60).view(-1, 4)[number % 15]
        assert type(images) is torch.Tensor
        assert torch.equal(images, expected[:, None, None, None].expand(4, 3, 6, 6))
        assert num_buffers <= PREFETCHED + 1
    assert len({images.untyped_storage().data_ptr() for images, _ in received}) == len(received)


def test_without_loader_processes_nothing_is_shared():
    images, num_buffers = numbered([3])
    assert images.unique().tolist() == [3]
    assert not images.is_shared()
    assert num_buffers == 0
