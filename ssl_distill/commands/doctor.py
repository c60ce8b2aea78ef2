"""`ssl-distill doctor`: read every image of a folder before training does, and list those to leave out."""

import os

from ssl_distill.commands.arguments import OneLineParser

_GROUPS = {"unreadable": ("empty", "truncated", "corrupt"), "tiny": ("tiny",), "duplicates": ("duplicate",)}


def doctor(args: list[str]) -> None:
    """Print what was found, and write the quarantine list that `ImageFolderData` honours.

    Raises:
        ValueError: If there are no images.
    """
    parser = OneLineParser(prog="ssl-distill doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("root", metavar="DIR", help="folder of images, or a .txt or .csv list of files")
    parser.add_argument("--min-size", type=int, default=32, help="a shorter side below so many pixels is tiny")
    parser.add_argument(
        "--quarantine",
        nargs="*",
        choices=_GROUPS,
        default=["unreadable"],
        help="what loaders leave out; nothing after it: only look, and write no list",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read")
    options = parser.parse_args(args)
    if options.workers < 0:
        raise ValueError(f"`--workers` must be at least 0, got {options.workers}.")

    from ssl_distill.data.doctor import diagnosis_table, examine
    from ssl_distill.data.image_paths import check_root
    from ssl_distill.data.quarantine import write_quarantine

    root = check_root("DIR", options.root)
    diagnosis = examine(root, options.min_size, options.workers)
    print(diagnosis_table(root, diagnosis, options.min_size))
    if not options.quarantine:
        return
    reasons = diagnosis.reasons([problem for group in options.quarantine for problem in _GROUPS[group]])
    written = write_quarantine(root, reasons)
    left_out = f"{len(reasons):,} images, which ImageFolderData leaves out: {written}" if written else "nothing"
    print(f"quarantine      {left_out}")
