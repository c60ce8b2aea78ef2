import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.callbacks.metrics_file import MetricsFile
from ssl_distill.callbacks.run_folder import RunFolder
from ssl_distill.data.shapes import ShapesData
from ssl_distill.export import load_backbone
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.methods.dino import DINO
from ssl_distill.optim.schedules import Cosine


def fit(folder, *callbacks, **options):
    """A short run in plain Python, without the command line."""
    augment = MultiCropAugment(global_size=32, local_size=16, num_local=1)
    method = DINO(
        "convnet_nano",
        num_prototypes=8,
        head=lambda in_dim, num_prototypes: PrototypeHead(in_dim, num_prototypes, 8, 8),
        augment=augment,
        learning_rate=Cosine(1e-3, 1e-5),
    )
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=MetricsFile(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "limit_val_batches": 0, **options},
    )
    trainer.fit(method, ShapesData(num_images=16, batch_size=8, bank_size=8, query_size=8))
    return method


def test_contents(tmp_path, capsys):
    method = fit(tmp_path, RunFolder(), ModelCheckpoint(tmp_path, "last", enable_version_counter=False))
    names = {"backbone.safetensors", "curves.png", "last.ckpt", "metrics.csv", "views.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in names)
    assert "best.ckpt" not in printed
    images = torch.rand(2, 3, 32, 32)
    teacher = method.encoders()["teacher"].eval()
    torch.testing.assert_close(load_backbone(tmp_path / "backbone.safetensors")(images), teacher(images))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["ssl_distill"]["method"] == "ssl_distill.methods.dino.DINO"


class Judge(Callback):
    """Scores that fall from epoch to epoch, and with the student ahead."""

    def on_validation_epoch_end(self, trainer, pl_module):
        step = trainer.global_step
        scores = {"val/score": -step, "val/teacher/knn_top1": 0.2 - step, "val/student/knn_top1": 0.3 - step}
        pl_module.log_dict({name: float(value) for name, value in scores.items()})


def test_the_backbone_is_that_of_the_best_score(tmp_path, capsys):
    options = {"monitor": "val/score", "mode": "max", "enable_version_counter": False}
    judged = {"max_epochs": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    method = fit(tmp_path, RunFolder(0), Judge(), ModelCheckpoint(tmp_path, "best", **options), **judged)
    assert "the student of best.ckpt; for another: ssl-distill export" in capsys.readouterr().out
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert best["global_step"] == 2
    backbone = load_backbone(tmp_path / "backbone.safetensors")
    assert backbone.backbone_config["scores"] == {"val/student/knn_top1": pytest.approx(0.3 - 2)}
    prefix = "student.backbone."
    of_best = {name: value for name, value in best["state_dict"].items() if name.startswith(prefix)}
    torch.testing.assert_close({prefix + name: value for name, value in backbone.state_dict().items()}, of_best)
    assert not torch.equal(method.student.backbone.stages[0][0].weight, backbone.stages[0][0].weight)


def test_nothing_is_left_of_a_trial_run(tmp_path):
    fit(tmp_path, RunFolder(), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_no_picture_and_no_checkpoint_where_none_is_wanted(tmp_path):
    fit(tmp_path, RunFolder(picture_rows=0), enable_checkpointing=False)
    assert {path.name for path in tmp_path.iterdir()} == {"backbone.safetensors", "curves.png", "metrics.csv"}


def test_errors():
    with pytest.raises(ValueError, match="`picture_rows` must be at least 0"):
        RunFolder(picture_rows=-1)
