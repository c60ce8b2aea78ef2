"""`ssl-distill data optimize`: a folder of images as shards, which disks and networks read faster."""

import os
from pathlib import Path

from ssl_distill.commands.arguments import OneLineParser


def data(args: list[str]) -> None:
    """Write shards; the same command goes on where one was interrupted.

    Raises:
        ValueError: If there are no images, or the output holds something else.
    """
    parser = OneLineParser(prog="ssl-distill data", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    optimize_parser = commands.add_parser("optimize", help="LitData shards of a folder", description=__doc__)
    optimize_parser.add_argument("root", metavar="DIR", help="what `root` of ImageFolderData may be")
    optimize_parser.add_argument("output", metavar="OUT", type=Path, help="new folder, or one to go on with")
    optimize_parser.add_argument("--images-per-shard", type=int, default=1000)
    optimize_parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that write")
    options = parser.parse_args(args)
    for name, value, least in (
        ("images-per-shard", options.images_per_shard, 1),
        ("workers", options.workers, 0),
    ):
        if value < least:
            raise ValueError(f"`--{name}` must be at least {least}, got {value}.")

    from ssl_distill.data.image_paths import check_root
    from ssl_distill.data.optimize import optimize

    root = check_root("DIR", options.root)
    count = optimize(root, options.output, options.images_per_shard, options.workers)
    print(f"{count:,} images in {options.output}; train on them with --data.init_args.root {options.output}")
