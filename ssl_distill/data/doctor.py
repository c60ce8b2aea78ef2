"""Is a folder of images fit to be trained on?"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from torch.utils.data import DataLoader

from ssl_distill.data.image_paths import in_class_order, list_images, with_classes
from ssl_distill.data.images import decode, open_image
from ssl_distill.data.names import escaped
from ssl_distill.data.sources import FoundImage, ImageSource

Problem = Literal["empty", "truncated", "corrupt", "tiny", "duplicate", "odd mode", "wrong suffix"]

_TEXTS: dict[Problem, str] = {
    "empty": "no bytes at all",
    "truncated": "the file ends too early",
    "corrupt": "no image, damaged, or of too many pixels",
    "tiny": "shorter side below {min_size} px",
    "duplicate": "the same bytes as a file before",
    "odd mode": "neither RGB nor grey; read as RGB all the same",
    "wrong suffix": "another format than the name says; read all the same",
}
_SUFFIXES_OF = {"JPEG": {".jpg", ".jpeg"}, "MPO": {".jpg", ".jpeg"}, "TIFF": {".tif", ".tiff"}}
_PLAIN_MODES = ("RGB", "L")
_EXAMPLES = 3


class Inspection(NamedTuple):
    """What one file is.

    Attributes:
        num_bytes: Size of the file.
        digest: Hash of its bytes.
        size: Width and height as stored; (0, 0) where nothing can be read.
        mode: PIL's name of the pixel format.
        kind: PIL's name of the file format.
        problem: Why it cannot be read.
        message: What the reader said.
    """

    num_bytes: int
    digest: str
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    kind: str = ""
    problem: Problem | None = None
    message: str = ""


class Finding(NamedTuple):
    """One problem of one file."""

    file: FoundImage
    problem: Problem
    detail: str


class Diagnosis(NamedTuple):
    """All that was found.

    Attributes:
        findings: Problems in the order of the files; a file may have several.
        classes: Number of files by class; empty without classes.
        shorter_sides: Least, median and largest, in pixels, of the files that can be read.
        num_files: How many files were read.
        num_bytes: How large they are together.
    """

    findings: list[Finding]
    classes: dict[str, int]
    shorter_sides: tuple[int, int, int]
    num_files: int
    num_bytes: int

    def reasons(self, problems: Collection[str]) -> dict[str, str]:
        """What to put into quarantine for these problems: path inside the root, and why."""
        return {
            file.inner_path: f"{problem}: {detail}" for file, problem, detail in self.findings if problem in problems
        }


def examine(root: Path, min_size: int = 32, num_workers: int = 0) -> Diagnosis:
    """Read every image of a folder or a list as training will.

    Args:
        root: As in `ImageFolderData`.
        min_size: Images whose shorter side is less are tiny.
        num_workers: Processes that read.

    Raises:
        ValueError: If there are no images.
    """
    source, found = list_images("root", root)
    findings: list[Finding] = []
    first_with: dict[str, FoundImage] = {}
    sides: list[int] = []
    num_bytes = 0
    for file, seen in zip(found, _inspect_all(source, found, num_workers), strict=True):
        num_bytes += seen.num_bytes
        findings += (Finding(file, problem, detail) for problem, detail in _problems(file, seen, min_size))
        if seen.problem is None:
            sides.append(min(seen.size))
            first = first_with.setdefault(seen.digest, file)
            if first is not file:
                other_class = f", which is in class {escaped(str(first.label))}" if first.label != file.label else ""
                findings.append(Finding(file, "duplicate", f"of {escaped(first.inner_path)}{other_class}"))
    classes = Counter(file.label for file in with_classes(found, "root", root, "auto"))
    names = in_class_order({name for name in classes if name is not None})
    extremes = (min(sides), int(median(sides)), max(sides)) if sides else (0, 0, 0)
    return Diagnosis(findings, {name: classes[name] for name in names}, extremes, len(found), num_bytes)


def diagnosis_table(root: Path, diagnosis: Diagnosis, min_size: int) -> str:
    """The findings as text: a line per problem with a few examples, then classes and sizes."""
    by_problem: dict[Problem, list[Finding]] = defaultdict(list)
    for finding in diagnosis.findings:
        by_problem[finding.problem].append(finding)
    lines = [f"{escaped(str(root))}: {diagnosis.num_files:,} images, {diagnosis.num_bytes / 1e6:,.1f} MB", ""]
    for problem, text in _TEXTS.items():
        examples = by_problem.get(problem, [])
        lines.append(f"  {problem:<14}{len(examples):>8,}   {text.format(min_size=min_size)}")
        lines += (f"{'':<28}{escaped(each.file.inner_path)}: {each.detail}" for each in examples[:_EXAMPLES])
        if len(examples) > _EXAMPLES:
            lines.append(f"{'':<28}and {len(examples) - _EXAMPLES:,} more")
    return "\n".join([*lines, "", *_summary(diagnosis)])


def _summary(diagnosis: Diagnosis) -> Iterator[str]:
    if classes := diagnosis.classes:
        least, most = (choose(classes, key=classes.__getitem__) for choose in (min, max))
        yield (
            f"classes         {len(classes):,}, with {classes[least]:,} ({escaped(least)}) to {classes[most]:,}"
            f" ({escaped(most)}) images,"
            f" median {median(classes.values()):,.0f}"
        )
    else:
        yield "classes         none: no labels for evaluators"
    least_side, middle, largest = diagnosis.shorter_sides
    yield f"shorter side    {least_side:,} to {largest:,} px, median {middle:,}"


def inspect(content: bytes, name: str) -> Inspection:
    """Read one file's bytes to their end, with the decoder that training uses."""
    known = Inspection(len(content), hashlib.blake2b(content, digest_size=16).hexdigest())
    if not content:
        return known._replace(problem="empty", message="0 bytes")
    try:
        with open_image(content, name) as image:
            known = known._replace(size=image.size, mode=image.mode, kind=image.format or "")
        decode(content, name)
    except OSError as error:
        message = _without_name(error, name)
        is_short = any(word in message.lower() for word in ("truncated", "incomplete", "premature"))
        return known._replace(problem="truncated" if is_short else "corrupt", message=message)
    return known


