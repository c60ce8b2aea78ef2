"""Whether a checkpoint can be read and fits, said in one line."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from ssl_distill.reading.settings import read_yaml
from ssl_distill.reading.shards import find_damaged_shard, has_shard_checksums
from ssl_distill.reading.tensors import find_damage, has_checksums, load_tensors


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint, its tensors mapped, not read. One in shards comes without its weights.

    All of it is compared with its checksums before. One that has none, of torch before version 1.6 or in shards of
    version 0.1, is read with a line that says so.

    Raises:
        ValueError: If it is damaged or holds more than tensors and plain values; names another that is whole.
    """
    path = Path(path)
    if reason := _damage(path):
        others = (each for each in _by_age(path.parent.glob("*.ckpt")) if each.name != path.name)
        whole = next((each for each in others if _has_checksums(each) and _damage(each) is None), None)
        mend = f"go on from {whole}, which is whole" if whole else "there is no other whole checkpoint beside it"
        raise ValueError(f"`ckpt_path` {path} is damaged, perhaps cut off ({reason}); {mend}.")
    in_shards = path.is_dir()  # then Lightning's part is a file of its own
    file = path / "meta.pt" if in_shards else path
    checkpoint = load_tensors(file, "ckpt_path", mmap=True)
    if not in_shards and (not isinstance(checkpoint, dict) or "state_dict" not in checkpoint):
        raise ValueError(f"`ckpt_path` {path} is no checkpoint: it has no `state_dict`.")
    if not _has_checksums(path):
        rank_zero_info(f"{path} has no checksums: nobody can tell whether it is what was written")
    return checkpoint


def _damage(path: Path) -> str | None:
    return find_damaged_shard(path) if path.is_dir() else find_damage(path)


def _has_checksums(path: Path) -> bool:
    return has_shard_checksums(path) if path.is_dir() else has_checksums(path)


def _by_age(paths: Iterable[Path]) -> list[Path]:
    """The newest first."""
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def check_fits(checkpoint: dict[str, Any], path: str | Path, model: nn.Module, model_config: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights the model cannot take.

    Args:
        checkpoint: What `read_checkpoint` gave.
        path: Its file, for the message; a config.yaml beside it tells which arguments differ.
        model: The method of this run.
        model_config: Its `class_path` and `init_args`.

    Raises:
        ValueError: If the checkpoint is of another method, or of other sizes.
    """
    method = checkpoint.get("ssl_distill", {}).get("method")
    if method and method != (ours := f"{type(model).__module__}.{type(model).__qualname__}"):
        raise ValueError(f"`ckpt_path` {path} is of {method}, but `model` is {ours}.")
    if "state_dict" not in checkpoint:
        return
    theirs, mine = checkpoint["state_dict"], model.state_dict()
    misfits = [
        f"{name} is {tuple(theirs[name].shape)} there and {tuple(value.shape)} here"
        for name, value in mine.items()
        if name in theirs and theirs[name].shape != value.shape
    ]
    if getattr(model, "strict_loading", True):
        misfits += [f"it has no {name}" for name in mine if name not in theirs]
        misfits += [f"it has {name}, which this model has not" for name in theirs if name not in mine]
    if misfits:
        differing = ", ".join(_differences(Path(path).parent / "config.yaml", model_config))
        cause = f"; arguments differ: {differing}" if differing else ""
        raise ValueError(f"`ckpt_path` {path} does not fit this model: {misfits[0]}{cause}.")


def _differences(config_file: Path, model_config: dict[str, Any]) -> Iterator[str]:
    """Arguments of the model that a saved config has otherwise."""
    if not config_file.exists():
        return
    theirs = dict(_flat(read_yaml(config_file).get("model", {})))
    for key, value in _flat(model_config):
        if theirs.get(key, value) != value:
            yield f"{key.rpartition('init_args.')[2]} is {theirs[key]} there and {value} here"


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, config
