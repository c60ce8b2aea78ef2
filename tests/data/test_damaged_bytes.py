"""Damaged bytes of every format that is read: a good read, a counted skip or one line, and never anything else."""

import gzip
import io
import json
import signal
import struct
import tarfile
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lidar_trees import VERSION, write_kitti_object, write_nuscenes, write_semantic_kitti
from PIL import Image

from ssl_distill.data.coco_objects import CocoObjectsData
from ssl_distill.data.doctor import examine
from ssl_distill.data.fashion_mnist import FashionMNISTData
from ssl_distill.data.image_folder import ImageFolderData
from ssl_distill.data.images import decode
from ssl_distill.data.optimize import optimize
from ssl_distill.lidar.kitti_data import KITTIObjectData, SemanticKITTIData
from ssl_distill.lidar.nuscenes_data import NuScenesData
from ssl_distill.lidar.samples import LabelledSamples
from ssl_distill.lidar.shards_data import LidarShardsData, optimize_frames
from ssl_distill.lidar.street import render_scene
from ssl_distill.lidar.street_data import SynthStreetData

PATIENCE_S = 120  # a read that takes so long hangs
SIZES = {"decode_size": 16, "eval_size": 16, "batch_size": 2, "eval_batch_size": 2, "num_workers": 0, "seed": 0}
LIDAR = {"preparation": SynthStreetData(1).preparation, "batch_size": 1, "num_workers": 0, "seed": 0}


class Hangs(BaseException):
    pass


@st.composite
def damage(draw):
    """What becomes of bytes: one to three times flipped, cut, inserted, doubled or zeroed somewhere."""
    kinds = st.sampled_from(["flip", "cut", "end", "insert", "double", "zero", "digit"])
    steps = st.tuples(kinds, st.floats(0, 1), st.integers(1, 600), st.integers(1, 255))
    return draw(st.lists(steps, min_size=1, max_size=3))


def damaged(content, steps):
    for kind, where, length, byte in steps:
        if not content:
            return content
        at = min(int(where * len(content)), len(content) - 1)
        before, part, after = content[:at], content[at : at + length], content[at + length :]
        content = {
            "flip": lambda a=before, b=part, c=after, x=byte: a + bytes([b[0] ^ x]) + b[1:] + c,
            "cut": lambda a=before, c=after: a + c,
            "end": lambda a=before: a,
            "insert": lambda a=before, b=part, c=after, x=byte: a + bytes([x]) * len(b) + b + c,
            "double": lambda a=before, b=part, c=after: a + b + b + c,
            "zero": lambda a=before, b=part, c=after: a + bytes(len(b)) + c,
            "digit": lambda a=before, b=part, c=after, x=byte: a + b"%d" % (x % 10) + b[1:] + c,  # keeps text a text
        }[kind]()
    return content


