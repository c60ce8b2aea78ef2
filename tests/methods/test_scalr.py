import json
import os
import socket

import lightning.pytorch as pl
import pytest
import torch
from lidar_clouds import street_data
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing, nn

from ssl_distill.export import export_method
from ssl_distill.lidar.official import load_waffleiron
from ssl_distill.lidar.point_evaluation import PointEvaluation
from ssl_distill.lidar.point_probe import calibrated, fit_point_probe
from ssl_distill.lidar.preparation import Preparation
from ssl_distill.lidar.samples import LabelledSamples, PairedSamples
from ssl_distill.lidar.teachers import PatchStats, ViTTeacher
from ssl_distill.lidar.waffleiron import WaffleIron
from ssl_distill.methods.scalr import ScaLR, pair_health, two_layer_head
from ssl_distill.optim.parameters import decay_groups
from ssl_distill.optim.schedules import Cosine

GRIDS = ((64, 64), (64, 24), (64, 24))


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def small_scalr(**kwargs):
    defaults = {
        "backbone": WaffleIron(GRIDS, 8, 2, drop_path_rate=0.2),
        "teacher": PatchStats(),
        "learning_rate": Cosine(2e-3, 2e-3),
        "evaluation": PointEvaluation(steps=50, points_per_step=512, calibration_batches=2),
    }
    return ScaLR(**{**defaults, **kwargs})


def quiet_trainer(folder, **kwargs):
    options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "limit_val_batches": 0, **kwargs}
    return Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options
    )


def fit(folder, ckpt_path=None, method=None, data=None, **kwargs):
    pl.seed_everything(0, verbose=False)
    method = method or small_scalr()
    quiet_trainer(folder, **{"max_epochs": 2, **kwargs}).fit(method, data or street_data(), ckpt_path=ckpt_path)
    return method


def test_only_the_student_moves(tmp_path):
    pl.seed_everything(0, verbose=False)
    method = small_scalr()
    before = {name: value.clone() for name, value in method.student.named_parameters()}
    teachers, losses = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            assert not any(module.training for module in pl_module.teacher.modules())
            teachers.append({name: value.clone() for name, value in pl_module.teacher.state_dict().items()})
            losses.append(float(outputs["loss"]))

    fit(tmp_path, method=method, callbacks=[Watch()], log_every_n_steps=1)
    assert len(losses) == 4
    assert all(0 < loss < 2 for loss in losses)
    assert all(torch.equal(value, teachers[0][name]) for each in teachers for name, value in each.items())
    assert not any(name.startswith("teacher") for name in [*method.state_dict(), *dict(method.named_parameters())])
    assert not any(torch.equal(value, before[name]) for name, value in method.student.named_parameters())
    assert all(value.isfinite().all() for value in method.state_dict().values())
    health = method.monitor()
    assert {"positive_cosine", "feature_std", "teacher_std"} == set(health)
    assert 0.5 < health["teacher_std"] <= 1


def test_loss_falls(tmp_path):
    losses = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            losses.append(float(outputs["loss"]))

    fit(tmp_path, method=small_scalr(learning_rate=Cosine(1e-2, 1e-2)), callbacks=[Recorder()], max_epochs=20)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3


class Crash(Exception):
    """The machine went down."""


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Crash


def save_every_step(folder):
    return ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)


def test_resume_is_bit_equal(tmp_path):
    whole = fit(tmp_path).state_dict()
    for stop in (1, 2, 3):
        folder = tmp_path / str(stop)
        saving = {"enable_checkpointing": True}
        with pytest.raises(Crash):
            fit(folder, callbacks=[save_every_step(folder), StopAt(stop)], **saving)
        path = folder / "last.ckpt"
        resumed = fit(folder, path, callbacks=[save_every_step(folder)], **saving).state_dict()
        different = [key for key, value in whole.items() if not torch.equal(value, resumed[key])]
        assert not different, f"stopped after step {stop}: {different[:3]}"
    assert torch.load(path, weights_only=True)["teacher_fingerprint"]
    with pytest.raises(ValueError, match="`teacher` must be the one that the run began with"):
        fit(folder, path, method=small_scalr(teacher=PatchStats(8)), max_epochs=3)


