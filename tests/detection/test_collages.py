import pytest
import torch

from ssl_distill.data.fashion_mnist import FashionMNISTData
from ssl_distill.detection.collages import CollageScenes, DenseCollageData


@pytest.fixture(scope="module", autouse=True)
def _needs_fashion_mnist():
    try:
        FashionMNISTData().setup("validate")
    except (OSError, ValueError, RuntimeError) as error:
        pytest.skip(str(error))


def test_every_pixel_has_a_class():
    """Garments are where their boxes are; all else is background."""
    data = DenseCollageData(num_images=30, batch_size=10, bank_size=20, query_size=10, seed=3)
    data.setup("fit")
    scenes = CollageScenes(20, seed=3)
    bank, query = (next(iter(loader)) for loader in data.val_dataloader())
    assert (len(bank.index), len(query.index)) == (20, 10)
    for i, (image, target) in enumerate(scenes):
        assert torch.equal(image * 255, bank.image[i].float())
        classes = set(bank.pixel_label[i].unique().tolist())
        assert classes == {0, *target["labels"].tolist()}
        for box, label, mask in zip(target["boxes"].long(), target["labels"], target["masks"], strict=True):
            assert (bank.pixel_label[i][mask.bool()] == label).all()
            left, top, right, bottom = box.tolist()
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
    assert len(list(data.train_dataloader())) == 3


def test_queries_show_test_garments():
    data = DenseCollageData(num_images=30, batch_size=10, bank_size=20, query_size=10, seed=3)
    query = next(iter(data.val_dataloader()[1]))
    image, _ = CollageScenes(1, train=False, seed=3)[0]
    assert torch.equal(image * 255, query.image[0].float())
    assert not torch.equal(CollageScenes(1, seed=3)[0][0], image)


def test_errors():
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        CollageScenes(0)
