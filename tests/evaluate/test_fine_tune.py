import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from ssl_distill.backbones.create import create_backbone
from ssl_distill.data.labelled import LabelledData
from ssl_distill.data.shapes import ShapesData
from ssl_distill.evaluate.fine_tune import FineTune, classifier
from ssl_distill.evaluate.probe_crop import ProbeCrop
from ssl_distill.export import export_backbone
from ssl_distill.optim.schedules import EpochCosine

SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


def test_golden(golden):
    """Mean patch token behind a norm of its own, and class token behind the final norm."""
    case = golden("dbot/finetune_forward")
    sizes = {name: case.params[name] for name in SIZES}
    images = case.tensors["images"].double()
    for name, pool in {"avg": "avg", "cls": "token"}.items():
        kwargs = {**sizes, "global_pool": pool}
        model = classifier(case.params["num_classes"], "vit_small_patch16_224", kwargs).double().eval()
        model.load_state_dict(case.under(f"w_{name}."))
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        expect = {"rtol": 1e-6, "atol": 1e-9}
        torch.testing.assert_close(features, case.tensors[f"features_{name}"], **expect)
        torch.testing.assert_close(model(images), case.tensors[f"logits_{name}"], **expect)


def test_golden_layer_decay(golden):
    case = golden("dbot/layer_decay")
    params = case.params
    kwargs = {"img_size": 32, "depth": params["depth"]}
    method = FineTune(3, "vit_tiny_patch16_224", kwargs, layer_decay=params["layer_decay"])
    names = {id(parameter): name for name, parameter in method.classifier.named_parameters()}
    groups = method.configure_optimizers().param_groups
    ours = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert ours.keys() == set(params["names"])
    for i, name in enumerate(params["names"]):
        assert ours[name]["lr_scale"] == pytest.approx(float(case.tensors["lr_scale"][i]), abs=1e-9)
        decay = params["weight_decay"] if ours[name]["decayed"] else 0.0
        assert decay == float(case.tensors["weight_decay"][i]), name


def small_fine_tune(num_classes=4, **kwargs):
    options = {
        "augment": ProbeCrop(32, scale=(0.5, 1.0)),
        "learning_rate": EpochCosine(3e-3, 1e-6, warmup_epochs=0.5),
        "reference_batch": None,
    }
    return FineTune(num_classes, "vit_nano_patch8_32", **{**options, **kwargs})


def fit(folder, callbacks=(), ckpt_path=None, max_epochs=2, **kwargs):
    pl.seed_everything(0, verbose=False)
    images = ShapesData(num_images=40, bank_size=33, query_size=30)
    method = small_fine_tune(images.num_classes, **kwargs)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(method, LabelledData(images, batch_size=8), ckpt_path=ckpt_path)
    return method, trainer


class Crash(Exception):
    """The machine went down."""


class StopAt(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            raise Crash


def test_resume_is_bit_equal(tmp_path):
    def save_every_step():
        return ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)

    whole, trainer = fit(tmp_path / "whole")
    assert 0 <= trainer.callback_metrics["val/top1"] <= 1
    with pytest.raises(Crash):
        fit(tmp_path, [save_every_step(), StopAt()])
    resumed, _ = fit(tmp_path, [save_every_step()], tmp_path / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_learns_the_labels(tmp_path):
    options = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "drop_path_rate": 0.0, "layer_decay": 1.0}
    _, trainer = fit(tmp_path, max_epochs=30, augment=ProbeCrop(32, scale=(1.0, 1.0)), **options)
    assert trainer.callback_metrics["train/loss"] < 1.5  # ln 10 is 2.3


def test_upper_layers_move_faster(tmp_path):
    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.groups = [dict(group) for group in trainer.optimizers[0].param_groups]

    rates = Rates()
    fit(tmp_path, [rates], max_epochs=1)
    top = max(group["lr"] for group in rates.groups)
    assert min(group["lr"] for group in rates.groups) == pytest.approx(top * 0.65**4)
    assert {group["weight_decay"] for group in rates.groups} == {0.0, 0.05}


def test_pretrained_weights_are_found(tmp_path):
    encoder = create_backbone("vit_nano_patch8_32", global_pool="avg", fc_norm=False)
    path = tmp_path / "backbone.safetensors"
    export_backbone(encoder, path)
    model = classifier(5, "vit_nano_patch8_32", checkpoint=str(path))
    for name, value in encoder.state_dict().items():
        if not name.startswith("norm."):
            assert torch.equal(model.state_dict()[name], value), name
    assert model.fc_norm.weight.eq(1).all()
    larger = classifier(5, "vit_nano_patch8_32", {"img_size": 64}, checkpoint=str(path))
    assert larger.pos_embed.shape == (1, 65, 64)
    with_token = classifier(5, "vit_nano_patch8_32", {"global_pool": "token"}, checkpoint=str(path))
    assert torch.equal(with_token.norm.weight, encoder.norm.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small_fine_tune(mixup=-1.0), r"`mixup` must be at least 0 \(0: none\), got -1.0"),
        (lambda: small_fine_tune(cutmix=-1.0), "`cutmix` must be at least 0"),
        (lambda: small_fine_tune(label_smoothing=1.0), "`label_smoothing` must be at least 0 and below 1, got 1.0"),
        (lambda: small_fine_tune(layer_decay=0.0), "`layer_decay` must be above 0"),
        (lambda: classifier(0, "vit_nano_patch8_32"), "`num_classes` must be at least 1, got 0"),
        (lambda: classifier(2, nn.Flatten()), "`backbone` must be one of timm's plain ViTs, got Flatten"),
        (lambda: classifier(2, "vit_nano_patch8_32", checkpoint="no.pth"), "`checkpoint` no.pth does not exist"),
        (
            lambda: classifier(2, create_backbone("vit_nano_patch8_32"), checkpoint="some.pth"),
            "`checkpoint` must be left out for a `backbone` module",
        ),
        (lambda: LabelledData(ShapesData(num_images=8), batch_size=0), "`batch_size` must be at least 1, got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
