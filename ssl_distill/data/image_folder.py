"""A folder of pictures, a list of files, or shards."""

import zlib
from collections.abc import Sequence
from typing import get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import default_collate

from ssl_distill.data.batch import ImageBatch, LabelledBatch, LabelledImages, source_sizes
from ssl_distill.data.corrupt import OnCorrupt, Replacement, check_on_corrupt
from ssl_distill.data.image_paths import Labels, check_root, find_images, in_class_order
from ssl_distill.data.images import decode, evaluation_view
from ssl_distill.data.module import BatchSet, ImageData, ImageParts
from ssl_distill.data.sources import FoundImage, ImageSource


class ImageFolderData(ImageData):
    """Any folder of pictures: flat, nested, or one folder per class; or a list of files; or shards.

    Shards, which `ssl-distill data optimize` makes of a folder, are read by position like files: the images, their
    order, and where a restored run goes on are the same.

    All images of `root` are trained on, those of bank and queries too: training knows no labels. Bank and queries are
    chosen by a hash of their paths, so they stay what they are when files are added. Without labels, evaluators get
    labels of -1 and only the label-free quality of features can be judged. Files in the quarantine list that
    `ssl-distill doctor` wrote are left out.

    Args:
        root: Folder, searched in depth; or a .txt or .csv file with a path in each line, relative to that file, and
            optionally a label after a comma, tab or space; or a folder of LitData's shards; or a WebDataset .tar or a
            folder of them, with labels in `.cls` members or as folders inside.
        val_root: The same for the queries; None takes them from `root`. Where only `val_root` has labels, the bank is
            taken from it too.
        labels: "folder" takes the folders directly in `root` as classes, or what a list or shards say; "none" knows no
            classes; "auto" is "folder" where every image lies in such a folder and there are two or more.
        on_corrupt: "skip" names an unreadable file once, counts it and reads the next one in its place, and stops when
            more than 10 files and 1 % of all are unreadable; "error" stops at the first.
        decode_size: Side of the squares that an `augment` of one's own gets, if it is no `ViewAugment`.
        eval_size: Side of evaluation images.
        batch_size: Training images per rank.
        num_workers: Loader processes.
        eval_batch_size: Images per evaluation batch and rank.
        bank_size: Most images that evaluators learn from.
        query_size: Most images that evaluators predict; from `root` at most a fifth of it.
        seed: Of the order of training images; None is the run's.
    """

    def __init__(
        self,
        root: str,
        val_root: str | None = None,
        labels: Labels = "auto",
        on_corrupt: OnCorrupt = "skip",
        decode_size: int = 256,
        eval_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 2,
        eval_batch_size: int = 64,
        bank_size: int = 10_000,
        query_size: int = 2_000,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, decode_size, eval_size, eval_batch_size, bank_size, query_size, seed)
        if labels not in get_args(Labels):
            raise ValueError(f"`labels` must be one of {', '.join(get_args(Labels))}, got {labels}.")
        check_on_corrupt(on_corrupt)
        self.root = check_root("root", root)
        self.val_root = None if val_root is None else check_root("val_root", val_root)
        self.labels = labels
        self.on_corrupt = on_corrupt

    def load(self) -> ImageParts:
        """List the files, name the classes, and choose bank and queries."""
        source, found = find_images("root", self.root, self.labels)
        val_source, val_found = (
            find_images("val_root", self.val_root, self.labels) if self.val_root else (source, found)
        )
        bank_found = val_found if found[0].label is None and val_found[0].label is not None else found
        names = {file.label for file in bank_found if file.label is not None}
        self.class_names = in_class_order(names)
        self.num_classes = len(names) or None
        strangers = {file.label for file in val_found if file.label is not None} - names
        if strangers:
            raise ValueError(
                f"`val_root` {self.val_root} has a class {min(strangers)} that `root` {self.root} has not."
            )

        train = self._files(source, found)
        queries = self._files(val_source, val_found) if self.val_root else train
        bank = train if bank_found is found else queries
        bank_order, query_order = _hash_order(bank_found), _hash_order(val_found)
        if bank is queries:
            num_queries = min(self.query_size, max(1, len(query_order) // 5))
            bank_order, query_order = query_order[num_queries:] or query_order, query_order[:num_queries]
        classes = f"{self.num_classes} classes" if names else "no labels"
        self.training_files = [file.inner_path for file in found], [source.file(file.position) for file in found]
        rank_zero_info(f"{len(found)} images in {self.root}, {classes}")
        return ImageParts(
            BatchSet(train.image_batch, range(len(found))),
            BatchSet(bank.labelled_batch, bank_order[: self.bank_size]),
            BatchSet(queries.labelled_batch, query_order[: self.query_size]),
            BatchSet(bank.labelled_images, bank_order[: self.bank_size]),
        )

    def _files(self, source: ImageSource, found: Sequence[FoundImage]) -> "ImageFiles":
        number = {name: label for label, name in enumerate(self.class_names)}
        labels = [-1 if file.label is None else number[file.label] for file in found]
        positions = [file.position for file in found]
        return ImageFiles(source, positions, labels, self.eval_size, self.on_corrupt)


class ImageFiles:
    """Image files, read when asked for.

    Args:
        source: Where they lie.
        in_source: Position of each file there.
        labels: Class of each file, or -1.
        eval_size: Side of evaluation images.
        on_corrupt: As in `Replacement`.
    """

    def __init__(
        self,
        source: ImageSource,
        in_source: Sequence[int],
        labels: Sequence[int],
        eval_size: int,
        on_corrupt: OnCorrupt,
    ) -> None:
        self.source = source
        self.in_source = torch.tensor(in_source)
        self.labels = torch.tensor(labels)
        self.eval_size = eval_size
        self.replacement = Replacement(len(in_source), on_corrupt)

    def image_batch(self, positions: Sequence[int]) -> ImageBatch:
        """Whole images."""
        images = [self._read(position)[0] for position in positions]
        return ImageBatch(images, source_sizes(images), torch.tensor(positions))

    def labelled_images(self, positions: Sequence[int]) -> LabelledImages:
        """Whole images, with the labels of the files that were read."""
        images, read = zip(*(self._read(position) for position in positions), strict=True)
        return LabelledImages(list(images), self.labels[list(read)], torch.tensor(positions))

    def labelled_batch(self, positions: Sequence[int]) -> LabelledBatch:
        """Central squares, with the labels of the files that were read."""
        views, read = [], []
        for position in positions:
            image, used = self._read(position)
            views.append(evaluation_view(image, self.eval_size))
            read.append(used)
        return LabelledBatch(default_collate(views), self.labels[read], torch.tensor(positions))

    def _read(self, position: int) -> tuple[Tensor, int]:
        """The image at this position, or else the next readable one; and its position."""
        return self.replacement.read(position, self._decode)

    def _decode(self, position: int) -> Tensor:
        place = int(self.in_source[position])
        return decode(self.source.read(place), self.source.where(place))


def _hash_order(found: Sequence[FoundImage]) -> list[int]:
    """Positions in an order that looks random, and in which files keep their places when others come."""
    keys = [(zlib.crc32(file.inner_path.encode(errors="surrogateescape")), file.inner_path) for file in found]
    return sorted(range(len(found)), key=keys.__getitem__)
