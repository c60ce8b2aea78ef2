from types import SimpleNamespace

import pytest
import torch
from harness import Crash, StoredViews, quiet_trainer
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from masked_weights import our_names
from small_methods import small_dbot, small_decoder
from torch import nn
from torch.utils.data import DataLoader

from ssl_distill.augment.masked_image import MaskedImageAugment, divide_patches
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.feature_teacher import FrozenFeatures
from ssl_distill.callbacks.staged_teacher import StagedTeacher, remember
from ssl_distill.data.shapes import ShapesData
from ssl_distill.export import export_backbone, load_backbone
from ssl_distill.heads.decoder import FeatureDecoder
from ssl_distill.methods.dbot import DBOT, dbot_adamw
from ssl_distill.optim.parameters import decay_groups
from ssl_distill.optim.schedules import Cosine, EpochCosine
from ssl_distill.views import MaskedImages


class StoredRun(LightningDataModule):
    """Images and divisions of every step of a golden run."""

    def __init__(self, case):
        super().__init__()
        self.case = case

    def train_dataloader(self):
        steps = self.case.params["iters_per_epoch"]
        first = self.trainer.current_epoch * steps
        return DataLoader([self.views(step) for step in range(first, first + steps)], batch_size=None)

    def views(self, step):
        noise = self.case.tensors["noise"][step]
        images = self.case.tensors["images"][step].double()
        return MaskedImages(images, *divide_patches(noise, self.case.params["mask_ratio"]))


class StoredWeights:
    """In place of random weights: those that the golden run started its stages with."""

    def __init__(self, case):
        self.case, self.prefix = case, "student_in."

    def __call__(self, student, generator):
        state = our_names(self.case.under(self.prefix))
        assert student.load_state_dict(state, strict=False).unexpected_keys == []


class Recorder(Callback):
    def __init__(self):
        self.losses, self.norms, self.rates, self.at_epoch_end = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # before they are clipped
        gradients = [parameter.grad.norm() for parameter in pl_module.student.parameters() if parameter.requires_grad]
        self.norms.append(torch.stack(gradients).norm())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer, pl_module):
        state = pl_module.student.state_dict()
        self.at_epoch_end.append({name: value.clone() for name, value in state.items()})


def golden_dbot(case):
    params = case.params
    sizes = {name: params[name] for name in ("img_size", "patch_size", "embed_dim", "num_heads", "mlp_ratio", "depth")}
    assert params["norm_feature_loss"]
    assert not params["tlayernorm"]
    assert not params["optimizer_state_reset"]
    weights = StoredWeights(case)
    method = DBOT(
        "vit_small_patch16_224",
        sizes,
        drop_path_rate=0.0,
        decoder=lambda *arguments: FeatureDecoder(
            *arguments,
            decoder_dim=params["decoder_embed_dim"],
            depth=params["decoder_depth"],
            num_heads=params["decoder_num_heads"],
            mlp_ratio=params["mlp_ratio"],
        ),
        initial_teacher_depth=params["init_teacher_encoder_depth"],
        stage_starts=params["stage_epochs"][:-1],
        initialize=weights,
        restart_optimizer=remember,
        augment=StoredViews(),
        optimizer=lambda groups: torch.optim.AdamW(groups, betas=params["betas"]),
        learning_rate=EpochCosine(params["lr"], params["min_lr"], params["warmup_epochs"]),
        weight_decay=Cosine(params["weight_decay"], params["weight_decay"]),
        reference_batch=None,
        global_clip_norm=params["clip_grad"],
    ).double()
    weights(method.student, None)  # once more: the first time they were rounded to float32
    method.teacher.backbone.load_state_dict(method.student.backbone.state_dict())
    weights.prefix = "student_reinit."
    return method


