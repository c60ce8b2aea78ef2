"""Lidar frames as shards of LitData, and the data module that reads them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ssl_distill.data.corrupt import OnCorrupt
from ssl_distill.data.files import read_json
from ssl_distill.data.optimize import Item, Table, write_shards
from ssl_distill.data.sources import LitDataItems, check_shards, count_items, is_litdata
from ssl_distill.lidar.data import LidarData, LidarParts, chosen, origin
from ssl_distill.lidar.files import check_points
from ssl_distill.lidar.frames import Camera, EncodedImage, Frames, LidarCameraFrame, Sensor
from ssl_distill.lidar.preparation import Preparation
from ssl_distill.lidar.samples import Samples

TABLE = "frames.json"  # beside the shards: names of classes, and which frames are trained on and evaluated with


def optimize_frames(data: LidarData, output: Path, frames_per_shard: int = 100, num_workers: int = 0) -> int:
    """Write the frames that a data module trains on and evaluates with, each once.

    Points, labels, poses and intrinsics stay what they are, to the bit. Pictures that are files are taken as they are,
    others become PNG.

    Args:
        data: Whose frames are written, also those that its `bank_size` and `query_size` leave out.
        output: As in `write_shards`.
        frames_per_shard: As in `write_shards`.
        num_workers: As in `write_shards`.

    Returns:
        How many frames there are.

    Raises:
        ValueError: As in `write_shards`.
        OSError: If a frame or a picture cannot be read.
    """
    items = _FrameItems()
    positions = {
        part: None if frames is None else [items.add(frames, position) for position in range(len(frames))]
        for part, frames in data.load()._asdict().items()
    }
    sizes = {"num_frames": len(items), "bank_size": data.bank_size, "query_size": data.query_size}
    table = Table(TABLE, json.dumps({**sizes, **positions, "class_names": data.class_names}).encode())
    identity = repr([items[0], items[len(items) - 1]]).encode()
    write_shards(items, table, identity, output, frames_per_shard, num_workers)
    return len(items)


class LidarShardsData(LidarData):
    """Frames in shards that `ssl-distill data optimize CONFIG OUT` made of another lidar data module's.

    With the same samples, preparation, batch size and seed, batches are that module's, to the bit.

    Args:
        root: Folder of the shards.
        samples: As in `LidarData`.
        preparation: As in `LidarData`; shards hold whole scans and know none.
        batch_size: Training clouds per rank.
        num_workers: Loader processes.
        eval_batch_size: Scans per evaluation batch and rank.
        bank_size: Most scans that a method's probe learns from; None is what the other module had.
        query_size: Most scans that are predicted; None is what the other module had.
        seed: Of order and augmentation; None is the run's.
        on_corrupt: As in `LidarData`.
    """

    def __init__(
        self,
        root: str,
        samples: Samples | None = None,
        preparation: Preparation | None = None,
        batch_size: int = 8,
        num_workers: int = 4,
        eval_batch_size: int = 4,
        bank_size: int | None = None,
        query_size: int | None = None,
        seed: int | None = None,
        on_corrupt: OnCorrupt = "skip",
    ) -> None:
        folder = Path(root).expanduser()
        facts = _read_table(folder)
        bank_size = facts["bank_size"] if bank_size is None else bank_size
        query_size = facts["query_size"] if query_size is None else query_size
        sizes = (batch_size, num_workers, eval_batch_size, bank_size, query_size)
        super().__init__(samples, preparation, *sizes, seed, on_corrupt)
        self.root = folder
        self.class_names = tuple(facts["class_names"])

    def load(self) -> LidarParts:
        """Frames by their positions in the shards."""
        facts = _read_table(self.root)
        frames = ShardFrames(self.root, facts["num_frames"])
        self.training_files = ["index.json"], [str(self.root / "index.json")]
        bank, queries = (None if facts[part] is None else chosen(frames, facts[part]) for part in ("bank", "queries"))
        return LidarParts(chosen(frames, facts["train"]), bank, queries)


class ShardFrames:
    """All frames in a folder of shards. Copies in loader processes open their own readers."""

    def __init__(self, root: Path, count: int) -> None:
        self.root = root
        self.count = count
        self._items = LitDataItems(root)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> LidarCameraFrame:
        item = self._items[position]
        try:
            return unpack_frame(item, str(self.root))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise OSError(f"cannot read frame {position} of {self.root}: {type(error).__name__} {error}") from error


class _FrameItems:
    """Frames of data sets, each once."""

    def __init__(self) -> None:
        self._sources: dict[int, Frames] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._places: list[tuple[int, int]] = []

    def add(self, frames: Frames, position: int) -> int:
        """The number of a frame among the items; a new one if it is not among them yet."""
        source, place = origin(frames, position)
        key = (id(source), place)
        if key not in self._numbers:
            self._sources[id(source)] = source
            self._numbers[key] = len(self._places)
            self._places.append(key)
        return self._numbers[key]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Item:
        source, place = self._places[number]
        return pack_frame(self._sources[source][place])


def pack_frame(frame: LidarCameraFrame) -> Item:
    """A frame as an item of shards: arrays as safetensors, all else as JSON.

    Raises:
        OSError: If a picture cannot be read.
    """
    arrays = {"points": frame.points}
    if frame.labels is not None:
        arrays["labels"] = frame.labels
    for number, camera in enumerate(frame.cameras):
        arrays[f"{number}.cam_from_lidar"] = camera.cam_from_lidar
        arrays[f"{number}.intrinsics"] = camera.intrinsics
        arrays[f"{number}.image"] = np.frombuffer(_encoded(camera.image), np.uint8)
    facts = {
        "frame_id": frame.frame_id,
        "sensor": frame.sensor._asdict(),
        "cameras": [camera.name for camera in frame.cameras],
    }
    # safetensors writes the memory as it lies, also of arrays that are transposed.
    return {"facts": json.dumps(facts), "arrays": save({name: np.ascontiguousarray(a) for name, a in arrays.items()})}


def unpack_frame(item: dict[str, Any], root: str) -> LidarCameraFrame:
    """The frame that `pack_frame` was given, its pictures still encoded.

    Args:
        item: Facts and arrays.
        root: Where it comes from, for messages.
    """
    said = item["facts"]  # text in shards of version 0.1
    facts = json.loads(said if isinstance(said, str) else bytes(said))
    # Copied where they cannot be written to, which torch warns of.
    arrays = {name: np.require(array, requirements="W") for name, array in load(bytes(item["arrays"])).items()}
    cameras = tuple(
        Camera(
            name,
            EncodedImage(arrays[f"{number}.image"].tobytes(), f"{root}:{facts['frame_id']}:{name}"),
            arrays[f"{number}.cam_from_lidar"],
            arrays[f"{number}.intrinsics"],
        )
        for number, name in enumerate(facts["cameras"])
    )
    sensor = Sensor(**facts["sensor"])
    check_points(arrays["points"], f"{root}:{facts['frame_id']}")
    return LidarCameraFrame(arrays["points"], arrays.get("labels"), cameras, facts["frame_id"], sensor)


def _encoded(image: UInt8[np.ndarray, "H W 3"] | Path | EncodedImage) -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    if isinstance(image, EncodedImage):
        return image.content
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _read_table(root: Path) -> dict[str, Any]:
    """What is said of all frames.

    Raises:
        ValueError: If a folder holds no shards, shards of something else, damaged ones, or not all of them.
        OSError: If they cannot be read.
    """
    if not is_litdata(root):
        raise ValueError(
            f"`root` must be a folder of finished shards, {root} {'holds none' if root.is_dir() else 'is none'}; make"
            " them with `ssl-distill data optimize CONFIG OUT`."
        )
    if not (root / TABLE).is_file():
        raise ValueError(
            f"`root` {root} holds shards without {TABLE}, so not of lidar frames; make them with `ssl-distill data"
            " optimize CONFIG OUT`."
        )
    check_shards(root)
    facts: dict[str, Any] = read_json(root / TABLE)
    _check_facts(facts, root / TABLE)
    if count_items(root) != facts["num_frames"]:
        raise ValueError(
            f"`root` {root} holds {count_items(root)} items, its {TABLE} {facts['num_frames']}; make the shards again."
        )
    return facts


def _check_facts(facts: Any, table: Path) -> None:
    """Refuse a table that is damaged.

    Raises:
        ValueError: If it is.
    """
    numbers = ("num_frames", "bank_size", "query_size")
    if not isinstance(facts, dict) or not all(type(facts.get(name)) is int and facts[name] > 0 for name in numbers):
        raise ValueError(f"{table} must give {', '.join(numbers)}, whole numbers; make the shards again.")
    for part in ("train", "bank", "queries"):
        positions = facts.get(part, ())
        if positions is None and part != "train":
            continue
        if not isinstance(positions, list) or not all(
            type(i) is int and 0 <= i < facts["num_frames"] for i in positions
        ):
            raise ValueError(
                f"{table}: `{part}` must list frames from 0 to {facts['num_frames'] - 1}; make the shards again."
            )
    names = facts.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{table}: `class_names` must be a list of names; make the shards again.")
