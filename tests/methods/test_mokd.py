from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from harness import StoredViews, in_float64, quiet_trainer
from lightning.pytorch import Callback
from mokd_weights import mlp_head_state, t_head_state
from small_methods import small_learner, small_mokd
from torch import nn
from torch.utils.data import DataLoader

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.callbacks.ema_teacher import ema_update
from ssl_distill.callbacks.freeze_last_layer import FreezeLastLayer
from ssl_distill.data.shapes import ShapesData
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.heads.t_head import THead
from ssl_distill.losses.cross_view import cross_view_entropy
from ssl_distill.methods.mokd import MOKD, RESNET, VIT, Learner
from ssl_distill.optim.schedules import Cosine, EpochRamp, Position
from ssl_distill.targets.center import Center
from ssl_distill.views import MultiCrop

EXPECT = {"rtol": 2e-6, "atol": 1e-7}  # golden values were computed in float64 and stored in float32
LOSSES = {"mlp": "self", "t": "token", "cross": "cross", "search": "search"}
SPACES = {"mlp": "vector", "t": "token"}


class StoredFeatures(nn.Module):
    """A backbone whose features, maps or tokens with a class token, come from a golden file."""

    def __init__(self, global_features, local_features, global_size):
        super().__init__()
        self.global_features = nn.Parameter(global_features.clone())
        self.local_features = nn.Parameter(local_features.clone())
        self.global_size = global_size
        self.num_prefix_tokens = 1
        self.patch_embed = SimpleNamespace(patch_size=(1, 1))

    def forward_features(self, images):
        return self.global_features if images.shape[-1] == self.global_size else self.local_features

    def forward_head(self, features, pre_logits):
        return features[:, 0] if features.ndim == 3 else features.mean((2, 3))


def golden_mokd(t, params):
    size = params["vit_global_grid"]  # a patch is a pixel
    constant = {name: EpochRamp(value, value) for name, value in params["teacher_temp"].items()}
    t_head = partial(
        THead,
        embed_dim=params["embed_dim"],
        depth=params["depth"],
        num_heads=params["num_heads"],
        position_mode="dino_v1",
    )
    learners = [
        Learner(
            name,
            StoredFeatures(t[f"student_{name}_{kind}_global"], t[f"student_{name}_{kind}_local"], size),
            head=partial(PrototypeHead, hidden_dim=params["hidden"], bottleneck_dim=params["bottleneck"]),
            token_head=t_head,
            teacher_temperature=constant[f"{name}_mlp"],
            cross_weight=params[f"lambda_{name}"],
            learning_rate=Cosine(1e-3, 1e-3),
        )
        for name, kind in {"cnn": "fmap", "vit": "tokens"}.items()
    ]
    assert constant["cnn_cross"] == constant["vit_cross"] == EpochRamp(*[params["teacher_temp_search"]] * 2)
    method = MOKD(
        *learners,
        num_prototypes=params["out_dim"],
        targets=partial(Center, momentum=params["center_momentum"]),
        augment=StoredViews(size),
        reference_batch=None,
        student_temperature=params["student_temp"],
        cross_temperature=constant["cnn_cross"],
        freeze_last_layer_epochs=0,
        clip_norm=0,
    ).double()
    for name, kind in {"cnn": "fmap", "vit": "tokens"}.items():
        for branch, letter in ((method.student[name], "s"), (method.teacher[name], "t")):
            prefix = f"{letter}_{name}."
            weights = {key.removeprefix(prefix): value for key, value in t.items() if key.startswith(prefix)}
            for head, part, convert in (("head", "mlp", mlp_head_state), ("token_head", "thead", t_head_state)):
                of_head = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
                getattr(branch, head).load_state_dict(convert(of_head))
        method.teacher[name].backbone.global_features.data.copy_(t[f"teacher_{name}_{kind}_global"])
        for part, space in SPACES.items():
            method.targets_of(name, space).value.copy_(t[f"center_in_t_{name}_{part}"])
    return method


