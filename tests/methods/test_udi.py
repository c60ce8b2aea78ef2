import pytest
import torch
from harness import PerStep, StoredViews, quiet_trainer
from lightning.pytorch import Callback, LightningDataModule
from small_methods import aligned_crops, small_udi
from torch import nn
from torch.utils.data import DataLoader

from ssl_distill.backbones.create import create_backbone
from ssl_distill.data.shapes import ShapesData
from ssl_distill.heads.prototype import PrototypeHead, UnitPrototypes
from ssl_distill.heads.srs import SampledAttention
from ssl_distill.heads.token import TokenHead
from ssl_distill.methods.udi import UDI
from ssl_distill.optim.parameters import adamw, clip_each_tensor
from ssl_distill.optim.schedules import Cosine, EpochRamp, Position
from ssl_distill.targets.consolidated import Consolidation, shrink_where_empty
from ssl_distill.views import AlignedCrops, TokenPositions

SRS_NAMES = {"srs.attn.qkv.": "srs.qkv.", "srs.attn.proj.": "srs.proj.", "srs.attn.norm.": "srs.norm2."}


def positions_of(maps):
    """Dense maps over all tokens, as positions of which each is a sum over all."""
    return TokenPositions(torch.arange(maps.shape[-1]).expand(maps.shape), maps)


class StoredRun(LightningDataModule):
    """One step per epoch."""

    def __init__(self, case):
        super().__init__()
        self.case = case

    def train_dataloader(self):
        return DataLoader([self.views(self.trainer.current_epoch)], batch_size=None)

    def views(self, step):
        tensors = {name: value.double() for name, value in self.case.under(f"step{step}_").items()}
        local = tensors["tgt_map_local"].unflatten(0, (-1, 2))  # (L, 2, B, S, N)
        return AlignedCrops(
            tensors["global_crops"],
            tensors["local_crops"],
            positions_of(tensors["src_map_global"]),
            positions_of(tensors["tgt_map_global"]),
            positions_of(local),
        )


def our_names(weights):
    """Official weights of a branch by our names."""
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in {"vit.": "backbone.", **SRS_NAMES}.items():
            if name.startswith(theirs):
                name = f"{ours}{name.removeprefix(theirs)}"
        renamed[name] = value
    tokens = renamed.pop("backbone.cls_token")
    return {**renamed, "backbone.cls_token": tokens[:, :1], "backbone.reg_token": tokens[:, 1:]}


class Recorder(Callback):
    def __init__(self):
        self.losses, self.centers = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.student = pl_module.student(batch.global_crops, batch.local_crops, batch.own)
            self.patch_logits = pl_module.student.prototypes(self.student.patch_vectors)
            self.teacher = pl_module.teacher.teach(batch.global_crops, batch.other, batch.local)
            self.teacher_patches = [
                pl_module.teacher.prototypes(points.vectors)
                for points in (self.teacher.points, self.teacher.local_points)
            ]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())
        targets = pl_module.targets
        centers = [targets.class_center, targets.plus_center, targets.patch_center]
        self.centers.append(torch.cat([center.value.clone() for center in centers]))


def golden_udi(case):
    params = case.params
    prototypes = {"prototypes": UnitPrototypes} if params["norm_last_layer"] else {}
    backbone_kwargs = {
        "img_size": params["gsize"],
        "patch_size": params["patch"],
        "embed_dim": params["dim"],
        "depth": params["depth"],
        "num_heads": params["heads"],
        "mlp_ratio": params["mlp_ratio"],
        "position_mode": "dino_v1",
    }
    method = UDI(
        "vit_small_patch16_224",
        backbone_kwargs,
        drop_path_rate=0.0,
        num_prototypes=params["K"],
        head=lambda dim, count: TokenHead(
            dim, count, hidden_dim=params["hidden"], bottleneck_dim=params["bott"], **prototypes
        ),
        srs=lambda dim, num_heads: SampledAttention(dim, params["srs_heads"]),
        targets=lambda count: Consolidation(
            count, params["center_momentum"], params["alpha"], empty_share=shrink_where_empty
        ),
        augment=StoredViews(),
        reference_batch=None,
        learning_rate=PerStep(params["lr"]),
        weight_decay=PerStep(params["wd"]),
        momentum=PerStep(params["mom"]),
        student_temperature=params["student_temp"],
        teacher_temperature=PerStep(params["temps"]),
        freeze_last_layer_epochs=params["freeze_last_layer_epochs"],
        clip_norm=params["clip"],
    ).double()
    method.student.load_state_dict(our_names(case.under("student_in.")))
    method.teacher.load_state_dict(our_names(case.under("teacher_in.")))
    return method


