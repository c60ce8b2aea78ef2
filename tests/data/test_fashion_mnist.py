import gzip

import numpy as np
import pytest
import torch

from ssl_distill.data.fashion_mnist import DEBIAN_FOLDER, FashionMNISTData


@pytest.fixture
def root(tmp_path):
    """A tiny data set in the format of the real one."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 12)):
        images = generator.integers(1, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = np.array([2049, count], ">i4").tobytes()
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return tmp_path


def test_batches(root):
    data = FashionMNISTData(str(root), batch_size=10, bank_size=20, query_size=5)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (10, 3, 32, 32)
    assert (batch.image[:, 0] == batch.image[:, 2]).all()
    assert (batch.image[:, :, :2] == 0).all()
    assert (batch.image[:, :, 2:30, 2:30] > 0).all()
    bank, queries = data.val_dataloader()
    assert torch.cat([part.label for part in bank]).tolist() == [i % 10 for i in range(20)]
    assert sum(len(part.label) for part in queries) == 5
    assert data.num_classes == len(data.class_names) == 10


def test_real_images():
    if not DEBIAN_FOLDER.is_dir():
        pytest.skip(f"{DEBIAN_FOLDER} is missing: apt-get install dataset-fashion-mnist")
    data = FashionMNISTData()
    assert [len(part) for part in data.parts[:3]] == [60_000, 10_000, 2_000]
    bank, queries = (part.read(part.positions) for part in data.parts[1:3])
    assert bank.label[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert queries.label[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    trousers = bank.image[bank.label == data.class_names.index("trouser")].float().mean((0, 1))
    assert trousers[16, 16] < trousers[16, [12, 20]].min()  # a gap between the legs


def test_shifts_are_fixed_per_image_and_reach_their_limit(root):
    first, second = (FashionMNISTData(str(root), max_shift=3, batch_size=10, bank_size=30) for _ in range(2))
    images = []
    for data in (first, second):
        data.setup("fit")
        images.append(torch.cat([part.image for part in data.val_dataloader()[0]]))
    assert torch.equal(*images)
    filled = images[0][:, 0].amax(2) > 0  # (N, rows)
    tops = filled.byte().argmax(1)
    assert tops.min() == 0  # two pixels of border, moved by up to three
    assert tops.max() == 5


def test_missing_files_are_named(root, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("ssl_distill.data.fashion_mnist.DEBIAN_FOLDER", root / "debian")
    monkeypatch.setattr("ssl_distill.data.fashion_mnist.DOWNLOAD_FOLDER", root / "cache")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(ValueError, match=r"neither in .*debian nor in .*no network.*apt-get install dataset-fashion"):
        FashionMNISTData().prepare_data()
    whole = (root / "train-images-idx3-ubyte.gz").read_bytes()
    for damaged in (whole[:-50], gzip.compress(gzip.decompress(whole)[:-50]), b""):
        (root / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read .*train-images-idx3-ubyte"):
            FashionMNISTData(str(root)).setup("fit")


def test_errors(root, tmp_path):
    with pytest.raises(ValueError, match="`max_shift`"):
        FashionMNISTData(str(root), max_shift=-1)
    with pytest.raises(ValueError, match="`root`"):
        FashionMNISTData(str(tmp_path / "nowhere")).setup("fit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`root` .*empty must hold t10k-labels-idx1-ubyte\[.gz\]"):
        FashionMNISTData(str(tmp_path / "empty")).prepare_data()
