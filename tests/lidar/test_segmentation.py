import math
import warnings
from itertools import pairwise

import pytest
import torch
from lidar_clouds import random_clouds, street_data
from lightning.pytorch import Callback, Trainer
from torch import multiprocessing, nn
from torch.utils.data import DataLoader

from ssl_distill.export import export_backbone
from ssl_distill.lidar.batch import PaddedClouds, join_clouds
from ssl_distill.lidar.frames import IGNORED
from ssl_distill.lidar.inverse_sqrt import InverseSqrt
from ssl_distill.lidar.official import our_name
from ssl_distill.lidar.samples import LabelledSamples, ScanBatch
from ssl_distill.lidar.segmentation import PointFinetuning, PointProbe, layer_decay_groups, linear_head
from ssl_distill.lidar.segmentation_loss import lovasz_softmax, segmentation_loss, segmentation_scores
from ssl_distill.lidar.waffleiron import WaffleIron
from ssl_distill.optim.schedules import Cosine, EpochCosine, Position


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


def test_golden_loss_and_scores(golden):
    case = golden("scalr/segmentation_loss_metrics")
    t, p = case.tensors, case.params
    assert p["ignore_index"] == IGNORED
    logits = t["logits"].clone().requires_grad_()
    loss = segmentation_loss(logits, t["labels"], p["lovasz_weight"])
    loss.backward()
    known = t["labels"] != IGNORED
    lovasz = lovasz_softmax(t["logits"][known].softmax(1), t["labels"][known])
    for ours, name in ((loss, "loss"), (logits.grad, "grad_logits"), (lovasz, "lovasz")):
        torch.testing.assert_close(ours, t[name], rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    without = segmentation_loss(t["logits"], t["labels"], 0.0)
    torch.testing.assert_close(without, t["cross_entropy"], rtol=1e-6, atol=1e-6)

    probe = PointProbe(WaffleIron(((2, 2),), 4, 1), p["num_classes"])
    for predicted, labels in zip(t["logits"].argmax(1).split(50), t["labels"].split(50), strict=True):
        probe.scores.update(predicted, labels)
    assert torch.equal(probe.scores["miou"].confmat, t["confusion"])
    scores = probe.scores.compute()
    for ours, theirs in {"iou": "iou", "miou": "miou", "accuracy": "overall_accuracy"}.items():
        torch.testing.assert_close(scores[ours].double(), t[theirs], rtol=1e-6, atol=1e-6)


def test_a_class_that_is_nowhere_has_no_iou():
    metrics = segmentation_scores(4)
    metrics.update(torch.tensor([0, 0, 1, 3, 3]), torch.tensor([0, 1, 1, 1, IGNORED]))  # nothing is or seems class 2
    scores = metrics.compute()
    torch.testing.assert_close(scores["iou"], torch.tensor([1 / 2, 1 / 3, math.nan, 0]), equal_nan=True)
    torch.testing.assert_close(scores["miou"], torch.tensor((1 / 2 + 1 / 3 + 0) / 3))
    assert scores["accuracy"] == 0.5


def scores_on_rank(rank: int, store: str, parts, expected):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        metrics = segmentation_scores(5)
        for predicted, labels in parts[rank]:
            metrics.update(predicted, labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics' advice to a rank without updates
            found = metrics.compute()
        torch.testing.assert_close(found, expected, equal_nan=True)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.parametrize("split", [3, 4])
def test_ranks(tmp_path, split):
    """The second rank has one scan, or none."""
    torch.manual_seed(0)
    scans = [(torch.randint(4, (30,)), torch.randint(4, (30,))) for _ in range(4)]
    alone = segmentation_scores(5)
    for predicted, labels in scans:
        alone.update(predicted, labels)
    parts = (scans[:split], scans[split:])
    multiprocessing.spawn(scores_on_rank, (str(tmp_path / "store"), parts, alone.compute()), nprocs=2)


def test_loss_without_any_label():
    logits = torch.randn(5, 3, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((5,), IGNORED))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_lovasz_is_one_minus_iou_for_hard_predictions():
    torch.manual_seed(0)
    labels, predicted = torch.randint(3, (200,)), torch.randint(3, (200,))
    hard = nn.functional.one_hot(predicted, 3).double()
    iou = [((labels == c) & (predicted == c)).sum() / ((labels == c) | (predicted == c)).sum() for c in range(3)]
    expected = 1 - torch.stack(iou).double().mean()
    torch.testing.assert_close(lovasz_softmax(hard, labels), expected, rtol=1e-6, atol=1e-6)


def test_golden_schedules(golden):
    case = golden("scalr/schedules")
    t, p = case.tensors, case.params
    cosine = EpochCosine(1.0, p["factor_min"], warmup_epochs=p["warmup_end"])
    ours = [cosine.at(Position(step, p["max_iter"], 1)) for step in range(len(t["warmup_cosine_factor"]))]
    torch.testing.assert_close(
        torch.tensor(ours, dtype=torch.float64), t["warmup_cosine_factor"], rtol=1e-12, atol=1e-12
    )
    total = p["plus_max_iter"]
    lengths = (p["plus_warmup_end"], p["plus_timescale"], total - p["plus_cooldown_start"])
    plus = InverseSqrt(1.0, *lengths, joined=False)
    ours = [plus.at(Position(step, total, 1)) for step in range(len(t["plus_factor"]))]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), t["plus_factor"], rtol=1e-12, atol=1e-12)


