import pytest
import torch
from harness import PerStep, StoredViews, quiet_trainer
from lightning.pytorch import Callback, LightningDataModule
from small_methods import small_ibot
from torch.utils.data import DataLoader

from ssl_distill.augment.masked_crop import MaskedCropAugment
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.backbones.create import create_backbone
from ssl_distill.heads.prototype import PrototypeHead, UnitPrototypes
from ssl_distill.heads.token import SeparateTokenHead, TokenHead
from ssl_distill.methods.ibot import IBOT
from ssl_distill.views import MaskedCrops

EXPECT = {"rtol": 1e-9, "atol": 1e-8}


class StoredRun(LightningDataModule):
    """The views of every step of a golden run."""

    def __init__(self, case):
        super().__init__()
        self.case = case

    def train_dataloader(self):
        steps = self.case.params["steps_per_epoch"]
        first = self.trainer.current_epoch * steps
        return DataLoader([self.views(step) for step in range(first, first + steps)], batch_size=None)

    def views(self, step):
        num_global = self.case.params["global_crops"]
        crops = [self.case.tensors[f"step{step}/view_{i}"] for i in range(num_global + self.case.params["local_crops"])]
        masked = self.case.tensors[f"step{step}/masks"].flatten(2)
        return MaskedCrops(torch.stack(crops[:num_global]), torch.stack(crops[num_global:]), masked)


class PerEpoch(PerStep):
    def at(self, position):
        return self.values[position.epoch]


class Recorder(Callback):
    """What the golden file tells of every step; stops where it does."""

    def __init__(self, names):
        self.names, self.steps = names, []

    def on_after_backward(self, trainer, pl_module):
        parameters = dict(pl_module.student.named_parameters())
        parameters["backbone.masked_embed"] = pl_module.mask_token
        self.norms = torch.stack([parameters[name].grad.norm() for name in self.names])

    def on_train_batch_end(self, trainer, pl_module, *args):
        metrics = {name: trainer.callback_metrics[f"train/{name}"] for name in ("loss", "class", "patch")}
        centers = {"center": pl_module.class_center.value.clone(), "center2": pl_module.patch_center.value.clone()}
        student = {name: value.clone() for name, value in pl_module.student.state_dict().items()}
        student["backbone.masked_embed"] = pl_module.mask_token.detach().clone()
        self.steps.append({**metrics, **centers, "norms": self.norms, "student": student})
        trainer.should_stop = len(self.steps) == 2

    def on_train_batch_start(self, trainer, pl_module, *args):
        if self.steps:  # now the teacher has moved: the method's callbacks come after this one
            teacher = pl_module.teacher.state_dict()
            self.steps[-1].setdefault("teacher", {name: value.clone() for name, value in teacher.items()})

    def on_train_end(self, trainer, pl_module):
        self.on_train_batch_start(trainer, pl_module)


def golden_ibot(case):
    params = case.params
    backbone = create_backbone(
        "vit_small_patch16_224",
        position_mode="dino_v1",
        **{name: params[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")},
    )
    sizes = {"hidden_dim": params["hidden_dim"], "bottleneck_dim": params["bottleneck_dim"]}
    prototypes = {"prototypes": UnitPrototypes} if params["norm_last_layer"] else {}
    kind = TokenHead if params["shared_head"] else SeparateTokenHead
    method = IBOT(
        backbone,
        num_prototypes=params["out_dim"],
        head=lambda in_dim, num_prototypes: kind(in_dim, num_prototypes, **sizes, **prototypes),
        augment=StoredViews(),
        reference_batch=None,
        learning_rate=PerStep(params["lr"]),
        weight_decay=PerStep(params["weight_decay"]),
        momentum=PerStep(params["momentum"]),
        student_temperature=params["student_temp"],
        teacher_temperature=PerEpoch(params["teacher_temp"]),
        patch_temperature=PerEpoch(params["teacher_patch_temp"]),
        freeze_last_layer_epochs=params["freeze_last_layer_epochs"],
        clip_norm=params["clip_grad"],
    ).double()
    student = case.under("student_0/")
    method.mask_token.data.copy_(student.pop("backbone.masked_embed"))
    method.student.load_state_dict(student)
    method.teacher.load_state_dict(case.under("teacher_0/"))
    return method


def test_golden(golden, tmp_path):
    case = golden("ibot/train_two_steps")
    method = golden_ibot(case)
    recorder = Recorder(case.params["grad_norm_order"])
    options = {"max_epochs": case.params["epochs"], "reload_dataloaders_every_n_epochs": 1, "precision": "64-true"}
    quiet_trainer(tmp_path, [recorder], **options).fit(method, StoredRun(case))
    assert len(recorder.steps) == 2
    for step, seen in enumerate(recorder.steps):
        expected = case.under(f"step{step}/")
        torch.testing.assert_close(seen["loss"], expected["loss"], **EXPECT)
        torch.testing.assert_close(seen["class"], expected["cls"], **EXPECT)
        torch.testing.assert_close(seen["patch"], expected["patch"], **EXPECT)
        torch.testing.assert_close(seen["center"], expected["center"], **EXPECT)
        torch.testing.assert_close(seen["center2"], expected["center2"][0], **EXPECT)
        torch.testing.assert_close(seen["norms"], expected["grad_norms_before_clip"], **EXPECT)
        for network in ("student", "teacher"):
            weights = case.under(f"{network}_{step + 1}/")
            assert weights.keys() == seen[network].keys()
            for name, value in weights.items():
                torch.testing.assert_close(
                    seen[network][name], value, **EXPECT, msg=lambda text, n=name: f"{n}: {text}"
                )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IBOT("convnet_nano"), "`backbone` must be one of timm's plain ViTs, .+, got ConvNetNano; try"),
        (lambda: IBOT("vit_nano_patch8_32"), "`augment.patch_size` must be that of the backbone, 8 x 8 pixels, got 16"),
        (
            lambda: small_ibot(head=PrototypeHead),
            "`head` must make a TokenHead or SeparateTokenHead, got PrototypeHead",
        ),
        (
            lambda: MaskedCropAugment(MultiCropAugment(global_size=30), patch_size=8),
            "`global_size` must be a multiple of `patch_size` 8, got 30; try 24 or 32",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
