"""Two processes that hold half of every parameter equal one that holds all of them."""

import os
import socket
from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from small_methods import aligned_crops, prototype_head, small_dino, small_ibot, small_odis, small_udi
from torch import multiprocessing, nn
from torch.distributed.tensor import DTensor

from ssl_distill.augment.masked_crop import MaskedCropAugment
from ssl_distill.augment.masked_image import MaskedImageAugment
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.augment.two_view import TwoViewAugment
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.projection_teacher import ProjectionTeacher
from ssl_distill.callbacks.atomic_checkpoint import AtomicCheckpointIO
from ssl_distill.callbacks.run_folder import RunFolder
from ssl_distill.data.shapes import ShapesData
from ssl_distill.evaluate.evaluation import Evaluation
from ssl_distill.evaluate.knn import KNN
from ssl_distill.evaluate.object_reading import ObjectReading
from ssl_distill.export import read_metadata
from ssl_distill.heads.decoder import FeatureDecoder
from ssl_distill.heads.t_head import THead
from ssl_distill.losses.object_view import mean_over_images
from ssl_distill.methods.dbot import DBOT
from ssl_distill.methods.dino import DINO
from ssl_distill.methods.mokd import MOKD, Learner
from ssl_distill.methods.pcd import PCD
from ssl_distill.optim.lars import LARS
from ssl_distill.optim.schedules import Cosine, EpochCosine
from ssl_distill.reading.shards import check_shards
from ssl_distill.sharded_strategy import ShardedStrategy
from ssl_distill.sharding import whole_state_dict

CROPS = {"global_size": 32, "local_size": 16, "num_local": 1}
EMA = {"num_prototypes": 33, "drop_path_rate": 0.0, "reference_batch": None}  # 33: ranks have different shares
VIT = "vit_nano_patch8_32"


def dino():
    return small_dino(augment=MultiCropAugment(**CROPS), **EMA)


def ibot():
    return small_ibot(augment=MaskedCropAugment(MultiCropAugment(**CROPS), patch_size=8), **EMA)


def odis():
    # Ranks have different numbers of local crops that miss the object; the default average is meant per rank.
    augment = ObjectCropAugment(MultiCropAugment(**CROPS), patch_size=8)
    return small_odis(augment=augment, average=mean_over_images, **EMA)


def udi():
    return small_udi(augment=aligned_crops(num_local=1), **EMA)


def dbot(depths=None):
    def decoder(embed_dim, target_dim, grid, drop_path_rate):
        return FeatureDecoder(embed_dim, target_dim, grid, drop_path_rate, decoder_dim=16, depth=1, num_heads=2)

    return DBOT(
        backbone=VIT,
        drop_path_rate=0.0,
        decoder=decoder,
        stage_starts=(0, 1),
        depths=depths,
        initial_teacher_depth=1,
        augment=MaskedImageAugment(32, patch_size=8),
        learning_rate=EpochCosine(1e-3, 0.0),
        reference_batch=None,
    )


def pcd():
    teacher = ProjectionTeacher(create_backbone(VIT), nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)))
    return PCD(
        teacher,
        backbone=VIT,
        head=lambda in_dim, out_dim: nn.Conv2d(in_dim, out_dim, 1),
        attention=lambda dim: nn.Identity(),
        queue_size=16,
        augment=TwoViewAugment(32),
        optimizer=LARS,
        learning_rate=Cosine(1.0, 0.1),
        reference_batch=None,
    )


def mokd():
    def token_head(*sizes):
        return THead(*sizes, embed_dim=24, depth=1, num_heads=2)

    options = {
        "backbone": VIT,
        "head": prototype_head,
        "token_head": token_head,
        "learning_rate": Cosine(1e-3, 1e-5),
    }
    learners = [Learner(name, drop_path_rate=0.0, **options) for name in ("one", "other")]
    return MOKD(*learners, num_prototypes=33, augment=MultiCropAugment(**CROPS), reference_batch=None)


