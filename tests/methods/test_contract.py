"""What every method promises, asked the same way of each. A new method is a row of `METHODS`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import Crash, StopAt, on_ranks, quiet_trainer, save_every_step
from lidar_clouds import street_data
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from small_methods import (
    separate_token_head,
    small_crops,
    small_dbot,
    small_dino,
    small_ibot,
    small_mokd_without_batch_norm,
    small_odis,
    small_pcd,
    small_scalr,
    small_udi,
)
from torch import Tensor, nn

from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.data.shapes import ShapesData
from ssl_distill.export import export_method, load_backbone
from ssl_distill.lidar.official import load_waffleiron
from ssl_distill.losses.object_view import mean_over_images
from ssl_distill.losses.pixel_pairs import cross_view_aligned
from ssl_distill.methods.base import Distiller
from ssl_distill.optim.schedules import Cosine


class MovingAverage(Callback):
    """The teacher's parameters are the moving average of the student's, recomputed after every optimiser step."""

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step
        self.expected = {name: value.detach().clone() for name, value in pl_module.teacher.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            return
        momentum = pl_module.momentum.at(pl_module.position._replace(step=self.step))
        self.step = trainer.global_step
        for name, student in pl_module.student.named_parameters():
            self.expected[name].mul_(momentum).add_(student.detach(), alpha=1 - momentum)

    def check(self, method):
        found = dict(method.teacher.named_parameters())
        torch.testing.assert_close(found, self.expected, rtol=1e-5, atol=1e-6)


class LastStudent(Callback):
    """The teacher is the student of the stage before, at first the untrained one, and computes as in evaluation."""

    def on_train_start(self, trainer, pl_module):
        self.expected = weights(pl_module.student.backbone)

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.check(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 in pl_module.stage_starts:
            self.expected = weights(pl_module.student.backbone)

    def check(self, method):
        assert not any(module.training for module in method.teacher.modules())
        torch.testing.assert_close(weights(method.teacher.backbone), self.expected, rtol=0, atol=0)


class Frozen(Callback):
    """The teacher stays as it is to the bit, computes as in evaluation, and is in no checkpoint."""

    def on_train_start(self, trainer, pl_module):
        self.expected = weights(pl_module.teacher)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.check(pl_module)

    def check(self, method):
        assert not any(module.training for module in method.teacher.modules())
        torch.testing.assert_close(weights(method.teacher), self.expected, rtol=0, atol=0)
        assert not any(name.startswith("teacher") for name in method.state_dict())


class FreezeBatchNorm(Callback):
    """SyncBatchNorm, which makes ranks equal, needs a GPU: here statistics stay those of the start."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()


def images(batch_size, content="single"):
    """Four batches of 8 and a rest, which an epoch leaves out."""
    return ShapesData(content, num_images=35, batch_size=batch_size, bank_size=20, query_size=10)


def one_image():
    return torch.randn(2, 3, 32, 32)


def one_cloud():
    return next(iter(street_data().calibration_batches(1))).points


def unchanged(state):
    return state


def queue_of_two_ranks(state):
    """Ranks take every second image of a batch, and the queue takes rank by rank."""
    keys = state["queue.keys"].view(3, 4, 2, -1)
    return {**state, "queue.keys": keys.transpose(1, 2).reshape(24, -1)}


@dataclass(frozen=True)
class Row:
    """What is special of a method.

    Attributes:
        make: The method on tiny networks.
        make_for_ranks: The same without what two ranks cannot share: stochastic depth, batch statistics.
        teacher: The rule that it follows; a callback with `check`.
        data: Batch size per rank to the data.
        global_batch: Over all ranks.
        stops: Accumulated batches to the steps before which the machine goes down.
        callbacks_for_ranks: Made for both runs of the comparison of ranks.
        as_on_ranks: State after one rank to that after two.
        load: Exported file to the encoder.
        inputs: What an encoder takes.
        idle: Names that start so belong to blocks behind the student's last depth: only decay moves them.
    """

    make: Callable[[], Distiller]
    make_for_ranks: Callable[[], Distiller]
    teacher: type[Callback] = MovingAverage
    data: Callable[[int], LightningDataModule] = images
    global_batch: int = 8
    stops: dict[int, tuple[int, ...]] = field(default_factory=lambda: {1: (1, 4, 7), 2: (1, 3)})
    callbacks_for_ranks: tuple[type[Callback], ...] = ()
    as_on_ranks: Callable[[dict[str, Tensor]], dict[str, Tensor]] = unchanged
    load: Callable[[Path], nn.Module] = load_backbone
    inputs: Callable[[], object] = one_image
    idle: tuple[str, ...] = ()


def crops_of_objects():
    return ObjectCropAugment(small_crops(), patch_size=8, min_area=0.05, missing="skip")


def conv_head(in_dim, out_dim):
    return nn.Conv2d(in_dim, out_dim, 1)


