import json

import pytest
import torch
from harness import quiet_trainer, save_every_step
from lidar_clouds import street_data
from lightning.pytorch import Callback, seed_everything
from small_methods import GRIDS, small_scalr

from ssl_distill.backbones.teacher_maps import fingerprint
from ssl_distill.lidar.point_evaluation import PointEvaluation
from ssl_distill.lidar.point_probe import calibrated, fit_point_probe
from ssl_distill.lidar.preparation import Preparation
from ssl_distill.lidar.samples import LabelledSamples, PairedSamples
from ssl_distill.lidar.teachers import PatchStats, ViTTeacher
from ssl_distill.lidar.waffleiron import WaffleIron
from ssl_distill.methods.scalr import pair_health, two_layer_head
from ssl_distill.optim.parameters import decay_groups
from ssl_distill.optim.schedules import Cosine


def fit(folder, callbacks=(), ckpt_path=None, method=None, data=None, **kwargs):
    seed_everything(0, verbose=False)
    method = method or small_scalr(drop_path_rate=0.2)
    trainer = quiet_trainer(folder, callbacks, **{"max_epochs": 2, **kwargs})
    trainer.fit(method, data or street_data(), ckpt_path=ckpt_path)
    return method


def test_health(tmp_path):
    losses = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            losses.append(float(outputs["loss"]))

    method = fit(tmp_path, [Recorder()])
    assert len(losses) == 4
    assert all(0 < loss < 2 for loss in losses)
    health = method.monitor()
    assert {"positive_cosine", "feature_std", "teacher_std"} == set(health)
    assert 0.5 < health["teacher_std"] <= 1


def test_checkpoint_knows_its_teacher(tmp_path):
    method = fit(tmp_path, [save_every_step(tmp_path)], max_steps=1)
    path = tmp_path / "last.ckpt"
    assert torch.load(path, weights_only=True)["teacher_fingerprint"] == fingerprint(method.teacher)
    with pytest.raises(ValueError, match="`teacher` must be the one that the run began with"):
        fit(tmp_path, ckpt_path=path, method=small_scalr(teacher=PatchStats(8)))


def test_loss_falls(tmp_path):
    losses = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            losses.append(float(outputs["loss"]))

    seed_everything(0, verbose=False)  # of the weights too
    fit(tmp_path, method=small_scalr(learning_rate=Cosine(1e-2, 1e-2)), callbacks=[Recorder()], max_epochs=30)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3


def test_evaluation(tmp_path):
    """Before the first step and after the last, with pictures; and again by `validate`, the same numbers."""
    saving = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1}
    fit(tmp_path, [save_every_step(tmp_path)], **saving)
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

    trainer = quiet_trainer(tmp_path / "again", [save_every_step(tmp_path)], **saving)
    trainer.validate(small_scalr(), street_data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert float(trainer.callback_metrics["val/lidar/linear_miou"]) == pytest.approx(
        last["scores"]["lidar"]["linear_miou"]
    )
    assert trainer.callback_metrics["val/score"] == trainer.callback_metrics["val/lidar/linear_miou"]


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
    seed_everything(0, verbose=False)
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
