import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.augment.object_crop import ObjectCropAugment
from ssl_distill.backbones.create import create_backbone
from ssl_distill.data.batch import DenseBatch
from ssl_distill.data.object_labels import LabelledObjectBatch, objects_of
from ssl_distill.data.shapes import ShapesData
from ssl_distill.evaluate.evaluation import Evaluation
from ssl_distill.evaluate.knn import KNN
from ssl_distill.evaluate.object_reading import ObjectReading
from ssl_distill.methods.odis import ODIS


def labelled_objects(seed):
    """Noise with two bright quarters in each image, upper left or lower right: only the mask tells which is meant."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 50, (20, 3, 32, 32), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(20, 32, 32, dtype=torch.bool)
    mask[::2, :16, :16] = True
    mask[1::2, 16:, 16:] = True
    image[:, 0, :16, :16] += 200
    image[:, 2, 16:, 16:] += 200
    return LabelledObjectBatch(image, torch.arange(20) % 2, torch.arange(20), mask)


def validate(evaluation, loaders, folder):
    torch.manual_seed(0)
    crops = MultiCropAugment(global_size=32, local_size=16, num_local=1)
    method = ODIS("vit_nano_patch8_32", num_prototypes=16, augment=ObjectCropAugment(crops, patch_size=8))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", callbacks=[evaluation], default_root_dir=folder, **quiet).validate(
        method, loaders, verbose=False
    )
    return evaluation.history[-1]["scores"]


def loaders_of(*batches):
    return [DataLoader([batch], batch_size=None) for batch in batches]


def test_masked_beside_unmasked(tmp_path):
    evaluation = Evaluation([KNN(k=(5,))], ObjectReading())
    scores = validate(evaluation, loaders_of(labelled_objects(0), labelled_objects(1)), tmp_path)
    assert list(scores) == ["teacher", "student"]
    assert [name for name in scores["teacher"] if "top1" in name] == ["knn_top1_masked", "knn_top1_unmasked"]
    assert scores["teacher"]["knn_top1_masked"] == 1
    assert scores["teacher"]["knn_top1_unmasked"] < 0.9


def test_classes_of_pixels_are_objects():
    image = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    pixel_label = torch.zeros(2, 4, 4, dtype=torch.long)
    pixel_label[0, 0, :2] = 3
    pixel_label[0, 3, 3] = 3
    pixel_label[0, 2] = 1
    pixel_label[1, 1, 1] = 3
    objects = objects_of(DenseBatch(image, pixel_label, torch.tensor([7, 8])))
    assert objects.source.tolist() == [0, 0, 1]
    assert objects.label.tolist() == [1, 3, 3]
    assert len(objects.index.unique()) == 3
    for source, label, mask in zip(objects.source, objects.label, objects.mask, strict=True):
        assert torch.equal(mask, pixel_label[source] == label)


def test_images_without_objects():
    empty = DenseBatch(torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long), torch.arange(2))
    for rows in ObjectReading()(create_backbone("vit_nano_patch8_32"), torch.zeros(2, 3, 32, 32), empty):
        assert rows.features.shape == (0, 64)


def test_scenes(tmp_path):
    """Without a class per image the default evaluation judges by what needs none; objects of scenes have classes."""
    data = ShapesData("scene", num_images=8, batch_size=4, bank_size=8, query_size=8, eval_batch_size=4, seed=0)
    assert "rankme" in validate(Evaluation(), data, tmp_path)["teacher"]
    of_objects = validate(Evaluation([KNN(k=(5,))], ObjectReading()), data, tmp_path)
    assert of_objects["teacher"].keys() >= {"knn_top1_masked", "knn_top1_unmasked"}


@pytest.mark.parametrize(
    ("encoder", "batch", "message"),
    [
        ("vit_nano_patch8_32", (), "objects are read from LabelledObjectBatch or DenseBatch, got tuple; use Fashion"),
        ("convnet_nano", (), "`ObjectReading` needs plain ViTs, whose attention it masks, got ConvNetNano"),
    ],
)
def test_errors(encoder, batch, message):
    with pytest.raises(ValueError, match=message):
        ObjectReading()(create_backbone(encoder), torch.zeros(2, 3, 32, 32), batch)