class Recorder(Callback):
    """Gradients, outputs and losses of a step, the centers after it."""

    def __init__(self):
        self.outputs, self.found = {}, {}

    def on_train_start(self, trainer, pl_module):
        for kind in ("ask_student", "ask_teacher", "terms"):
            setattr(pl_module, kind, partial(self.keep, getattr(pl_module, kind), kind))

    def keep(self, function, kind, name, *args):
        self.outputs[kind, name] = function(name, *args)
        return self.outputs[kind, name]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, kind in {"cnn": "fmap", "vit": "tokens"}.items():
            student = pl_module.student[name]
            for key in ("global", "local"):
                gradient = getattr(student.backbone, f"{key}_features").grad
                self.found[f"grad_student_{name}_{kind}_{key}"] = gradient.clone()
            parts = {"last_v": student.token_head.last_layer.weight_v, "pos_embed": student.token_head.pos_embed}
            if name == "cnn":
                parts["inproj_w"] = student.token_head.projection.weight
            for key, parameter in parts.items():
                self.found[f"grad_s_{name}.thead.{key}"] = parameter.grad.clone()
        assert all(parameter.grad is None for parameter in pl_module.teacher.parameters())
        for name in pl_module.learners:
            student, teacher = self.outputs["ask_student", name], self.outputs["ask_teacher", name]
            terms = self.outputs["terms", name]
            self.found[f"query_from_{name}"] = student.queries.flatten(0, 1).clone()
            self.found[f"t_{name}_search_logits"] = teacher.search.flatten(0, 1)
            for part, space in SPACES.items():
                self.found[f"s_{name}_{part}_logits"] = getattr(student.logits, space).flatten(0, 1)
                self.found[f"t_{name}_{part}_logits"] = getattr(teacher.logits, space).flatten(0, 1)
            for part, term in LOSSES.items():
                self.found[f"loss_{name}_{part}"] = terms[term]
            weight = pl_module.learners[name].cross_weight
            self.found[f"loss_{name}_total"] = sum(
                loss * (weight if term in ("cross", "search") else 1) for term, loss in terms.items()
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name in pl_module.learners:
            for part, space in SPACES.items():
                self.found[f"center_out_t_{name}_{part}"] = pl_module.targets_of(name, space).value.clone()
        self.total = outputs["loss"]


def test_golden(golden, tmp_path):
    """A whole step from stored backbone features, through the Trainer."""
    case = golden("mokd/step_from_features")
    t, params = in_float64(case), case.params
    method = golden_mokd(t, params)
    batch, size, small = params["batch"], params["vit_global_grid"], params["vit_local_grid"]
    views = MultiCrop(torch.zeros(2, batch, 3, size, size), torch.zeros(params["n_local"], batch, 3, small, small))
    recorder = Recorder()
    quiet_trainer(tmp_path, [recorder], max_epochs=1, precision="64-true").fit(
        method, DataLoader([views], batch_size=None)
    )
    expected = {key: t[key] for key in t if key.startswith(("grad_", "loss_", "center_out_", "query_"))}
    expected |= {key: t[key] for key in t if key.endswith("_logits")}
    assert set(recorder.found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            recorder.found[name].detach(), value, **EXPECT, msg=lambda text, name=name: f"{name}: {text}"
        )
    total = t["loss_cnn_total"] + t["loss_vit_total"]
    torch.testing.assert_close(recorder.total, total, **EXPECT)


def test_golden_self_distillation(golden):
    for name in golden.cases("mokd/self_distill_loss*"):
        case = golden(name)
        t, params = in_float64(case), case.params
        views = params["n_global"] + params["n_local"]
        logits = t["student_logits"].unflatten(0, (views, params["batch"])).requires_grad_()
        teacher_logits = t["teacher_logits"].unflatten(0, (params["n_global"], params["batch"]))
        ramp = EpochRamp(params["warmup_teacher_temp"], params["teacher_temp"], params["warmup_teacher_temp_epochs"])
        position = Position(step=params["epoch"], total_steps=params["epochs"], steps_per_epoch=1)
        center = Center(params["out_dim"], params["center_momentum"]).double()
        center.value.copy_(t["center_in"])
        targets = center(teacher_logits, ramp.at(position))
        center.observe(teacher_logits)
        center.update()
        loss = cross_view_entropy(targets, logits, params["student_temp"])
        loss.backward()
        torch.testing.assert_close(loss, t["loss"], **EXPECT)
        torch.testing.assert_close(logits.grad.flatten(0, 1), t["grad_student_logits"], **EXPECT)
        torch.testing.assert_close(center.value, t["center_out"], **EXPECT)
        ramp_values = [ramp.at(position._replace(step=epoch)) for epoch in range(params["epochs"])]
        ramp_values = torch.tensor(ramp_values, dtype=torch.float64)
        torch.testing.assert_close(ramp_values, t["teacher_temp_per_epoch"], rtol=1e-9, atol=0)


def test_golden_schedules(golden):
    case = golden("mokd/schedules")
    params = case.params
    factor = params["batch_per_rank"] * params["world_size"] / 256
    warmup = {"warmup_epochs": params["warmup_epochs"], "warmup_from": params["start_warmup_value"]}
    curves = {
        "lr_cnn": Cosine(params["lr_cnn"], params["lr_cnn_final"], **warmup).scaled(factor),
        "lr_vit": Cosine(params["lr_vit"], params["lr_vit_final"], **warmup).scaled(factor),
        "wd_cnn": RESNET.weight_decay,
        "wd_vit": VIT.weight_decay,
        "ema_momentum": Cosine(0.996, 1.0),
    }
    assert RESNET.learning_rate == Cosine(0.1, 0.0048, 10)
    assert VIT.learning_rate == Cosine(3e-4, 1e-5, 10)
    steps = params["epochs"] * params["iters_per_epoch"]
    for name, curve in curves.items():
        values = [curve.at(Position(step, steps, params["iters_per_epoch"])) for step in range(steps)]
        values = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(values, case.tensors[name], rtol=1e-9, atol=1e-15)


def test_golden_ema(golden):
    case = golden("mokd/ema")
    student, teacher = nn.ParameterList(), nn.ParameterList()
    student.append(case.tensors["student"].double())
    teacher.append(case.tensors["teacher_in"].double())
    ema_update(student, teacher, case.params["momentum"])
    torch.testing.assert_close(teacher[0].detach().float(), case.tensors["teacher_out"], rtol=1e-6, atol=1e-8)


def test_golden_parameter_groups(golden):
    """Which parameter is trained by which group, for a pair of the official kinds."""
    params = golden("mokd/param_groups").params
    names = {model: [name for group in params[model] for name in group] for model in ("cnn", "vit")}
    layers = [len({n.split(".")[2] for n in names["cnn"] if n.startswith(f"backbone.layer{i}.")}) for i in range(1, 5)]
    depth = len({n.split(".")[2] for n in names["vit"] if n.startswith("backbone.blocks.")})
    resnet = "resnet50" if "backbone.layer1.0.conv3.weight" in names["cnn"] else "resnet18"
    vit_sizes = {"embed_dim": 24, "depth": depth, "num_heads": 2}
    t_head = partial(THead, embed_dim=24)
    method = MOKD(
        replace(RESNET, backbone=resnet, backbone_kwargs={"layers": layers}, token_head=t_head),
        replace(VIT, backbone_kwargs=vit_sizes, token_head=t_head),
        num_prototypes=8,
        augment=MultiCropAugment(global_size=32, local_size=16),
    )

    def official(name):
        return name.replace("token_head.projection", "transhead.patch_embed").replace("token_head.", "transhead.")

    optimizer = method.configure_optimizers()
    name_of = {id(parameter): name for name, parameter in method.student.named_parameters()}
    groups = [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    assert [group["schedule"] for group in optimizer.param_groups] == ["cnn", "cnn", "vit", "vit", "vit"]
    assert [group["decayed"] for group in optimizer.param_groups] == [True, False, True, True, False]
    for model, ours in {"cnn": groups[:3], "vit": groups[3:]}.items():
        found = [{official(name.removeprefix(f"{model}.")) for name in group} for group in ours]
        assert found == [set(group) for group in params[model]]
        fixed = {official(k) for k, p in method.student[model].named_parameters() if not p.requires_grad}
        assert fixed == set(params[f"{model}_not_trainable"])
    (freeze,) = [callback for callback in method.configure_callbacks() if isinstance(callback, FreezeLastLayer)]
    frozen = [name_of[id(parameter)] for parameter in freeze.layer.parameters()]
    for model in ("cnn", "vit"):
        found = {official(name.removeprefix(f"{model}.")) for name in frozen if name.startswith(f"{model}.")}
        assert found == set(params[f"frozen_in_first_epoch_{model}"])


def test_only_tokens_skip_the_projection():
    """Both backbones are as wide as the T-Heads."""
    t_head = partial(THead, embed_dim=128, depth=1, num_heads=2)
    learners = [Learner(name, name, token_head=t_head) for name in ("convnet_nano", "vit_micro_patch4_32")]
    method = MOKD(*learners, num_prototypes=8, augment=MultiCropAugment(global_size=32, local_size=16))
    for networks in (method.student, method.teacher):
        assert isinstance(networks["convnet_nano"].token_head.projection, nn.Linear)
        assert isinstance(networks["vit_micro_patch4_32"].token_head.projection, nn.Identity)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("convnet_nano", "vit_nano_patch8_32"),
        ("convnet_nano", "resnet10_nano"),
        ("vit_nano_patch8_32", "vit_nano_patch4_32"),
    ],
)
def test_losses_of_one_model_give_the_other_no_gradient(first, second, tmp_path):
    method = small_mokd(first, second)
    method.trainer = SimpleNamespace(  # position and monitoring are all that losses ask for
        estimated_stepping_batches=10,
        num_training_batches=5,
        accumulate_grad_batches=1,
        global_step=0,
        log_every_n_steps=1,
    )
    views = MultiCrop(torch.randn(2, 4, 3, 32, 32), torch.randn(2, 4, 3, 16, 16))
    for name, other in (("first", "second"), ("second", "first")):
        losses = method.losses(views)
        assert list(losses) == [f"{n}_{term}" for n in ("first", "second") for term in LOSSES.values()]
        method.zero_grad()
        sum(loss for key, loss in losses.items() if key.startswith(name)).backward()
        trained = [parameter for parameter in method.student[name].parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None for parameter in trained)
        strangers = [*method.student[other].parameters(), *method.teacher.parameters()]
        assert all(parameter.grad is None for parameter in strangers)
    assert {"first_teacher_entropy", "second_kl", "second_token_kl", "feature_std", "agreement"} <= set(
        method.monitor()
    )


