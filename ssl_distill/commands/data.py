"""`ssl-distill data optimize`: images or lidar frames as shards, which disks and networks read faster."""

import json
import os
from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_distill.commands.arguments import OneLineParser

if TYPE_CHECKING:
    from ssl_distill.lidar.data import LidarData

_IMAGES_PER_SHARD, _FRAMES_PER_SHARD = 1000, 100


def data(args: list[str]) -> None:
    """Write shards; the same command goes on where one was interrupted.

    Raises:
        ValueError: If there is nothing to write, or the output holds something else.
    """
    parser = OneLineParser(prog="ssl-distill data", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    optimize_parser = commands.add_parser(
        "optimize",
        help="LitData shards of a folder, or of a config's lidar frames",
        description=__doc__,
        epilog="After a CONFIG, options such as --data.init_args.root override it.",
        allow_abbrev=False,
    )
    optimize_parser.add_argument(
        "source",
        metavar="DIR",
        help="what `root` of ImageFolderData may be; or a CONFIG (.yaml) whose `data` are lidar frames",
    )
    optimize_parser.add_argument("output", metavar="OUT", type=Path, help="new folder, or one to go on with")
    optimize_parser.add_argument(
        "--items-per-shard",
        "--images-per-shard",
        type=int,
        help=f"{_IMAGES_PER_SHARD} images or {_FRAMES_PER_SHARD} frames if not given",
    )
    optimize_parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that write")
    options, overrides = parser.parse_known_args(args)
    is_config = Path(options.source).suffix.lower() in (".yaml", ".yml")
    if overrides and not is_config:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    per_shard: int = options.items_per_shard
    if per_shard is None:
        per_shard = _FRAMES_PER_SHARD if is_config else _IMAGES_PER_SHARD
    for name, value, least in (("items-per-shard", per_shard, 1), ("workers", options.workers, 0)):
        if value < least:
            raise ValueError(f"`--{name}` must be at least {least}, got {value}.")

    if is_config:
        from ssl_distill.lidar.shards_data import LidarShardsData, optimize_frames

        frames = _lidar_data(Path(options.source), overrides)
        count = optimize_frames(frames, options.output, per_shard, options.workers)
        reader = f"{LidarShardsData.__module__}.{LidarShardsData.__name__}"
        print(f"{count:,} frames in {options.output}; train on them with")
        print(f"  --data {reader} --data.init_args.root {options.output}")
    else:
        from ssl_distill.data.image_paths import check_root
        from ssl_distill.data.optimize import optimize

        count = optimize(check_root("DIR", options.source), options.output, per_shard, options.workers)
        print(f"{count:,} images in {options.output}; train on them with --data.init_args.root {options.output}")


def _lidar_data(config: Path, overrides: list[str]) -> "LidarData":
    """The data module of a config, whose method and trainer are not asked for.

    Raises:
        ValueError: If it is no config, or its data are no lidar frames.
    """
    from jsonargparse import ArgumentParser
    from lightning.pytorch import seed_everything

    from ssl_distill.commands.explain import explain
    from ssl_distill.commands.quiet import without_advice
    from ssl_distill.lidar.data import LidarData
    from ssl_distill.reading.settings import read_yaml

    parser = ArgumentParser(prog="ssl-distill", exit_on_error=False)
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_subclass_arguments(LidarData, "data", required=True)
    try:
        content = read_yaml(config)
        if not isinstance(content, dict) or "data" not in content:
            raise ValueError(f"`DIR` {config} must be a folder, or a config with a section `data`, which it has not.")
        seed = content.get("seed_everything")
        seeded = ["--seed_everything", str(seed)] if type(seed) is int else []  # it may be a boolean
        parsed = parser.parse_args([*seeded, "--data", json.dumps(content["data"]), *overrides])
    except ArgumentError as error:
        raise ValueError(explain(error, [action.dest for action in parser._actions])) from error
    seed_everything(parsed.seed_everything, workers=True, verbose=False)  # what is generated follows from it
    with without_advice():
        made = parser.instantiate(parsed)
    module: LidarData = made.data
    module.prepare_data()
    return module
