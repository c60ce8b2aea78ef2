import pytest
import torch
from harness import StoredViews, quiet_trainer
from lightning.pytorch import Callback, seed_everything
from small_methods import small_pcd, small_teacher
from torch import nn
from torch.utils.data import DataLoader

from ssl_distill.augment.repeated_views import RepeatedViews
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.teacher_maps import CachedMaps, fingerprint
from ssl_distill.data.shapes import ShapesData
from ssl_distill.export import export_method, load_backbone
from ssl_distill.losses.pixel_pairs import cross_view
from ssl_distill.optim.schedules import Cosine
from ssl_distill.views import TwoViews


class StoredMaps(nn.Module):
    """Maps of two views, whatever the images."""

    def __init__(self, first, second):
        super().__init__()
        self.maps = nn.ParameterList([first.clone(), second.clone()])

    def forward(self, images):
        return torch.cat(list(self.maps))


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
        trainer = quiet_trainer(tmp_path, [Recorder()], max_epochs=1, precision="64-true")
        trainer.fit(method, DataLoader([views], batch_size=None))
        for key, value in found.items():
            torch.testing.assert_close(value, t[key], rtol=2e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


def test_health_and_queue(tmp_path):
    """The queue's size is no multiple of the batch."""
    method = small_pcd(pairing=cross_view)
    quiet_trainer(tmp_path, max_epochs=2).fit(method, shapes())
    assert method.queue.pointer == 80 % 50
    health = method.monitor()
    assert {"positive_cosine", "queue_top1", "effective_negatives", "feature_std"} == set(health)
    assert -1 <= health["positive_cosine"] <= 1
    assert 1 <= health["effective_negatives"] <= 51


def test_accumulation_moves_the_queue_once_per_step(tmp_path):
    queues = []
    for batch_size, parts in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        method = small_pcd(learning_rate=Cosine(0.0, 0.0))
        trainer = quiet_trainer(tmp_path, max_steps=3, accumulate_grad_batches=parts)
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

    quiet_trainer(tmp_path, [Recorder()], max_epochs=8).fit(method, shapes(num_images=80, batch_size=16))
    assert cosines[-1] > cosines[0] + 0.3


def test_checkpoint_knows_its_teacher(tmp_path):
    method = small_pcd()
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(method, shapes())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["teacher_fingerprint"] == fingerprint(small_teacher())
    assert not any("teacher" in name for name in checkpoint["state_dict"])

    again = quiet_trainer(tmp_path, max_epochs=2)
    again.fit(small_pcd(), shapes(), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 10
    with pytest.raises(ValueError, match="`teacher` must be the one that the run began with"):
        quiet_trainer(tmp_path, max_epochs=2).fit(
            small_pcd(teacher=small_teacher(seed=6)), shapes(), ckpt_path=tmp_path / "last.ckpt"
        )


def fit(folder, **parts):
    seed_everything(0, verbose=False)
    method = small_pcd(**parts)
    quiet_trainer(folder, max_epochs=2).fit(method, shapes(num_images=35))
    return method


def test_cached_maps_train_the_same_student(tmp_path):
    """With an empty cache and with a full one to the bit, without one up to half precision."""
    augment = RepeatedViews(TwoViewAugment(32, filter="bicubic"))
    runs = {}
    for name in ("computed", "empty", "full"):
        parts = {"augment": augment, "optimizer": torch.optim.SGD, "learning_rate": Cosine(0.1, 0.1)}
        if name != "computed":
            parts["teacher_maps"] = CachedMaps(tmp_path / "maps")
        runs[name] = fit(tmp_path, **parts).state_dict()
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
