import pytest
import torch

from ssl_distill.data.sampler import EpochSampler


@pytest.mark.parametrize(("num_images", "epoch"), [(64, 0), (71, 0), (71, 5)])
def test_two_ranks_share_the_batches_of_one(num_images, epoch):
    whole = EpochSampler(range(num_images), 8, seed=1)
    halves = [EpochSampler(range(num_images), 4, 1, num_replicas=2, rank=rank) for rank in (0, 1)]
    for sampler in (whole, *halves):
        sampler.set_epoch(epoch)
    expected = torch.tensor(list(whole)).view(-1, 8).sort(1).values
    shared = torch.cat([torch.tensor(list(half)).view(-1, 4) for half in halves], 1).sort(1).values
    assert torch.equal(shared, expected)
    assert len(whole) == 64
    assert len(halves[0]) == 32


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(range(50), 10, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(3, 4) == order(3, 4)
    assert sorted(order(3, 4)) == list(range(200, 250))  # epoch 4
    assert len({tuple(item % 50 for item in order(3, epoch)) for epoch in range(9)}) == 9
    assert len({tuple(order(seed, 3)) for seed in range(9)}) == 9


def test_resumed_epoch_is_the_rest_and_the_next_one_whole():
    plain, resumed = EpochSampler(range(23), 4, 0), EpochSampler(range(23), 4, 0)
    resumed.resume_at(2, 3)
    for _ in range(2):  # loader processes may ask twice
        plain.set_epoch(2)
        assert list(resumed) == list(plain)[12:]
    assert len(resumed) == 20
    for sampler in (plain, resumed):
        sampler.set_epoch(3)
    assert list(resumed) == list(plain)
    resumed.resume_at(2, 5)
    assert list(resumed) == []


def test_errors():
    with pytest.raises(ValueError, match="`batch_size` must be at most 5 for 10 images on 2 rank"):
        EpochSampler(range(10), 6, 0, num_replicas=2)