def without_drop_path(make, **kwargs):
    return partial(make, drop_path_rate=0.0, **kwargs)


separate_heads = partial(small_ibot, head=separate_token_head)
# Ranks have different numbers of scenes without an object; the default average is meant per rank.
objects = partial(small_odis, augment=crops_of_objects(), average=mean_over_images)
# Of maps without batch norm in the student; the teacher's has fixed statistics.
pixels = partial(small_pcd, backbone="vit_nano_patch8_32", head=conv_head, queue_size=24)
METHODS = {
    "dino": Row(small_dino, without_drop_path(small_dino)),
    "ibot": Row(separate_heads, without_drop_path(separate_heads)),
    "odis": Row(objects, without_drop_path(objects), data=partial(images, content="scene")),
    "udi": Row(small_udi, without_drop_path(small_udi)),
    "mokd": Row(small_mokd_without_batch_norm, without_drop_path(small_mokd_without_batch_norm)),
    # The teacher grows from one block to two or three, the student from two to three or back.
    "dbot": Row(
        partial(small_dbot, depths=(2, 3), drop_path_rate=0.2),
        without_drop_path(small_dbot, depths=(2, 3)),
        teacher=LastStudent,
    ),
    "dbot_shallower": Row(
        partial(small_dbot, depths=(3, 2), drop_path_rate=0.2),
        without_drop_path(small_dbot, depths=(3, 2)),
        teacher=LastStudent,
        idle=("student.backbone.blocks.2.",),
    ),
    "pcd": Row(small_pcd, pixels, teacher=Frozen, as_on_ranks=queue_of_two_ranks),
    # Ranks have different numbers of pixels that both views show.
    "pcd_aligned": Row(
        partial(small_pcd, pairing=cross_view_aligned, attention=nn.Identity),
        partial(pixels, pairing=cross_view_aligned),
        teacher=Frozen,
        as_on_ranks=queue_of_two_ranks,
    ),
    # Ranks have different numbers of pairs.
    "scalr": Row(
        partial(small_scalr, drop_path_rate=0.2),
        small_scalr,
        teacher=Frozen,
        data=lambda batch_size: street_data(batch_size=batch_size),
        global_batch=4,
        stops={1: (1, 2, 3), 2: (1,)},
        callbacks_for_ranks=(FreezeBatchNorm,),
        load=load_waffleiron,
        inputs=one_cloud,
    ),
}


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def fit(row, folder, callbacks=(), make=None, ranks=1, ckpt_path=None, **kwargs):
    """Two epochs."""
    seed_everything(0, verbose=False)
    method = (make or row.make)()
    data = row.data(row.global_batch // ranks)
    trainer = quiet_trainer(folder, callbacks, ranks, **{"max_epochs": 2, **kwargs})
    trainer.fit(method, data, ckpt_path=ckpt_path)
    return method


class Recorder(Callback):
    """Parameters at the start, and who got gradients."""

    def on_train_start(self, trainer, pl_module):
        self.start = {name: value.detach().clone() for name, value in pl_module.named_parameters()}
        self.with_gradient = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        self.with_gradient |= set(gradients)


@dataclass(frozen=True)
class Run:
    """A method after training, and what watched it."""

    row: Row
    method: Distiller
    recorder: Recorder
    teacher: Callback


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory):
    row = METHODS[request.param]
    recorder, teacher = Recorder(), row.teacher()
    return Run(row, fit(row, tmp_path_factory.mktemp("run"), [recorder, teacher]), recorder, teacher)


def test_training_stays_finite(trained):
    assert all(value.isfinite().all() for value in trained.method.state_dict().values())
    health = trained.method.monitor()
    assert health
    assert all(value.isfinite() for value in health.values())


def test_only_students_are_trained(trained):
    """Whatever the optimiser has gets a gradient and moves; no teacher is among it, and what is fixed stays."""
    parameters = dict(trained.method.named_parameters())
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    optimizer = trained.method.trainer.optimizers[0]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {name for name, parameter in parameters.items() if id(parameter) in held} == trainable
    assert trained.recorder.with_gradient == trainable
    assert not any(name.startswith("teacher") for name in trainable)
    start = trained.recorder.start
    moved = {name for name, value in parameters.items() if not torch.equal(value, start[name])}
    idle = {name for name in trainable if name.startswith(trained.row.idle)}
    assert {name for name in moved if not name.startswith("teacher")} | idle == trainable


def test_teacher_follows_its_rule(trained):
    trained.teacher.check(trained.method)


def test_exports(trained, tmp_path):
    """Every encoder, loaded from its file, computes the same."""
    inputs = trained.row.inputs()
    for name, encoder in trained.method.encoders().items():
        path = tmp_path / f"{name}.safetensors"
        assert export_method(trained.method, path, name)["encoder"] == name
        with torch.no_grad():
            expected = encoder.eval()(inputs)
            torch.testing.assert_close(trained.row.load(path)(inputs), expected)


