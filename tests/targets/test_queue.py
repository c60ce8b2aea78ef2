import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from ssl_distill.targets.queue import Queue


def test_golden(golden):
    for name in golden.cases("pcd/queue_updates*"):
        case = golden(name)
        queue_in = case.tensors["queue_in"].T.double()
        queue = Queue(*queue_in.shape).double()
        queue.keys.copy_(queue_in)
        queue.pointer.copy_(case.tensors["ptr_in"])
        for i in range(case.params["steps"]):
            keys = F.normalize(case.tensors[f"teacher_map_{i}"].double().mean((2, 3)), dim=1)
            torch.testing.assert_close(keys, case.tensors[f"keys_{i}"].double(), rtol=2e-6, atol=1e-7)
            queue.observe(keys)
            queue.update()
            torch.testing.assert_close(queue.keys, case.tensors[f"queue_out_{i}"].T.double(), rtol=2e-6, atol=1e-7)
            assert queue.pointer.equal(case.tensors[f"ptr_out_{i}"])


def test_any_number_of_keys():
    queue = Queue(5, 1)
    for start in (0, 3, 6):
        queue.observe(torch.arange(start, start + 3.0)[:, None])
        queue.update()
    assert queue.keys[:, 0].tolist() == [5, 6, 7, 8, 4]
    assert queue.pointer == 4
    queue.observe(torch.arange(12.0)[:, None])
    queue.update()
    assert sorted(queue.keys[:, 0].tolist()) == [7, 8, 9, 10, 11]
    assert queue.keys[(queue.pointer - 1) % 5] == 11
    queue.update()
    assert queue.keys[(queue.pointer - 1) % 5] == 11


def test_a_queue_of_one():
    queue = Queue(1, 2)
    queue.observe(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    queue.update()
    assert queue.keys.tolist() == [[1.0, 0.0]]


def test_start():
    queue = Queue(100, 7)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(100))
    torch.manual_seed(3)
    assert torch.equal(Queue(100, 7).keys, queue.keys)


def run_rank(rank, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    queue = Queue(8, 3)
    for step in range(3):
        queue.observe(all_keys(step).chunk(2)[rank])
        queue.update()
    torch.save(queue.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def all_keys(step):
    return F.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(step)), dim=1)


@pytest.mark.ddp
def test_ranks(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run_rank, (port, tmp_path), nprocs=2)
    queue = Queue(8, 3)
    for step in range(3):
        queue.observe(all_keys(step))
        queue.update()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), dict(queue.state_dict()), rtol=0, atol=0)


def test_errors():
    with pytest.raises(ValueError, match="`queue_size` must be at least 1, got 0"):
        Queue(0, 3)