def test_golden(golden, tmp_path):
    case = golden("udi/train_step")
    method, recorder = golden_udi(case), Recorder()
    options = {"max_epochs": len(case.tensors["losses"]), "reload_dataloaders_every_n_epochs": 1}
    trainer = quiet_trainer(tmp_path, [recorder], precision="64-true", **options)
    trainer.fit(method, StoredRun(case))
    tensors = case.tensors
    expect = {"rtol": 1e-7, "atol": 1e-9}
    first = case.under("step0_")
    for level, logits in {"cls": recorder.student.class_logits, "plus": recorder.student.plus_logits}.items():
        expected = torch.cat([first[f"student_{level}_global"], first[f"student_{level}_local"]])
        torch.testing.assert_close(logits.flatten(0, 1).detach(), expected, **expect)
    torch.testing.assert_close(recorder.patch_logits.flatten(0, 1).detach(), first["student_patch_global"], **expect)
    torch.testing.assert_close(recorder.teacher.class_logits.flatten(0, 1), first["teacher_cls"], **expect)
    points, local_points = recorder.teacher_patches
    torch.testing.assert_close(points.flatten(0, 1), first["teacher_patch_global"], **expect)
    torch.testing.assert_close(local_points.flatten(1, 2), first["teacher_patch_local"], **expect)

    torch.testing.assert_close(torch.stack(recorder.losses), tensors["losses"], **expect)
    for step, centers in enumerate(recorder.centers):
        torch.testing.assert_close(centers, tensors[f"step{step}_center_out"], **expect)
    for branch in ("student", "teacher"):
        state = getattr(method, branch).state_dict()
        for name, value in our_names(case.under(f"{branch}_out.")).items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_golden_schedules(golden):
    case = golden("udi/schedules")
    for name in ("lr", "weight_decay", "momentum"):
        params = case.params[name]
        curve = Cosine(params["base"], params["final"], params["warmup_epochs"], params["start"])
        steps, total = params["iters_per_epoch"], params["iters_per_epoch"] * params["epochs"]
        values = [curve.at(Position(step, total, steps)) for step in range(total)]
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), case.tensors[name], rtol=0, atol=1e-9)
    params = case.params["teacher_temp"]
    ramp = EpochRamp(params["start"], params["end"], params["warmup_epochs"])
    values = [ramp.at(Position(epoch, params["epochs"], 1)) for epoch in range(params["epochs"])]
    expected = case.tensors["teacher_temp"]
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected, rtol=0, atol=1e-9)


def test_golden_clipping(golden):
    case = golden("udi/clip_per_param")
    parameters = {}
    for name, gradient in case.under("grad_in_").items():
        parameters[name] = nn.Parameter(torch.zeros_like(gradient))
        parameters[name].grad = gradient.clone()
    clip_each_tensor(parameters.values(), case.params["clip"])
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, case.tensors[f"grad_out_{name}"], rtol=1e-6, atol=1e-9)


def test_golden_head(golden):
    case = golden("udi/head")
    params, tensors = case.params, case.tensors
    head = TokenHead(
        params["in_dim"],
        params["out_dim"],
        hidden_dim=params["hidden"],
        bottleneck_dim=params["bottleneck"],
        num_layers=params["nlayers"],
    ).double()
    head.load_state_dict(case.under("w."))
    x = tensors["x"].clone().requires_grad_()
    out = PrototypeHead.forward(head, x.flatten(0, 1)).unflatten(0, x.shape[:2])
    torch.testing.assert_close(out.detach(), tensors["out"], rtol=1e-6, atol=1e-9)
    (out * tensors["cotangent"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad_x"], rtol=1e-6, atol=1e-9)
    for name, gradient in case.under("grad.").items():
        torch.testing.assert_close(head.get_parameter(name).grad, gradient, rtol=1e-6, atol=1e-9)


class GradientRecorder(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.without = [n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(("num_local", "precision"), [(0, "32-true"), (2, "32-true"), (2, "bf16-mixed")])
def test_trains(num_local, precision, tmp_path):
    recorder = GradientRecorder()
    method = small_udi(augment=aligned_crops(num_local=num_local))
    trainer = quiet_trainer(tmp_path, [recorder], max_epochs=2, precision=precision)
    trainer.fit(method, ShapesData(num_images=27, batch_size=8, bank_size=20, query_size=10))
    assert all(value.isfinite().all() for value in method.state_dict().values())
    assert recorder.without == []
    assert method.targets.patch_center.value.abs().sum() > 0
    assert all(value.isfinite() for value in method.monitor().values())
    assert 0 < method.monitor()["points_per_crop"] <= 4


def test_evaluation_takes_the_first_class_token_and_patches_start_behind_both():
    encoder = small_udi().eval().encoders()["teacher"]
    images = torch.randn(2, 3, 32, 32)
    tokens = encoder.tokens(images)
    assert tokens.class_tokens.shape[1] == 2
    torch.testing.assert_close(encoder(images), tokens.class_tokens[:, 0])
    all_tokens = encoder.forward_features(images)
    torch.testing.assert_close(tokens.patch_tokens, all_tokens[:, 2:])
    assert tokens.patch_tokens.shape[1] == 16


def test_class_tokens_are_clipped_together():
    method = small_udi(clip_norm=1.0)
    backbone = method.student.backbone
    tokens = [backbone.cls_token, backbone.reg_token]
    for token in tokens:
        token.grad = torch.full_like(token, 3.0)
    backbone.pos_embed.grad = torch.full_like(backbone.pos_embed, 3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UDI, "clip_gradients", lambda *args, **kwargs: None)
        method.configure_gradient_clipping(adamw(method.student.parameters()), gradient_clip_val=None)
    norms = [token.grad.norm() for token in tokens]
    torch.testing.assert_close(torch.stack(norms).norm(), torch.tensor(1.0))
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(backbone.pos_embed.grad.norm(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backbone": "convnet_nano", "backbone_kwargs": {"num_class_tokens": 1}}, "must be one of timm's plain ViTs"),
        ({"backbone": create_backbone("vit_nano_patch8_32")}, "`backbone` must have 2 class tokens, got 1"),
        ({"head": PrototypeHead}, "`head` must make a TokenHead, got PrototypeHead"),
        ({"augment": aligned_crops(patch_size=4)}, "`augment.patch_size` must be that of the backbone, 8 .* got 4"),
        ({"srs": lambda dim, heads: SampledAttention(dim, 5)}, "`num_heads` must divide the width 64"),
        ({"clip_norm": -1.0}, "`clip_norm` must be at least 0"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_udi(**kwargs)