def test_a_run_moves_both_models(tmp_path):
    """Short run with fewer epochs than temperature ramps, accumulation, and no local crops in the second case."""
    for num_local in (2, 0):
        torch.manual_seed(0)
        method = small_mokd(num_local=num_local, freeze_last_layer_epochs=0)
        before = {name: value.clone() for name, value in method.named_parameters()}
        trainer = quiet_trainer(
            tmp_path, max_epochs=2, accumulate_grad_batches=2, limit_val_batches=0, log_every_n_steps=1
        )
        trainer.fit(method, ShapesData(num_images=32, batch_size=8, bank_size=8, query_size=8))
        assert trainer.global_step == 4
        moved = {name for name, value in method.named_parameters() if not torch.equal(value, before[name])}
        assert {name.split(".")[1] for name in moved} == {"first", "second"}
        assert {name.split(".")[0] for name in moved} == {"student", "teacher"}
        assert all(value.isfinite().all() for value in method.state_dict().values())
        assert ("train/first_search" in trainer.callback_metrics) == bool(num_local)


def test_encoders_by_name():
    method = small_mokd()
    encoders = method.encoders()
    assert list(encoders) == ["first", "second", "first_student", "second_student"]
    assert encoders["first"] is method.teacher["first"].backbone
    assert encoders["second_student"].timm_name == "vit_nano_patch8_32"
    assert [name for model in method.models() for name in model] == [
        "first",
        "first_student",
        "second",
        "second_student",
    ]


def small_pair(**changes):
    second = {"name": "second", "backbone": "vit_nano_patch8_32", **changes}
    return MOKD(
        small_learner("first", "convnet_nano"),
        replace(small_learner("x", "y"), **second),
        num_prototypes=8,
        augment=MultiCropAugment(global_size=32, local_size=16),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "first"}, "`second.name` must differ from `first.name`, got 'first' twice"),
        ({"name": "my.vit"}, "`name` must be letters, digits and underscores, not starting in a digit, got 'my.vit'"),
        ({"name": "keys"}, "`name` must be none that PyTorch's modules use themselves, got 'keys'"),
        (
            {"name": "first_student"},
            "`name` must not be 'first_student', which is what the student of 'first' is",
        ),
        ({"cross_weight": -1.0}, "`cross_weight` of second must be at least 0, got -1.0"),
        (
            {"token_head": partial(THead, embed_dim=32, num_heads=2)},
            "`embed_dim` must be the same in both `token_head`",
        ),
        ({"backbone": nn.Linear(3, 2)}, "`backbone` must have `forward_features`, as timm's models, got Linear"),
        ({"backbone": "vit_nano"}, "`backbone` 'vit_nano' is not a timm model"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        small_pair(**changes)