def growing():
    """dBOT whose student has a block more in the second stage."""
    return dbot(depths=(2, 3))


METHODS = {
    "dino": dino,
    "ibot": ibot,
    "odis": odis,
    "dbot": dbot,
    "growing": growing,
    "pcd": pcd,
    "udi": udi,
    "mokd": mokd,
}


@contextmanager
def double():
    """AdamW would blow the rounding of vanishing gradients up to whole steps; FSDP2 has no precision 64-true."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def in_double(views):
    return apply_to_collection(views, torch.Tensor, lambda view: view.double() if view.is_floating_point() else view)


def fit(name, folder, strategy="auto", ckpt_path=None, callbacks=(), **kwargs):
    ranks = 1 if strategy == "auto" else 2
    objects = name == "odis"
    evaluation = Evaluation([KNN([3])], ObjectReading() if objects else None)
    pl.seed_everything(0, verbose=False)
    mode = "scene" if objects else "single"
    data = ShapesData(mode, num_images=27, batch_size=8 // ranks, bank_size=20, query_size=10)
    data.parts  # noqa: B018 - pictures are drawn in float32
    with double():
        method = METHODS[name]()
        trainer = Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy=strategy,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[evaluation, *callbacks],
            plugins=[AtomicCheckpointIO()],
            max_epochs=2,
            log_every_n_steps=1,
            num_sanity_val_steps=-1,
            **kwargs,
        )
        trainer.precision_plugin.convert_input = in_double
        trainer.fit(method, data, ckpt_path=ckpt_path)
    return method, evaluation


def fit_in_half_precision(folder, ckpt_path=None):
    pl.seed_everything(0, verbose=False)
    method = dino()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ShardedStrategy(256),
        precision="bf16-true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[save_steps(folder)],
        max_epochs=2,
        limit_val_batches=0,
    )
    trainer.fit(method, ShapesData(num_images=16, batch_size=4), ckpt_path=ckpt_path)
    return whole_state_dict(method)


def save_steps(folder):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)


# In epoch 0, where the last layer has no gradient yet, and in epoch 1, at whose beginning dBOT's student restarts.
MIDWAY = {"dino": "step=2.ckpt", "mokd": "step=4.ckpt", "dbot": "step=4.ckpt", "growing": "step=4.ckpt"}
IN_SHARDS = ("dino",)


def train_sharded(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["WORLD_SIZE"] = "2"
    for name in METHODS:
        place = folder / name / "two"
        strategy = ShardedStrategy(256, save_distributed_checkpoint=name in IN_SHARDS)
        method, evaluation = fit(name, place, strategy, callbacks=[save_steps(place), RunFolder(picture_rows=0)])
        assert all(isinstance(parameter, DTensor) for parameter in method.parameters())
        results = {"state": whole_state_dict(method), "history": evaluation.history}
        if name in MIDWAY:
            resumed, _ = fit(name, place, ShardedStrategy(256), folder / name / "one" / MIDWAY[name])
            results["resumed"] = whole_state_dict(resumed)
            if name in IN_SHARDS:
                from_shards, _ = fit(name, place, ShardedStrategy(256), place / MIDWAY[name])
                results["from_shards"] = whole_state_dict(from_shards)
        torch.save(results, folder / name / f"rank{rank}.pt")
    place = folder / "half"
    whole_run = fit_in_half_precision(place)
    resumed = fit_in_half_precision(place, place / "step=2.ckpt")
    torch.save({"state": whole_run, "resumed": resumed}, place / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each method on one process, then all of them on two: folders, and final weights and scores on one process."""
    folder = tmp_path_factory.mktemp("sharded")
    whole = {}
    for name in METHODS:
        method, evaluation = fit(name, folder / name / "one", callbacks=[save_steps(folder / name / "one")])
        whole[name] = (method.state_dict(), evaluation.history)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(train_sharded, (port, folder), nprocs=2)
    return folder, whole


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        ours, theirs = state[key], value
        if key == "queue.keys":  # ranks append one after another what one process appends in turns
            ours, theirs = (keys[keys[:, 0].argsort()] for keys in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.ddp
@pytest.mark.parametrize("name", METHODS)
def test_ranks(runs, name):
    """Students, teachers, centers, queues and scores; the ranks agree to the last bit."""
    folder, whole = runs
    first, second = (torch.load(folder / name / f"rank{rank}.pt") for rank in range(2))
    expected, history = whole[name]
    assert_same(first["state"], expected)
    assert all(torch.equal(value, second["state"][key]) for key, value in first["state"].items())
    for ours, theirs in zip(first["history"], history, strict=True):
        assert ours["scores"] == theirs["scores"]


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # this run saves no checkpoints
@pytest.mark.parametrize("name", MIDWAY)
def test_one_device_goes_on_from_shards_and_the_reverse(runs, name):
    folder, whole = runs
    expected, _ = whole[name]
    checkpoint = folder / name / "two" / MIDWAY[name]
    assert checkpoint.is_dir() == (name in IN_SHARDS)
    if checkpoint.is_dir():
        check_shards(checkpoint)
        assert {f"checksums-{rank}.json" for rank in range(2)} <= {path.name for path in checkpoint.iterdir()}
    assert_same(fit(name, folder / "again", ckpt_path=checkpoint)[0].state_dict(), expected)
    results = torch.load(folder / name / "rank0.pt")
    assert_same(results["resumed"], expected)
    if name in IN_SHARDS:
        assert_same(results["from_shards"], expected)
        assert not list((folder / name / "two").glob(".*"))


@pytest.mark.ddp
def test_half_precision(runs):
    """The sharded teacher's running value in float32 is whole in the checkpoint, and a resumed run goes on from it."""
    folder, _ = runs
    results = torch.load(folder / "half" / "rank0.pt")
    assert all(torch.equal(value, results["resumed"][key]) for key, value in results["state"].items())
    checkpoint = torch.load(folder / "half" / "step=2.ckpt", weights_only=True)
    teacher = [value for key, value in checkpoint["state_dict"].items() if key.startswith("teacher.")]
    running = checkpoint["callbacks"]["EMATeacher"]["running"][0]
    assert {value.dtype for value in running} == {torch.float32}
    for rounded, value in zip(teacher, running, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(rounded, value.bfloat16())


@pytest.mark.ddp
def test_export(runs):
    """Rank 0 exports whole weights, under the method's own name."""
    folder, whole = runs
    path = folder / "ibot" / "two" / "backbone.safetensors"
    metadata = read_metadata(path)
    assert metadata["method"] == "ssl_distill.methods.ibot.IBOT"
    prefix = f"{metadata['encoder']}.backbone."
    expected = {key.removeprefix(prefix): value for key, value in whole["ibot"][0].items() if key.startswith(prefix)}
    assert_same(load_file(path), expected)


def refused(method, strategy, folder):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "default_root_dir": folder}
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, strategy=strategy, **options)
    trainer.fit(method, ShapesData(num_images=8, batch_size=8))


def with_batch_norm():
    return DINO("convnet_nano", num_prototypes=8, augment=MultiCropAugment(**CROPS))


def with_scalar():
    method = dino()
    method.scale = nn.Parameter(torch.tensor(1.0))
    return method


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("make", "strategy", "message"),
    [
        (dino, lambda: ShardedStrategy(0), "`min_parameters` must be at least 1, got 0"),
        (dino, lambda: ModelParallelStrategy(1, 1), "must be ddp or .*ShardedStrategy.*, got ModelParallelStrategy"),
        (
            lambda: DINO("convnet_nano", num_prototypes=8),
            ShardedStrategy,
            "does not synchronise batch norm, got student",
        ),
        (with_scalar, ShardedStrategy, r"got scale without one; give it the shape \(1,\)"),
    ],
)
def test_errors(make, strategy, message, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    try:
        with pytest.raises(ValueError, match=message):
            refused(make(), strategy(), tmp_path)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
