import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.callbacks.start_from import StartFrom
from ssl_distill.data.shapes import ShapesData
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.methods.dino import DINO
from ssl_distill.optim.schedules import Cosine


def head(in_dim, num_prototypes):
    return PrototypeHead(in_dim, num_prototypes, hidden_dim=16, bottleneck_dim=8)


class AtStart(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


def fit(folder, seed, *callbacks, num_prototypes=16, ckpt_path=None, max_steps=2):
    pl.seed_everything(seed, verbose=False)
    augment = MultiCropAugment(global_size=32, num_local=0)
    method = DINO(
        "vit_nano_patch8_32", num_prototypes=num_prototypes, head=head, augment=augment,
        momentum=Cosine(0.9, 1.0), learning_rate=Cosine(1e-3, 1e-5),
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
        max_steps=max_steps,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    trainer.fit(method, ShapesData(num_images=16, batch_size=8), ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in method.state_dict().items()}


def test_student_of_one_run_and_teacher_of_another(tmp_path):
    first, second = (fit(tmp_path / str(seed), seed) for seed in (1, 2))
    paths = [str(tmp_path / f"{seed}" / "step=2.ckpt") for seed in (1, 2)]
    start = AtStart()
    fit(tmp_path / "new", 3, StartFrom(*paths), start)
    for name, value in start.state.items():
        expected = first if name.startswith("student.") else second  # the center comes with its teacher
        assert torch.equal(value, expected[name]), name
    assert "targets.value" in start.state

    fit(tmp_path / "alone", 3, StartFrom(paths[0]), start)
    scratch = AtStart()
    fit(tmp_path / "scratch", 3, scratch)
    for name, value in start.state.items():
        assert torch.equal(value, (first if name.startswith("student.") else scratch.state)[name]), name


def test_other_shapes_stay_as_they_were_drawn(tmp_path):
    first = fit(tmp_path / "first", 1)
    start, scratch = AtStart(), AtStart()
    path = str(tmp_path / "first" / "step=2.ckpt")
    fit(tmp_path / "wider", 3, StartFrom(path, path), start, num_prototypes=24)
    fit(tmp_path / "scratch", 3, scratch, num_prototypes=24)
    for name, value in start.state.items():
        expected = first[name] if first[name].shape == value.shape else scratch.state[name]
        assert torch.equal(value, expected), name


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_goes_on(tmp_path):
    fit(tmp_path / "first", 1)
    begin = StartFrom(str(tmp_path / "first" / "step=2.ckpt"))
    whole = fit(tmp_path / "whole", 3, begin)
    resumed = fit(tmp_path / "resumed", 3, begin, ckpt_path=tmp_path / "whole" / "step=1.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"`student` none\.ckpt does not exist"):
        StartFrom("none.ckpt")
    (tmp_path / "there.ckpt").touch()
    with pytest.raises(ValueError, match=r"`teacher` none\.ckpt does not exist"):
        StartFrom(str(tmp_path / "there.ckpt"), "none.ckpt")
