import os
import socket

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from test_contract import Crash, StopAt, save_every_step, trainer_for
from torch import multiprocessing, nn
from torch.utils.data import DataLoader

from ssl_distill.augment.repeated_views import RepeatedViews
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.projection_teacher import ProjectionTeacher
from ssl_distill.backbones.teacher_maps import CachedMaps, fingerprint
from ssl_distill.data.shapes import ShapesData
from ssl_distill.export import export_method, load_backbone
from ssl_distill.heads.dense import DenseProjection
from ssl_distill.losses.pixel_pairs import cross_view, cross_view_aligned, same_view
from ssl_distill.methods.pcd import PCD
from ssl_distill.optim.parameters import adamw
from ssl_distill.optim.schedules import Cosine
from ssl_distill.views import TwoViews


class StoredMaps(nn.Module):
    """Maps of two views, whatever the images."""

    def __init__(self, first, second):
        super().__init__()
        self.maps = nn.ParameterList([first.clone(), second.clone()])

    def forward(self, images):
        return torch.cat(list(self.maps))


class StoredViews(nn.Module):
    global_size = 32

    def forward(self, batch, draws):
        return batch


def small_head(in_dim, out_dim):
    return DenseProjection(in_dim, out_dim, hidden_dim=32)


def small_teacher(backbone="convnet_nano", seed=5):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(128, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    return ProjectionTeacher(create_backbone(backbone), head)


def small_pcd(**kwargs):
    defaults = {
        "teacher": small_teacher(),
        "backbone": "convnet_nano",
        "head": small_head,
        "queue_size": 50,
        "augment": TwoViewAugment(32),
        "optimizer": adamw,
        "learning_rate": Cosine(1e-3, 1e-3),
        "reference_batch": None,
    }
    return PCD(**{**defaults, **kwargs})


def quiet_trainer(folder, **kwargs):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **kwargs,
    )


def shapes(**kwargs):
    return ShapesData(**{"num_images": 40, "batch_size": 8, "bank_size": 8, "query_size": 8, **kwargs})


