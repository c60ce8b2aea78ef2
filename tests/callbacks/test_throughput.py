from types import SimpleNamespace

import pytest

from ssl_distill.callbacks import throughput
from ssl_distill.callbacks.throughput import Throughput


class Method:
    def __init__(self):
        self.batch_arrived_at, self.logged = 0.0, {}

    def log(self, name, value, prog_bar):
        assert prog_bar
        self.logged[name] = value


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    return clock


def test_images_per_second_and_wait(clock):
    callback, method = Throughput(), Method()
    trainer = SimpleNamespace(
        train_dataloader=SimpleNamespace(batch_size=8), world_size=2, global_step=10, log_every_n_steps=10
    )
    for _ in range(5):  # batches of 2 s, of which 0.5 s pass until the data are there
        method.batch_arrived_at = clock.now + 0.5
        clock.now += 2.0
        callback.on_train_batch_end(trainer, method)
    assert method.logged["train/images_per_s"] == pytest.approx(8)
    assert method.logged["train/data_wait"] == pytest.approx(0.25)

    clock.now += 1000  # a validation and the pause between epochs are no waiting
    callback.on_validation_end(trainer, method)
    clock.now += 10
    callback.on_train_epoch_start(trainer, method)
    method.batch_arrived_at = clock.now
    clock.now += 2.0
    callback.on_train_batch_end(trainer, method)
    assert method.logged["train/images_per_s"] == pytest.approx(8)
    assert 0.15 < method.logged["train/data_wait"] < 0.25


def test_a_recent_change_counts_most(clock):
    callback, method = Throughput(), Method()
    trainer = SimpleNamespace(
        train_dataloader=SimpleNamespace(batch_size=10), world_size=1, global_step=1, log_every_n_steps=1
    )
    for seconds in [1.0] * 100 + [0.5] * 100:
        clock.now += seconds
        callback.on_train_batch_end(trainer, method)
    assert method.logged["train/images_per_s"] == pytest.approx(20, rel=0.02)