def test_golden(golden, tmp_path):
    case = golden("dbot/two_stage_run")
    method, recorder = golden_dbot(case), Recorder()
    trainer = quiet_trainer(
        tmp_path,
        [recorder],
        max_epochs=case.params["stage_epochs"][-1],
        reload_dataloaders_every_n_epochs=1,
        precision="64-true",
    )
    trainer.fit(method, StoredRun(case))
    tensors = case.tensors
    torch.testing.assert_close(torch.stack(recorder.losses), tensors["losses"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(torch.tensor(recorder.rates, dtype=torch.float64), tensors["lr"], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(torch.stack(recorder.norms), tensors["grad_norms"], rtol=1e-6, atol=1e-9)
    switch = case.params["stage_epochs"][1] - 1
    expect = {"rtol": 0, "atol": 1e-6}
    for name, value in our_names(case.under("student_end_of_stage1.")).items():
        torch.testing.assert_close(recorder.at_epoch_end[switch][name], value, **expect)
    for name, value in our_names(case.under("student_out.")).items():
        torch.testing.assert_close(method.student.state_dict()[name], value, **expect)


def test_golden_groups(golden):
    """Who is decayed, by the official names."""
    case = golden("dbot/param_groups_pretrain")
    depth, decoder_depth = (
        len({name.split(".")[1] for name in case.params["names"] if name.startswith(prefix)})
        for prefix in ("blocks.", "decoder_blocks.")
    )
    method = small_dbot(
        backbone_kwargs={"depth": depth},
        decoder=lambda *sizes: FeatureDecoder(*sizes, decoder_dim=16, depth=decoder_depth),
    )
    names = {id(parameter): name.removeprefix("student.") for name, parameter in method.named_parameters()}
    ours = {names[id(p)]: int(group["decayed"]) for group in decay_groups(method) for p in group["params"]}
    groups = zip(case.params["names"], case.tensors["group"].tolist(), strict=True)
    assert ours == our_names({name: group for name, group in groups if group >= 0})


def test_golden_teacher_depth(golden):
    """The last of the official depths is no stage's."""
    case = golden("dbot/stage_plan")
    for params in case.params["cases"]:
        *starts, end = params["stage_epochs"]
        depths = params["depth"][: len(starts)]
        method = small_dbot(
            backbone_kwargs={"depth": max(depths)},
            initial_teacher_depth=params["init_teacher_encoder_depth"],
            stage_starts=starts,
            depths=depths,
        )
        trainer = SimpleNamespace(current_epoch=0, optimizers=[])
        switches, found = StagedTeacher(starts), []
        for trainer.current_epoch in range(end):
            switches.on_train_epoch_start(trainer, method)
            found.append((method.teacher.depth, len(method.encoders()["student"].blocks)))
        stages = case.tensors[f"{params['key']}_stage_index"].tolist()
        teachers = case.tensors[f"{params['key']}_teacher_depth"].tolist()
        assert found == [(teacher, depths[stage]) for teacher, stage in zip(teachers, stages, strict=True)]


def fit(folder, callbacks=(), ckpt_path=None, method_options=None, **kwargs):
    seed_everything(0, verbose=False)
    method = small_dbot(**(method_options or {}))
    data = ShapesData(num_images=27, batch_size=8, bank_size=20, query_size=10)
    trainer = quiet_trainer(folder, callbacks, **{"max_epochs": 2, **kwargs})
    trainer.fit(method, data, ckpt_path=ckpt_path)
    return method


class Watch(Callback):
    """Teachers before and after the switch, and the optimiser's memory at the first step after it."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.trained = {name: value.clone() for name, value in pl_module.student.backbone.state_dict().items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 0:
            self.remembered = len(trainer.optimizers[0].state)
            self.restarted = {name: value.clone() for name, value in pl_module.student.state_dict().items()}


def test_student_becomes_teacher_and_starts_afresh(tmp_path):
    watch = Watch()
    method = fit(tmp_path, [watch])
    assert method.stage == 1
    for name, value in method.teacher.backbone.state_dict().items():
        assert torch.equal(value, watch.trained[name]), name
    assert method.teacher.depth == 3
    assert watch.remembered == 0
    weight = "backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(watch.restarted[weight], watch.trained[weight.removeprefix("backbone.")])
    assert not any(module.training for module in method.teacher.modules())
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
    assert method.monitor()
    assert all(value.isfinite() for value in method.monitor().values())


def test_remembering_optimiser(tmp_path):
    watch = Watch()
    fit(tmp_path, [watch], method_options={"restart_optimizer": remember})
    assert watch.remembered > 0


def test_first_teacher_is_the_untrained_student():
    method = small_dbot()
    for name, value in method.student.backbone.state_dict().items():
        assert torch.equal(value, method.teacher.backbone.state_dict()[name]), name
    images = torch.randn(2, 3, 32, 32)
    method.teacher.depth = 0
    embedded = method.student.backbone.embed(images)
    assert torch.equal(torch.cat(method.teacher(images), dim=1), embedded)


def test_encoder_gives_the_mean_patch_token(tmp_path):
    method = small_dbot().eval()
    images = torch.randn(2, 3, 32, 32)
    encoder = method.encoders()["student"]
    expected = encoder.tokens(images).patch_tokens.mean(1)
    torch.testing.assert_close(encoder(images), expected)
    export_backbone(encoder, tmp_path / "encoder.safetensors")
    loaded = load_backbone(tmp_path / "encoder.safetensors")
    torch.testing.assert_close(loaded(images), expected)
    with_class = small_dbot(backbone_kwargs={"global_pool": "token"}).eval().encoders()["student"]
    torch.testing.assert_close(with_class(images), with_class.tokens(images).class_tokens[:, 0])


def test_a_shallow_student_is_the_network_of_that_depth(tmp_path):
    method = small_dbot(depths=(2, 3), drop_path_rate=0.3)
    encoder = method.encoders()["student"]
    assert [block.drop_path1.drop_prob for block in encoder.blocks[1:]] == pytest.approx([0.3])
    alone = create_backbone("vit_nano_patch8_32", depth=2, global_pool="avg", fc_norm=False)
    alone.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    expected = alone.eval()(images)
    torch.testing.assert_close(encoder.eval()(images), expected)
    export_backbone(encoder, tmp_path / "encoder.safetensors")
    torch.testing.assert_close(load_backbone(tmp_path / "encoder.safetensors")(images), expected)

    kept, hidden = divide_patches(torch.rand(2, 16), 0.75)
    method.train().student(images, kept, hidden).sum().backward()
    gradients = [parameter.grad for parameter in method.student.backbone.blocks[2].parameters()]
    assert all(gradient.eq(0).all() for gradient in gradients)
    method.next_stage()
    rates = [block.drop_path1.drop_prob for block in method.encoders()["student"].blocks[1:]]
    assert rates == pytest.approx([0.15, 0.3])


@pytest.mark.parametrize("epochs", [1, 2])
def test_resume_of_a_finished_stage(epochs, tmp_path):
    """A checkpoint of an epoch's end, from before the switch or of a finished run that is prolonged."""
    options = {"method_options": {"stage_starts": (0, 1, 2), "depths": (1, 3, 2)}}
    whole = fit(tmp_path / "whole", max_epochs=3, **options).state_dict()

    def at_epoch_end():
        return ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True, enable_version_counter=False)

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epochs:
                raise Crash

    with pytest.raises(Crash):
        fit(tmp_path, [at_epoch_end(), Stop()], max_epochs=3, **options)
    resumed = fit(tmp_path, [at_epoch_end()], tmp_path / "last.ckpt", max_epochs=3, **options).state_dict()
    assert not [name for name, value in whole.items() if not torch.equal(value, resumed[name])]


def test_larger_teacher(tmp_path):
    """Wider, deeper, with smaller patches and other colours; the student predicts its features."""
    network = create_backbone("vit_micro_patch4_32", depth=4)
    grey = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    teacher = FrozenFeatures(network, student_patch_size=8, **grey)
    method = fit(tmp_path, max_epochs=1, method_options={"teacher": teacher, "stage_starts": (0,)})
    assert method.stage == 0
    images = torch.randn(2, 3, 32, 32)
    assert method.teacher(images).patch_tokens.shape == (2, 16, 128)
    pixels = images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = pixels + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    seen = nn.functional.interpolate((pixels - 0.5) / 0.5, size=(16, 16), mode="bicubic", antialias=True)
    expected = network.eval().block_tokens(seen)[0]
    torch.testing.assert_close(method.teacher(images).patch_tokens, expected.patch_tokens, rtol=1e-4, atol=1e-5)


def test_class_weight_of_zero_leaves_the_class_token_out(tmp_path):
    torch.manual_seed(0)
    views = MaskedImages(torch.randn(3, 3, 32, 32), *divide_patches(torch.rand(3, 16), 0.75))
    terms = {}
    for weight in (0.0, 1.0):
        method = small_dbot(class_weight=weight).eval()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DBOT, "monitoring", False)
            terms[weight] = method.losses(views)
    assert terms[0.0]["class"] == 0
    torch.testing.assert_close(terms[0.0]["patch"] * 12 / 13, terms[1.0]["patch"])
    assert 0 < terms[1.0]["class"] < terms[1.0]["patch"]


def test_optimiser_forgets_fast():
    (group,) = dbot_adamw([nn.Parameter(torch.zeros(2, 2))]).param_groups
    assert group["betas"] == (0.9, 0.95)


def wide_teacher(**kwargs):
    return FrozenFeatures(create_backbone("vit_micro_patch4_32"), **{"student_patch_size": 8, **kwargs})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_teacher_depth": 4}, "`initial_teacher_depth` must be from 0 to 3, .* got 4; for a deeper teacher"),
        ({"initial_teacher_depth": -1}, "`initial_teacher_depth` must be from 0 to 3"),
        ({"depths": (3,)}, r"`depths` must be one number from 1 to 3, .* for each of 2 stages, got \[3\]"),
        ({"depths": (3, 4)}, r"`depths` must be .* got \[3, 4\]; .* makes a deeper backbone"),
        ({"class_weight": -1.0}, "`class_weight` must be at least 0, got -1.0"),
        ({"global_clip_norm": -1.0}, "`global_clip_norm` must be at least 0, got -1.0"),
        ({"stage_starts": (0, 0)}, "`stage_starts` must be growing"),
        (
            {"augment": MaskedImageAugment(64, 8)},
            "`augment.global_size` must be that of the backbone, 32 pixels, got 64",
        ),
        ({"augment": MaskedImageAugment(32, 4)}, "`augment.patch_size` must be that of the backbone, 8 pixels, got 4"),
        ({"backbone": "convnet_nano"}, "`backbone` must be one of timm's plain ViTs"),
        ({"teacher": wide_teacher()}, r"`stage_starts` must be \[0\] with a `teacher` of its own"),
        (
            {"teacher": wide_teacher(student_patch_size=16), "stage_starts": (0,)},
            "`teacher.student_patch_size` must be that of the backbone, 8, got 16",
        ),
        (
            {"teacher": wide_teacher(student_std=(1, 1, 1)), "stage_starts": (0,)},
            "`teacher.student_mean` and `student_std` must be those of `augment`",
        ),
        (
            {
                "teacher": wide_teacher(),
                "stage_starts": (0,),
                "decoder": lambda embed_dim, target_dim, *rest: small_decoder(embed_dim, embed_dim, *rest),
            },
            "`decoder` must end in a projection to the teacher's width 128, got 64",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        small_dbot(**options)


def test_more_stages_than_epochs(tmp_path):
    with pytest.raises(ValueError, match=r"`stage_starts` must lie before .* 2 epochs, got \[0, 1, 5\]; try \[0, 1\]"):
        fit(tmp_path, method_options={"stage_starts": (0, 1, 5)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FrozenFeatures("vit_nano_patch8_32"),
            "`checkpoint` must name the weights of teacher vit_nano_patch8_32",
        ),
        (lambda: FrozenFeatures("vit_nano_patch8_32", checkpoint="no.pth"), "`checkpoint` no.pth does not exist"),
        (
            lambda: FrozenFeatures(nn.Flatten()),
            "`backbone` must be a plain ViT of timm with a class token, got Flatten",
        ),
    ],
)
def test_teacher_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