def test_schedules():
    plus = InverseSqrt(2.0, 1.0, 0.45, 3.0)
    values = [plus.at(Position(step, 200, 10)) for step in range(200)]
    assert values[0] == 0
    assert values[10] == 2.0
    assert values[199] == 0
    steps = [b - a for a, b in pairwise(values[160:])]
    assert max(map(abs, steps)) < 0.02, "the line begins where the curve ends"
    assert plus.scaled(2).at(Position(50, 200, 10)) == 2 * values[50]


def test_golden_layer_decay(golden):
    case = golden("scalr/layer_decay")
    t, p = case.tensors, case.params
    depth, weight_decay = p["depth"], p["weight_decay"]
    network = PointFinetuning(WaffleIron(((4, 4),), 8, depth), 4, layer_decay=p["layer_decay"])
    group_of = {id(each): group for group in network.parameter_groups() for each in group["params"]}
    ours = {
        name.removeprefix("backbone.").replace("head.", "classif."): group_of[id(parameter)]
        for name, parameter in network.named_parameters()
    }
    assert {our_name(name) for name in p["names"]} == set(ours)
    for i, name in enumerate(p["names"]):
        group = ours[our_name(name)]
        assert group["lr_scale"] == pytest.approx(float(t["lr_scale"][i]), abs=1e-12), name
        assert weight_decay * group["decayed"] == pytest.approx(float(t["weight_decay"][i]), abs=1e-12), name


class StoredTokens(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.num_features = tokens, tokens.shape[1]

    def forward(self, points):
        return self.tokens


def test_golden_probe_steps(golden, tmp_path):
    """Steps of the probe's head through the real module, Trainer and optimiser."""
    case = golden("scalr/linear_probe_steps")
    t, p = case.tensors, case.params
    clouds, _, num_points = t["tokens"].shape
    empty = torch.zeros(clouds, 1, num_points, dtype=torch.long)
    real = torch.ones(clouds, num_points, dtype=torch.bool)
    points = PaddedClouds(t["tokens"], empty, empty, real).flat()
    read_back = torch.cat([t[f"upsample_{i}"] + i * num_points for i in range(clouds)])
    batch = ScanBatch(
        points, t["labels"], read_back, torch.zeros(len(read_back), 3), points.num_points, points.num_points
    )
    constant = Cosine(p["lr"], p["lr"])
    probe = PointProbe(
        StoredTokens(points.features), p["num_classes"], learning_rate=constant,
        weight_decay=Cosine(p["weight_decay"], p["weight_decay"]),
    )  # fmt: skip
    losses = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            losses.append(outputs["loss"])

    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Recorder()])
    trainer.fit(probe, DataLoader([batch] * p["steps"], batch_size=None))
    torch.testing.assert_close(torch.stack(losses).double(), t["losses"], rtol=1e-6, atol=1e-6)
    for name, value in probe.head.state_dict().items():
        expected = t[f"out_{name.replace('.', '_')}"].reshape(value.shape)
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


GRIDS = ((64, 64), (64, 24), (64, 24))


def exported(path):
    torch.manual_seed(0)
    export_backbone(WaffleIron(GRIDS, 8, 2), path)
    return path


@pytest.mark.parametrize("kind", [PointProbe, PointFinetuning])
def test_training_and_validation(kind, tmp_path):
    path = exported(tmp_path / "lidar.safetensors")
    module = kind(path, 11, learning_rate=Cosine(1e-2, 1e-2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, street_data(samples=LabelledSamples()))
    scores = trainer.callback_metrics
    assert 0 < scores["val/miou"] <= scores["val/accuracy"] <= 1
    assert math.isfinite(scores["val/iou_road"])
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("head") for name in moved)
    if kind is PointProbe:
        assert not any(name.startswith("backbone") for name in moved)
    else:
        assert {name for name, _ in module.named_parameters()} <= moved
        assert module.backbone.drop_path.drop_prob == 0.2


def test_rates_follow_the_layers(tmp_path):
    rates = {}

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            rates.update({group["lr_scale"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    module = PointFinetuning(
        exported(tmp_path / "lidar.safetensors"), 11, layer_decay=0.5, learning_rate=Cosine(1e-2, 1e-2)
    )
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[Recorder()])
    trainer.fit(module, street_data(samples=LabelledSamples()))
    assert rates == {scale: pytest.approx(1e-2 * scale) for scale in (1.0, 0.5, 0.25, 0.125)}


def test_frozen_parts_are_in_no_group():
    network = nn.Module()
    network.backbone = WaffleIron(((4, 4),), 8, 2).requires_grad_(False)
    network.head = linear_head(8, 3)
    groups = layer_decay_groups(network, 2, 0.9)
    assert sum(len(group["params"]) for group in groups) == 4


def test_head_starts_at_zero():
    clouds, grids = random_clouds([20])
    probe = PointProbe(WaffleIron(grids, 8, 1), 5)
    assert (probe(join_clouds(clouds)) == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: PointProbe(b, 1), "`num_classes` must be at least 2, got 1"),
        (lambda b: PointProbe(b, 3, lovasz_weight=-1.0), "`lovasz_weight` must be at least 0, got -1"),
        (lambda b: PointFinetuning(b, 3, layer_decay=0.0), r"`layer_decay` must lie in \(0, 1\], got 0"),
        (lambda b: PointProbe("nowhere.safetensors", 3), "nowhere.safetensors does not exist"),
        (lambda b: InverseSqrt(1.0, cooldown_epochs=-1), "`cooldown_epochs` must be at least 0, got -1"),
        (lambda b: InverseSqrt(1.0, timescale_epochs=0), "`timescale_epochs` must be positive, got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(WaffleIron(((4, 4),), 8, 1))