def _without_name(error: OSError, name: str) -> str:
    return " ".join(str(error).removeprefix(f"cannot read {name}: ").split())


class _Inspections:
    """A data set of inspections, for a loader's processes."""

    def __init__(self, source: ImageSource, positions: Sequence[int]) -> None:
        self.source = source
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> Inspection:
        position = self.positions[item]
        try:
            content = self.source.read(position)
        except OSError as error:
            return Inspection(
                0, "", problem="corrupt", message=error.strerror or _without_name(error, self.source.where(position))
            )
        return inspect(content, self.source.where(position))


def _inspect_all(source: ImageSource, found: Sequence[FoundImage], num_workers: int) -> Iterator[Inspection]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    files: Any = _Inspections(source, [file.position for file in found])
    loader = DataLoader(files, batch_size=None, num_workers=num_workers, collate_fn=_as_is)
    return iter(tqdm(loader, "reading", leave=False, unit=" images", smoothing=0.05))


def _as_is(inspection: Any) -> Any:
    return inspection


def _problems(file: FoundImage, seen: Inspection, min_size: int) -> Iterator[tuple[Problem, str]]:
    if seen.problem is not None:
        yield seen.problem, seen.message
        return
    if min(seen.size) < min_size:
        yield "tiny", f"{seen.size[0]} x {seen.size[1]} px"
    if seen.mode not in _PLAIN_MODES:
        yield "odd mode", seen.mode
    suffix = Path(file.inner_path).suffix.lower()
    if suffix not in _SUFFIXES_OF.get(seen.kind, {f".{seen.kind.lower()}"}):
        yield "wrong suffix", f"is a {seen.kind}"