class FreezeBatchNorm(Callback):
    """SyncBatchNorm, which makes ranks equal, needs a GPU: here statistics stay those of the start."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()


def run_for_ranks(folder, ranks):
    pl.seed_everything(0, verbose=False)
    method = small_scalr(backbone=WaffleIron(GRIDS, 8, 2))
    strategy = DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
    options = {"devices": ranks, "strategy": strategy, "max_steps": 4, "precision": "64-true"}
    data = street_data(batch_size=4 // ranks)
    return fit(folder, method=method, data=data, callbacks=[FreezeBatchNorm()], **options)


def run_rank(rank, port, folder, cache):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ.update(WORLD_SIZE="2", SSL_DISTILL_CACHE=cache)
    torch.save(run_for_ranks(folder, 2).state_dict(), folder / f"rank{rank}.pt")


@pytest.mark.ddp
def test_ranks(tmp_path):
    """Two ranks, whose numbers of pairs differ, equal one; batch norm apart."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = run_for_ranks(tmp_path, 1).state_dict()
    multiprocessing.spawn(run_rank, (port, tmp_path, os.environ["SSL_DISTILL_CACHE"]), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
        assert torch.equal(first[key], second[key]), key


def test_evaluation(tmp_path):
    """Before the first step and after the last, with pictures; and again by `validate`, the same numbers."""
    saving = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1, "enable_checkpointing": True}
    method = fit(tmp_path, callbacks=[save_every_step(tmp_path)], **saving)
    baseline, *_, last = json.loads((tmp_path / "evaluation.json").read_text())
    assert baseline["stage"] == "baseline"
    assert last["step"] == 4
    for entry in (baseline, last):
        scores = entry["scores"]["lidar"]
        assert 0.05 < scores["linear_miou"] < scores["linear_accuracy"] < 1
        assert "linear_iou_pedestrian" in scores
    assert last["protocol"]["bank scans"] == 3
    assert last["protocol"]["query scans"] == 2
    assert (tmp_path / "birdseye.png").stat().st_size > 10_000
    assert (tmp_path / "pairs.png").stat().st_size > 10_000

    saving = {**saving, "callbacks": [save_every_step(tmp_path)]}
    trainer = quiet_trainer(tmp_path / "again", **saving)
    trainer.validate(small_scalr(), street_data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert float(trainer.callback_metrics["val/lidar/linear_miou"]) == pytest.approx(
        last["scores"]["lidar"]["linear_miou"]
    )
    assert trainer.callback_metrics["val/score"] == trainer.callback_metrics["val/lidar/linear_miou"]

    exported = export_method(method, tmp_path / "backbone.safetensors")
    assert exported["encoder"] == "lidar"
    again = load_waffleiron(tmp_path / "backbone.safetensors")
    for name, value in method.student.backbone.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_baseline_is_calibrated_and_leaves_the_network_alone():
    torch.manual_seed(0)
    network = WaffleIron(GRIDS, 8, 1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batches = [batch.points for batch in street_data().calibration_batches(3)]
    other = calibrated(network, batches)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    mean = torch.stack([batch.features.mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(other.embedding.norm.running_mean, mean)
    assert other.embedding.norm.momentum == 0.1


def test_point_probe_learns():
    torch.manual_seed(0)
    labels = torch.randint(3, (2000,))
    tokens = torch.randn(3, 8)[labels] * 2 + torch.randn(2000, 8) * 0.3
    with torch.inference_mode():
        probe = fit_point_probe(tokens, labels, 3, steps=60, points_per_step=256)
        assert (probe(tokens).argmax(1) == labels).float().mean() > 0.95


def test_the_cache_changes_nothing(tmp_path):
    states = [fit(tmp_path, method=small_with_cache(gib)).state_dict() for gib in (0.0, 1.0)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def small_with_cache(gib):
    pl.seed_everything(0, verbose=False)
    return small_scalr(teacher_cache_gib=gib)


def test_parts(tmp_path):
    """A ViT as teacher, ScaLR+'s head, spared vectors."""
    teacher = ViTTeacher("vit_nano_patch8_32", pretrained=False)
    method = small_scalr(teacher=teacher, head=two_layer_head, parameter_groups=decay_groups)
    assert method.student.head[2].out_features == teacher.num_features
    fit(tmp_path, method=method, max_steps=1, data=street_data(samples=PairedSamples((48, 96))))
    method = fit(tmp_path, method=small_scalr(), max_steps=1)
    (group,) = method.trainer.optimizers[0].param_groups
    assert group["weight_decay"] == 0.03
    assert len(group["params"]) == len(list(method.student.parameters()))


def test_health_tells_constant_features():
    students = torch.randn(50, 8)
    assert pair_health(students, students)["positive_cosine"] == pytest.approx(1.0)
    assert pair_health(torch.ones(50, 8), students)["feature_std"] < 1e-6
    assert 0.8 < pair_health(students, students)["feature_std"] <= 1


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        (
            {},
            {"preparation": Preparation()},
            r"`grids` must be the same in `backbone` and `preparation`, got \(\(64, 64\)",
        ),
        ({}, {"samples": PairedSamples((10, 20))}, r"`image_size` must be a multiple of the teacher's patch size 4"),
    ],
)
def test_errors(method, data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, method=small_scalr(**method), data=street_data(**data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"calibration_batches": 0}, "`calibration_batches` must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0"),
    ],
)
def test_evaluation_errors(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PointEvaluation(**arguments)
    with pytest.raises(ValueError, match="`PointEvaluation` needs a LidarData module with labels"):
        quiet_trainer(tmp_path, limit_val_batches=1.0).validate(small_scalr(), street_data(samples=LabelledSamples()))
