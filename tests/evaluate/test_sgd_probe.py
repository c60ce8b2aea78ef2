import pytest
import timm
import torch
from lightning.pytorch import Callback, Trainer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader

from ssl_distill.backbones.create import create_backbone
from ssl_distill.data.batch import LabelledBatch
from ssl_distill.evaluate.sgd_probe import ClassAndMeanPatchToken, LastClassTokens, SGDLinearProbe


def loader(images, labels, batch_size):
    batches = [LabelledBatch(*row) for row in zip(images, labels, torch.arange(len(labels)), strict=True)]
    return DataLoader(batches, batch_size=batch_size)


class Recorder(Callback):
    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_epoch_end(self, trainer, pl_module):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def fit(probe, train, val, epochs, folder, **trainer_arguments):
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[recorder],
        **trainer_arguments,
    )
    trainer.fit(probe, train, val)
    return recorder, trainer


def test_golden(golden, tmp_path):
    """Official steps on stored features; a second head with another rate must not disturb the first."""
    case = golden("dino/linear_probe_sgd")
    tensors, params = case.tensors, case.params
    num_classes, feature_dim = tensors["w0"].shape
    probe = SGDLinearProbe(
        nn.Identity(),
        feature_dim,
        num_classes,
        prepare=nn.Identity(),
        learning_rates=(params["base_lr"], 3 * params["base_lr"]),
    ).double()
    with torch.no_grad():
        for head in probe.heads:
            head.weight.copy_(tensors["w0"])
            head.bias.copy_(tensors["b0"])
    data = loader(tensors["features"], tensors["labels"], params["batch_size"])
    single_losses = []
    probe.log_dict = lambda values, **_: single_losses.append(values)  # the heads' own losses
    recorder, trainer = fit(probe, data, None, params["epochs"], tmp_path, precision="64-true")
    for group in trainer.optimizers[0].param_groups:
        assert (group["momentum"], group["weight_decay"]) == (params["momentum"], params["weight_decay"])

    expect = {"rtol": 1e-6, "atol": 1e-9}
    losses = torch.stack([values[f"probe/loss_lr{params['base_lr']:g}"] for values in single_losses])
    torch.testing.assert_close(losses, tensors["losses"], **expect)
    rates = torch.tensor(recorder.rates, dtype=torch.float64)
    torch.testing.assert_close(rates[:, 0], tensors["lr_per_epoch"], **expect)
    torch.testing.assert_close(probe.heads[0].weight, tensors["w_final"], **expect)
    torch.testing.assert_close(probe.heads[0].bias, tensors["b_final"], **expect)
    assert not torch.allclose(probe.heads[1].weight, tensors["w_final"], rtol=1e-2)


def test_golden_features(golden):
    case = golden("dino/linear_features")
    tensors, params = case.tensors, case.params
    vit = VisionTransformer(
        img_size=params["img_size"],
        patch_size=params["patch_size"],
        embed_dim=params["embed_dim"],
        depth=params["depth"],
        num_heads=params["num_heads"],
        num_classes=0,
    )
    vit.load_state_dict(case.under("state."))
    vit.eval()
    expect = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(LastClassTokens(vit, 4)(tensors["images"]), tensors["feat_n4"], **expect)
        torch.testing.assert_close(LastClassTokens(vit, 1)(tensors["images"]), tensors["feat_n1"], **expect)
        interleaved = ClassAndMeanPatchToken(vit)(tensors["images"])
        torch.testing.assert_close(interleaved, tensors["feat_n1_avgpool"], **expect)


def test_last_class_token_is_the_backbones_own_output():
    vit = create_backbone("vit_nano_patch8_32").eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(LastClassTokens(vit, 1)(images), vit(images))


class Blobs(nn.Module):
    """A frozen encoder with a norm that would change while training."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, images):
        return self.norm(images.flatten(1))


def blob_images(num, seed):
    labels = torch.arange(num) % 3
    noise = torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.eye(3, 4)[labels] * 4 + 0.3 * noise)[:, :, None], labels


def test_probe_learns_and_the_encoder_stays(tmp_path):
    encoder = Blobs()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    probe = SGDLinearProbe(encoder, 4, 3, prepare=nn.Identity(), learning_rates=(1e-4, 1.0), reference_batch=8)
    _, trainer = fit(probe, loader(*blob_images(60, 0), 8), loader(*blob_images(30, 1), 7), 3, tmp_path)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    scores = trainer.callback_metrics
    assert scores["probe/top1"] == scores["probe/top1_lr1"] == 1
    assert scores["probe/best_top1_lr0.0001"] >= scores["probe/top1_lr0.0001"]
    assert scores["probe/best_top1"] == 1


def test_training_sees_augmented_images_and_validation_does_not(tmp_path):
    prepared, augmented = [], []

    def prepare(images):
        prepared.append(images)
        return images

    def augment(batch, draws):
        augmented.append((batch.index.tolist(), draws.epoch))
        return batch

    probe = SGDLinearProbe(nn.Flatten(), 4, 3, prepare, augment, learning_rates=(0.1,))
    data = loader(*blob_images(6, 0), 3)
    fit(probe, data, data, 2, tmp_path, num_sanity_val_steps=0)
    assert augmented == [([0, 1, 2], 0), ([3, 4, 5], 0), ([0, 1, 2], 1), ([3, 4, 5], 1)]
    torch.testing.assert_close(torch.cat(prepared), blob_images(6, 0)[0].repeat(2, 1, 1))


def test_heads_start_small():
    weight = torch.cat([head.weight for head in SGDLinearProbe(nn.Identity(), 500, 40, nn.Identity()).heads])
    assert weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "`num_classes` must be at least 1, got 0"),
        ({"feature_dim": 0}, "`feature_dim` must be at least 1, got 0"),
        ({"reference_batch": 0}, "`reference_batch` must be at least 1, got 0"),
        ({"learning_rates": ()}, r"`learning_rates` must be one or more different positive numbers, got \(\)"),
        ({"learning_rates": (0.1, -1)}, r"`learning_rates` must be one or more different positive numbers"),
        ({"learning_rates": (0.1, 0.1)}, r"`learning_rates` must be one or more different positive numbers"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        SGDLinearProbe(nn.Identity(), **({"feature_dim": 2, "num_classes": 3, "prepare": nn.Identity()} | arguments))


def test_token_errors():
    vit = create_backbone("vit_nano_patch8_32")
    depth = len(vit.blocks)
    with pytest.raises(
        ValueError, match=f"`num_blocks` must lie in 1 to {depth}, the backbone's depth, got {depth + 1}"
    ):
        LastClassTokens(vit, depth + 1)
    with pytest.raises(ValueError, match="`backbone` must be a timm vision transformer with a class token, got ResNet"):
        ClassAndMeanPatchToken(timm.create_model("resnet18", num_classes=0))


def test_length_of_the_run_is_needed(tmp_path):
    probe = SGDLinearProbe(nn.Flatten(), 4, 3, prepare=nn.Identity())
    with pytest.raises(ValueError, match=r"`trainer.max_epochs` must be set"):
        fit(probe, loader(*blob_images(6, 0), 3), None, -1, tmp_path, max_steps=2)
