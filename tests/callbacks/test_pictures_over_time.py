"""`FeatureMaps` and `Neighbours` in a trainer."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from torch import nn

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.callbacks.feature_maps import FeatureMaps
from ssl_distill.callbacks.neighbours import Neighbours
from ssl_distill.data.batch import LabelledBatch
from ssl_distill.data.object_labels import LabelledObjectBatch
from ssl_distill.data.shapes import ShapesData
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.methods.dino import DINO
from ssl_distill.optim.schedules import Cosine


class PictureLogger(DummyLogger):
    """Takes pictures as WandbLogger does."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def log_image(self, key, images, step):
        self.taken.append((key, step))


class BrokenLogger(DummyLogger):
    def log_image(self, key, images, step):
        raise ConnectionError("no network")


def fit(folder, backbone, callbacks, logger=False, ckpt_path=None, **options):
    torch.manual_seed(0)
    method = DINO(
        backbone,
        num_prototypes=8,
        head=lambda in_dim, num_prototypes: PrototypeHead(in_dim, num_prototypes, 8, 8),
        augment=MultiCropAugment(global_size=32, local_size=16, num_local=0),
        learning_rate=Cosine(1e-3, 1e-5),
    )
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        num_sanity_val_steps=-1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        **{"max_epochs": 2, **options},
    )
    data = ShapesData(num_images=16, batch_size=8, eval_batch_size=8, bank_size=16, query_size=10)
    trainer.fit(method, data, ckpt_path=ckpt_path)
    return method


def save(folder):
    return ModelCheckpoint(folder, "end", enable_version_counter=False)


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_a_vit_leaves_three_pictures_that_loggers_get_too(tmp_path):
    logger = PictureLogger()
    fit(tmp_path, "vit_nano_patch8_32", [FeatureMaps(9), Neighbours(3, num_neighbours=4)], logger)
    assert size_of(tmp_path / "pca.png") == size_of(tmp_path / "attention.png") == (4 * 116, 16 + 9 * 116)
    assert size_of(tmp_path / "neighbours.png") == (9 * 100, 16 + 3 * 100)
    names = {f"pictures/{name}" for name in ("pca", "attention", "neighbours")}
    assert set(logger.taken) == {(name, step) for name in names for step in (0, 2, 4)}


def test_a_convnet_has_no_attention_and_trains_as_without_pictures(tmp_path):
    method = fit(tmp_path / "with", "convnet_nano", [FeatureMaps(), Neighbours()])
    plain = fit(tmp_path / "without", "convnet_nano", [FeatureMaps(0), Neighbours(0)])
    assert {path.name for path in (tmp_path / "with").iterdir()} == {"pca.png", "neighbours.png"}
    assert not (tmp_path / "without").exists()
    for name, value in method.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_a_resumed_run_shows_how_it_began(tmp_path):
    maps, neighbours = FeatureMaps(), Neighbours()
    fit(tmp_path, "convnet_nano", [maps, neighbours, save(tmp_path)])
    resumed = FeatureMaps(), Neighbours()
    fit(
        tmp_path,
        "convnet_nano",
        [*resumed, save(tmp_path)],
        ckpt_path=tmp_path / "end.ckpt",
        max_epochs=3,
    )
    assert [column["step"] for column in resumed[0].columns] == [0, 2, 4, 6]
    assert torch.equal(resumed[0].columns[1]["pca"], maps.columns[1]["pca"])
    assert resumed[1].first_found[0] == 0
    assert torch.equal(resumed[1].first_found[1], neighbours.first_found[1])


def test_many_validations_are_thinned(tmp_path):
    maps = FeatureMaps(1)
    fit(tmp_path, "convnet_nano", [maps], max_epochs=12)
    steps = [column["step"] for column in maps.columns]
    assert len(steps) <= 8
    assert (steps[0], steps[-1]) == (0, 24)