def test_golden(golden, tmp_path):
    """The official cross-view step from stored maps, through the Trainer."""
    for name in golden.cases("pcd/symmetric_step*"):
        case = golden(name)
        t = {key: value.double() if value.is_floating_point() else value for key, value in case.tensors.items()}
        method = small_pcd(pairing=cross_view, temperature=case.params["temperature"])
        method.student = StoredMaps(t["student_map_view1"], t["student_map_view2"])
        teacher = StoredMaps(t["teacher_map_view1"], t["teacher_map_view2"]).requires_grad_(False)
        object.__setattr__(method, "teacher", teacher)
        queue_in = t["queue_in"].T
        method.queue = type(method.queue)(*queue_in.shape).double()
        method.queue.keys.copy_(queue_in)
        method.queue.pointer.copy_(t["ptr_in"])
        found = {}

        class Recorder(Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer, found=found):
                for view, maps in enumerate(pl_module.student.maps):
                    found[f"grad_student_map_view{view + 1}"] = maps.grad.clone()

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, found=found):
                queue = pl_module.queue
                found.update(loss=outputs["loss"], queue_out=queue.keys.T, ptr_out=queue.pointer)

        batch = len(t["student_map_view1"])
        geometry = torch.zeros(2, batch, 4), torch.zeros(2, batch).bool(), torch.zeros(batch, 3).long()
        views = TwoViews(torch.zeros(2, batch, 3, 1, 1), *geometry)
        method.augment = StoredViews()
        trainer = quiet_trainer(tmp_path, max_epochs=1, precision="64-true", callbacks=[Recorder()])
        trainer.fit(method, DataLoader([views], batch_size=None))
        for key, value in found.items():
            torch.testing.assert_close(value, t[key], rtol=2e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


class Watch(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        assert not any(module.training for module in pl_module.teacher.modules())


@pytest.mark.parametrize("pairing", [same_view, cross_view, cross_view_aligned])
@pytest.mark.parametrize("attention", [None, nn.Identity])
def test_only_the_student_moves(pairing, attention, tmp_path):
    """The queue's size is no multiple of the batch; the teacher is bit-equal and stays in eval mode."""
    parts = {} if attention is None else {"attention": attention}
    method = small_pcd(pairing=pairing, **parts)
    teacher = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    student = {name: value.clone() for name, value in method.student.named_parameters()}
    assert not any(name.startswith("teacher") for name in [*method.state_dict(), *dict(method.named_parameters())])
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[Watch()], limit_val_batches=0, log_every_n_steps=1)
    trainer.fit(method, shapes())
    torch.testing.assert_close(dict(method.teacher.state_dict()), teacher, rtol=0, atol=0)
    assert not any(torch.equal(value, student[name]) for name, value in method.student.named_parameters())
    assert method.queue.pointer == 80 % 50
    assert all(value.isfinite().all() for value in method.state_dict().values())
    health = method.monitor()
    assert {"positive_cosine", "queue_top1", "effective_negatives", "feature_std"} == set(health)
    assert all(value.isfinite() for value in health.values())


def test_accumulation_moves_the_queue_once_per_step(tmp_path):
    queues = []
    for batch_size, parts in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        method = small_pcd(learning_rate=Cosine(0.0, 0.0))
        trainer = quiet_trainer(tmp_path, max_steps=3, accumulate_grad_batches=parts, limit_val_batches=0)
        trainer.fit(method, shapes(batch_size=batch_size, seed=0))
        queues.append(method.queue.keys)
    torch.testing.assert_close(*queues, rtol=1e-5, atol=1e-6)


def test_student_learns_its_teacher(tmp_path):
    torch.manual_seed(0)
    method = small_pcd(teacher=small_teacher(seed=1), learning_rate=Cosine(3e-3, 3e-3))
    cosines = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            cosines.append(pl_module.monitor()["positive_cosine"].item())

    options = {"max_epochs": 8, "limit_val_batches": 0, "log_every_n_steps": 1}
    quiet_trainer(tmp_path, callbacks=[Recorder()], **options).fit(method, shapes(num_images=80, batch_size=16))
    assert cosines[-1] > cosines[0] + 0.3


def test_checkpoint_knows_its_teacher(tmp_path):
    method = small_pcd()
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(method, shapes())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["teacher_fingerprint"] == fingerprint(small_teacher())
    assert not any("teacher" in name for name in checkpoint["state_dict"])

    again = quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    again.fit(small_pcd(), shapes(), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 10
    with pytest.raises(ValueError, match="`teacher` must be the one that the run began with"):
        quiet_trainer(tmp_path, max_epochs=2).fit(
            small_pcd(teacher=small_teacher(seed=6)), shapes(), ckpt_path=tmp_path / "last.ckpt"
        )


def fit(folder, callbacks=(), ranks=1, ckpt_path=None, parts=None, **kwargs):
    seed_everything(0, verbose=False)
    method = small_pcd(**(parts or {}))
    data = shapes(num_images=35, batch_size=8 // ranks)
    trainer_for(folder, callbacks, ranks, **kwargs).fit(method, data, ckpt_path=ckpt_path)
    return method


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_bit_equal(accumulate, tmp_path):
    """Stopped in mid-epoch, at its end and in the second epoch: student, its optimiser, queue and pointer."""
    options = {"accumulate_grad_batches": accumulate}
    whole = fit(tmp_path, **options)
    total = 8 // accumulate
    assert whole.trainer.global_step == total
    for stop in (1, total // 2, total - 1):
        folder = tmp_path / str(stop)
        with pytest.raises(Crash):
            fit(folder, [save_every_step(folder), StopAt(stop)], **options)
        resumed = fit(folder, [save_every_step(folder)], ckpt_path=folder / "last.ckpt", **options)
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
        states = [method.trainer.optimizers[0].state_dict()["state"] for method in (resumed, whole)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def without_batch_norm(pairing):
    """In the student; the teacher's has fixed statistics."""
    return {"backbone": "vit_nano_patch8_32", "head": conv_head, "pairing": pairing, "queue_size": 24}


def conv_head(in_dim, out_dim):
    return nn.Conv2d(in_dim, out_dim, 1)


PAIRINGS = [same_view, cross_view_aligned]
IN_FLOAT64 = {"max_steps": 4, "precision": "64-true"}  # AdamW blows rounding up to whole steps


def run_rank(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["WORLD_SIZE"] = "2"
    for pairing in PAIRINGS:
        method = fit(folder, ranks=2, parts=without_batch_norm(pairing), **IN_FLOAT64)
        torch.save(method.state_dict(), folder / f"{pairing.__name__}_{rank}.pt")


@pytest.mark.ddp
def test_ranks(tmp_path):
    """Two ranks with half the batch each equal one, although they have different numbers of pairs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run_rank, (port, tmp_path), nprocs=2)
    for pairing in PAIRINGS:
        one = fit(tmp_path, parts=without_batch_norm(pairing), **IN_FLOAT64).state_dict()
        first, second = (torch.load(tmp_path / f"{pairing.__name__}_{rank}.pt") for rank in range(2))
        assert one["queue.pointer"] == 4 * 8 % 24
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        # Ranks take every second image of a batch, and the queue takes rank by rank.
        keys = one["queue.keys"].view(3, 4, 2, -1)
        one["queue.keys"] = keys.transpose(1, 2).reshape(24, -1)
        torch.testing.assert_close(first, one, rtol=1e-6, atol=1e-9)


def test_cached_maps_train_the_same_student(tmp_path):
    """With an empty cache and with a full one to the bit, without one up to half precision."""
    augment = RepeatedViews(TwoViewAugment(32, filter="bicubic"))
    runs = {}
    for name in ("computed", "empty", "full"):
        parts = {"augment": augment, "optimizer": torch.optim.SGD, "learning_rate": Cosine(0.1, 0.1)}
        if name != "computed":
            parts["teacher_maps"] = CachedMaps(tmp_path / "maps")
        runs[name] = fit(tmp_path, parts=parts).state_dict()
    torch.testing.assert_close(runs["full"], runs["empty"], rtol=0, atol=0)
    torch.testing.assert_close(runs["empty"], runs["computed"], rtol=1e-2, atol=1e-3)
    assert not torch.equal(runs["empty"]["queue.keys"], runs["computed"]["queue.keys"])
    assert 32 <= len(list(tmp_path.rglob("*.npz"))) <= 35  # an epoch leaves three out


def test_export_holds_the_backbone_only(tmp_path):
    method = small_pcd(backbone="resnet10_nano", grid=2)
    exported = export_method(method, tmp_path / "backbone.safetensors")
    backbone = load_backbone(tmp_path / "backbone.safetensors")
    assert exported["encoder"] == "student"
    assert set(backbone.state_dict()) == set(create_backbone("resnet10_nano").state_dict())


def test_teacher_follows_to_other_precisions():
    method = small_pcd().double()
    assert {parameter.dtype for parameter in method.teacher.parameters()} == {torch.float64}
    assert fingerprint(method.teacher) == fingerprint(small_teacher())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "resnet10_nano"},
            r"`grid` must be set where maps differ, here 2 x 2 \(student\) and 4 x 4 \(teacher\); try 2",
        ),
        ({"teacher": "nowhere.pt"}, "`teacher` nowhere.pt does not exist"),
        ({"queue_size": 0}, "`queue_size` must be at least 1, got 0"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_pcd(**arguments)