def outcome(read):
    """What `read` gives, or the line that it ends with."""

    def give_up(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # counts, and what PIL says of damaged headers
            warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools' own
            return read()
    except (OSError, ValueError) as error:
        line = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert line
    assert "\n" not in line
    return line


def picture(seed, size=(40, 30)):
    """Neither flat nor noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(kind, **options):
    content = io.BytesIO()
    picture(0).save(content, kind, **options)
    return content.getvalue()


def with_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


PICTURES = {
    "jpeg": encoded("JPEG"),
    "progressive jpeg": encoded("JPEG", progressive=True),
    "turned jpeg": with_exif(),
    "png": encoded("PNG"),
    "webp": encoded("WEBP"),
    "lossless webp": encoded("WEBP", lossless=True),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "tiff of strips": encoded("TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", PICTURES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps=damage())
def test_pictures(kind, steps):
    found = outcome(lambda: decode(damaged(PICTURES[kind], steps), "it"))
    assert found.startswith("cannot read it: ") if isinstance(found, str) else min(found.shape) >= 1


# Files of data sets: each is damaged where it lies, and all that is read of the set is read.


def folder_of(root):
    for i in range(6):
        path = root / "pictures" / ("cat", "dog")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return root / "pictures"


def read_all(data):
    """Training and evaluation batches of images."""
    parts = data.load()
    for part in (parts.train, parts.bank, parts.queries):
        part.read(list(part.positions))
    return len(parts.train)


def images(root):
    return read_all(ImageFolderData(str(root), **SIZES))


def tar_set(root, form):
    folder = folder_of(root)
    with tarfile.open(root / "all.tar", "w", format=form) as tar:
        tar.add(folder, "a" * 120)  # a name that needs a header of its own
        label = tarfile.TarInfo("x.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"1"))
    return "all.tar", lambda: images(root / "all.tar")


def image_shards(root, file):
    pytest.importorskip("litdata")
    optimize(folder_of(root), root / "shards", images_per_shard=3)
    return f"shards/{file}", lambda: images(root / "shards")


def listed(root):
    folder_of(root)
    rows = (f"pictures/{('cat', 'dog')[i % 2]}/{i}.jpg,a\n" for i in range(6))
    (root / "list.csv").write_text("path,label\n" + "".join(rows))
    return "list.csv", lambda: images(root / "list.csv")


def quarantined(root):
    folder = folder_of(root)
    (folder / "quarantine.txt").write_text("# Files\ncat/0.jpg\tduplicate: of x\ndog/1.jpg\ttiny: 3 x\\n 4\n")

    def read():
        return images(folder), examine(folder).num_files

    return "pictures/quarantine.txt", read


def coco(root):
    folder = folder_of(root)
    polygon = [[1, 1, 20, 1.5, 20, 20]]
    runs = {"size": [30, 40], "counts": [300, 300, 600]}
    code = {"size": [30, 40], "counts": "Q:j0V1"}
    entries = [
        {"id": i, "file_name": f"{'cat' if i % 2 == 0 else 'dog'}/{i}.jpg", "width": 40, "height": 30} for i in range(6)
    ]
    objects = [
        {"id": i, "image_id": i, "bbox": [i, 2.5, 20, 20], "category_id": 3, "segmentation": shape, "iscrowd": 0}
        for i, shape in enumerate([polygon, runs, code, None, polygon, runs])
    ]
    content = {"images": entries, "annotations": objects, "categories": [{"id": 3, "name": "cat"}]}
    (root / "objects.json").write_text(json.dumps(content))
    return "objects.json", lambda: read_all(CocoObjectsData(str(folder), str(root / "objects.json"), **SIZES))


def idx(root, file):
    for part in ("train", "t10k"):
        pixels, classes = np.arange(4 * 784, dtype=np.uint8), np.arange(4, dtype=np.uint8)
        content = struct.pack(">BBBBIII", 0, 0, 8, 3, 4, 28, 28) + pixels.tobytes()
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 4) + classes.tobytes())
    return file, lambda: read_all(FashionMNISTData(str(root), batch_size=2, num_workers=0, seed=0))


def scans(data):
    """Training samples of two epochs and what is evaluated."""
    dataset = data.training_set()
    samples = [dataset[item] for item in range(2 * len(dataset))]
    return samples, [list(loader) for loader in data.val_dataloader()]


def streets():
    frames = [render_scene(0, i, (0, 90)).frame for i in range(2)]
    return [frame._replace(points=frame.points[::8], labels=frame.labels[::8]) for frame in frames]


def kitti(root, file):
    write_semantic_kitti(root, streets())
    write_semantic_kitti(root, streets(), sequence="08")
    data = {"root": str(root), "train_sequences": ("00",), **LIDAR}
    return f"dataset/sequences/00/{file}", lambda: (
        scans(SemanticKITTIData(**data)),
        scans(SemanticKITTIData(**data, samples=LabelledSamples())),
    )


def kitti_object(root, file):
    write_kitti_object(root, streets())
    return f"training/{file}", lambda: scans(KITTIObjectData(str(root), **LIDAR))


def nuscenes(root, file):
    write_nuscenes(root, streets(), scenes=("scene-0061", "scene-0103"))
    return file, lambda: scans(NuScenesData(str(root), VERSION, **LIDAR))


def lidar_shards(root, file):
    pytest.importorskip("litdata")
    write_kitti_object(root, streets())
    optimize_frames(KITTIObjectData(str(root), **LIDAR), root / "shards", frames_per_shard=1)
    return f"shards/{file}", lambda: scans(LidarShardsData(str(root / "shards"), **LIDAR))


FILES = {
    "tar": (lambda root: tar_set(root, tarfile.GNU_FORMAT), 80),
    "pax tar": (lambda root: tar_set(root, tarfile.PAX_FORMAT), 80),
    "shard": (lambda root: image_shards(root, "chunk-0-0.bin"), 60),
    "index.json": (lambda root: image_shards(root, "index.json"), 60),
    "images.csv": (lambda root: image_shards(root, "images.csv"), 60),
    "list": (listed, 60),
    "quarantine": (quarantined, 60),
    "coco": (coco, 150),
    "idx images": (lambda root: idx(root, "train-images-idx3-ubyte.gz"), 60),
    "idx labels": (lambda root: idx(root, "t10k-labels-idx1-ubyte"), 60),
    "kitti scan": (lambda root: kitti(root, "velodyne/000000.bin"), 20),
    "kitti labels": (lambda root: kitti(root, "labels/000000.label"), 20),
    "kitti calibration": (lambda root: kitti(root, "calib.txt"), 20),
    "kitti picture": (lambda root: kitti(root, "image_2/000000.png"), 20),
    "kitti object calibration": (lambda root: kitti_object(root, "calib/000000.txt"), 20),
    "nuscenes scan": (lambda root: nuscenes(root, "samples/LIDAR_TOP/0.pcd.bin"), 20),
    "nuscenes labels": (lambda root: nuscenes(root, f"lidarseg/{VERSION}/lidar-0_lidarseg.bin"), 20),
    **{
        f"nuscenes {table}": (lambda root, table=table: nuscenes(root, f"{VERSION}/{table}.json"), 15)
        for table in (
            *("scene", "sample", "sample_data", "calibrated_sensor", "ego_pose", "sensor", "lidarseg", "category"),
        )
    },
    "lidar shard": (lambda root: lidar_shards(root, "chunk-0-0.bin"), 30),
    "frames.json": (lambda root: lidar_shards(root, "frames.json"), 30),
}


@pytest.mark.parametrize("kind", FILES)
def test_files(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "cache"))
    make, examples = FILES[kind]
    name, read = make(tmp_path)
    whole = (tmp_path / name).read_bytes()
    assert not isinstance(outcome(read), str)  # it can be read as it is

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(steps=damage())
    @example(steps=[("end", 0.0, 1, 1)])
    def check(steps):
        (tmp_path / name).write_bytes(damaged(whole, steps))
        outcome(read)

    check()