class Colors(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


class ColorMethod:
    def encoders(self):
        return {"colors": Colors()}

    def prepare(self, image):
        return image / 255


def plain_images(colors):
    return torch.tensor(colors, dtype=torch.uint8).view(-1, 3, 1, 1).expand(-1, 3, 8, 8)


def labelled(colors):
    return LabelledBatch(plain_images(colors), torch.arange(len(colors)), torch.arange(len(colors)))


def with_objects(colors, num_objects):
    images = plain_images(colors).repeat_interleave(num_objects, dim=0)
    numbers = torch.arange(len(images))
    return LabelledObjectBatch(images, numbers, numbers, torch.ones(len(images), 8, 8, dtype=torch.bool))


def fitting_trainer(folder):
    """One that callbacks take for a run, without running it."""
    trainer = Trainer(
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    trainer.state.fn = "fit"
    return trainer


def see(callback, folder, bank, queries):
    trainer = fitting_trainer(folder)
    callback.on_validation_start(trainer, ColorMethod())
    for loader, batches in enumerate((bank, queries)):
        for number, batch in enumerate(batches):
            callback.on_validation_batch_end(trainer, ColorMethod(), None, batch, number, loader)
    callback.on_validation_epoch_end(trainer, ColorMethod())


BLUE, ORANGE = (33, 140, 242), (242, 140, 26)


def frames(path):
    with Image.open(path) as picture:
        return {color for _, color in picture.getcolors(2**16)} & {BLUE, ORANGE}


BANK, QUERIES = [[200, 0, 0], [0, 200, 9], [0, 9, 200]], [[9, 9, 99], [99, 20, 9]]


def test_neighbours_are_the_nearest(tmp_path):
    callback = Neighbours(num_neighbours=1)
    see(callback, tmp_path, [labelled(BANK)], [labelled(QUERIES)])  # labels 0 1 2, and 0 1
    assert callback.first_found[1].tolist() == [[2], [0]]
    assert frames(tmp_path / "neighbours.png") == {ORANGE}


def test_an_image_with_several_objects_is_shown_once(tmp_path):
    callback = Neighbours(num_neighbours=2)
    see(callback, tmp_path, [with_objects(BANK, 3)], [with_objects(QUERIES[:1], 2), with_objects(QUERIES[1:], 2)])
    assert callback.first_found[1].tolist() == [[2, 1], [0, 1]]
    assert size_of(tmp_path / "neighbours.png") == (3 * 100, 16 + 2 * 100)
    assert not frames(tmp_path / "neighbours.png")  # an object's class is not its image's
    maps = FeatureMaps(3)
    colored = [with_objects([[value, 0, 0]], 2) for value in (1, 2, 2, 3, 4)]
    trainer = fitting_trainer(tmp_path)
    for number, batch in enumerate(colored):
        maps.on_validation_batch_end(trainer, ColorMethod(), None, batch, number, 1)
    assert maps._images[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_pictures_never_break_a_run(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match=r"no picture of pca in BrokenLogger: ConnectionError: no network"):
        fit(tmp_path, "convnet_nano", [FeatureMaps()], BrokenLogger(), max_epochs=1)
    assert (tmp_path / "pca.png").exists()
    monkeypatch.setattr("ssl_distill.callbacks.neighbours.encode", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match=r"no picture of neighbours: ZeroDivisionError"):
        fit(tmp_path, "convnet_nano", [Neighbours()], max_epochs=1)


def test_batches_without_images_are_skipped(tmp_path):
    """Alone they leave nothing; among others they change nothing."""

    class Points:
        features = torch.zeros(3, 5)

    mixed, alone = (FeatureMaps(), Neighbours(num_neighbours=1)), (FeatureMaps(), Neighbours(num_neighbours=1))
    for callback, expected in zip(mixed, alone, strict=True):
        see(callback, tmp_path / "nothing", [Points()], [Points()])
        assert not (tmp_path / "nothing").exists()
        see(callback, tmp_path / "mixed", [Points(), labelled(BANK)], [labelled(QUERIES), Points()])
        see(expected, tmp_path / "alone", [labelled(BANK)], [labelled(QUERIES)])
    assert torch.equal(mixed[0]._images, alone[0]._images)
    found = [(tmp_path / name / "neighbours.png").read_bytes() for name in ("mixed", "alone")]
    assert found[0] == found[1]


def test_errors():
    for make, message in (
        (lambda: FeatureMaps(-1), "`picture_rows` must be at least 0"),
        (lambda: Neighbours(-1), "`picture_rows` must be at least 0"),
        (lambda: Neighbours(num_neighbours=0), "`num_neighbours` must be at least 1"),
        (lambda: Neighbours(bank_size=0), "`bank_size` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