def test_survives_bf16(trained, tmp_path):
    """Losses near those in full precision; weights and memories stay in it."""
    mixed = fit(trained.row, tmp_path, precision="bf16-mixed")
    full = trained.method.state_dict()
    for name, value in mixed.state_dict().items():
        assert value.isfinite().all(), name
        assert value.dtype == full[name].dtype, name
    losses = [float(method.trainer.callback_metrics["train/loss"]) for method in (mixed, trained.method)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_equal(name, accumulate, tmp_path):
    """Stopped in mid-epoch, at its end and in the second epoch; resumed from the step before."""
    row = METHODS[name]
    whole = fit(row, tmp_path, accumulate_grad_batches=accumulate)
    assert max(row.stops[accumulate]) < whole.trainer.global_step
    for stop in row.stops[accumulate]:
        folder = tmp_path / str(stop)
        options = {"folder": folder, "accumulate_grad_batches": accumulate}
        with pytest.raises(Crash):
            fit(row, callbacks=[save_every_step(folder), StopAt(stop)], **options)
        resumed = fit(row, callbacks=[save_every_step(folder)], ckpt_path=folder / "last.ckpt", **options)
        found = resumed.state_dict()
        different = [key for key, value in whole.state_dict().items() if not torch.equal(value, found[key])]
        assert not different, f"stopped before step {stop}: {different[:3]}"
        states = [method.trainer.optimizers[0].state_dict()["state"] for method in (resumed, whole)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def teacher_step(row, precision, folder):
    """How far the teacher went towards where its student is, and the dtypes of its centers."""
    rates = {"momentum": Cosine(0.996, 0.996), "learning_rate": Cosine(2e-3, 2e-3), "freeze_last_layer_epochs": 0}
    recorder = Recorder()
    method = fit(row, folder, [recorder], partial(row.make, **rates), precision=precision, max_epochs=6)
    networks = {"student": method.student, "teacher": method.teacher}
    start = {key: recorder.start[f"teacher.{key}"].float() for key, _ in method.teacher.named_parameters()}
    student, teacher = (
        torch.cat([(dict(network.named_parameters())[key].detach().float() - start[key]).flatten() for key in start])
        for network in networks.values()
    )
    centers = [value.dtype for key, value in method.state_dict().items() if "center" in key or key == "targets.value"]
    return float(teacher @ student / student.norm()), centers


@pytest.mark.parametrize("name", ["dino", "ibot", "odis", "udi"])
def test_teacher_in_half_precision_does_not_stall(name, tmp_path):
    """Its steps are below what bfloat16 resolves: without a running value in float32 it would stand still."""
    expected, _ = teacher_step(METHODS[name], "32-true", tmp_path)
    moved, centers = teacher_step(METHODS[name], "bf16-true", tmp_path)
    assert moved == pytest.approx(expected, rel=0.05)
    assert centers
    assert set(centers) == {torch.float32}


def test_resume_in_half_precision_is_bit_equal(tmp_path):
    row = METHODS["dino"]
    whole = fit(row, tmp_path, precision="bf16-true").state_dict()
    with pytest.raises(Crash):
        fit(row, tmp_path, [save_every_step(tmp_path), StopAt(4)], precision="bf16-true")
    checkpoint = tmp_path / "last.ckpt"
    running = torch.load(checkpoint, weights_only=True)["callbacks"]["EMATeacher"]["running"][0]
    assert {value.dtype for value in running} == {torch.float32}
    resumed = fit(row, tmp_path, [save_every_step(tmp_path)], precision="bf16-true", ckpt_path=checkpoint)
    different = [key for key, value in resumed.state_dict().items() if not torch.equal(value, whole[key])]
    assert not different


def fit_for_ranks(row, folder, ranks=1):
    """Into the second epoch, where stages begin; in float64, because AdamW blows rounding up to whole steps."""
    callbacks = [make() for make in row.callbacks_for_ranks]
    return fit(row, folder, callbacks, row.make_for_ranks, ranks, max_steps=5, precision="64-true")


def fit_on_rank(rank, names, folder):
    for name in names:
        method = fit_for_ranks(METHODS[name], folder, ranks=2)
        torch.save(method.state_dict(), folder / f"{name}_{rank}.pt")


@pytest.fixture(scope="module")
def states_of_ranks(request, tmp_path_factory):
    """Of every method that is asked for: processes start once, because starting takes longest."""
    asked = [item.callspec.params["name"] for item in request.session.items if "states_of_ranks" in item.fixturenames]
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(fit_on_rank, asked, folder)
    return {name: [torch.load(folder / f"{name}_{rank}.pt") for rank in range(2)] for name in asked}


@pytest.mark.ddp
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one(name, states_of_ranks, tmp_path):
    one = METHODS[name].as_on_ranks(fit_for_ranks(METHODS[name], tmp_path).state_dict())
    first, second = states_of_ranks[name]
    assert first.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
        assert torch.equal(first[key], second[key]), key
