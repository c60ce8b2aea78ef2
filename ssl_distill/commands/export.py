"""`ssl-distill export`: the backbone of a checkpoint."""

from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule

from ssl_distill.commands.arguments import OneLineParser
from ssl_distill.commands.checkpoints import check_fits, read_checkpoint
from ssl_distill.commands.explain import explain
from ssl_distill.commands.trust import HELP, import_known_only
from ssl_distill.detection.keys import detectron2_settings, save_detectron2, save_torchvision
from ssl_distill.export import choose_encoder, describe_encoder, export_backbone, loading_lines, quoted
from ssl_distill.reading.settings import read_yaml
from ssl_distill.reading.shards import read_shards


def export(args: list[str]) -> None:
    """Make the method again from the run's config, load the checkpoint, and save one encoder.

    Raises:
        ValueError: If there is no config, the checkpoint does not fit it, or the format does not know the network.
    """
    parser = OneLineParser(prog="ssl-distill export", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a .ckpt of `ssl-distill fit`")
    parser.add_argument("--encoder", help="which network; default: the better one, if the method trains one model")
    parser.add_argument("--format", choices=_FORMATS, default="timm", help="default: timm; the others take ResNets")
    parser.add_argument("--output", type=Path, help="default: backbone.<suffix of the format> beside the checkpoint")
    parser.add_argument("--config", type=Path, help="default: config.yaml beside the checkpoint")
    parser.add_argument("--trust", action="store_true", help=HELP)
    options = parser.parse_args(args)
    config_file = options.config or options.checkpoint.parent / "config.yaml"
    for argument, file in (("checkpoint", options.checkpoint), ("--config", config_file)):
        if not file.exists():
            raise ValueError(f"`{argument}` {file} does not exist.")
    checkpoint = read_checkpoint(options.checkpoint)
    if options.checkpoint.is_dir():
        checkpoint = read_shards(options.checkpoint)
    content = read_yaml(config_file)
    if not isinstance(content, dict) or not isinstance(config := content.get("model"), dict):
        raise ValueError(f"`--config` {config_file} must have a mapping `model`, as the config.yaml of a run has.")
    if not options.trust:
        import_known_only()
    method: Any = _make(config)
    check_fits(checkpoint, options.checkpoint, method, config)
    method.load_state_dict(checkpoint["state_dict"], strict=method.strict_loading)

    scores = checkpoint.get("ssl_distill", {}).get("scores", {})
    name = choose_encoder(method, options.encoder, scores)
    suffix, save = _FORMATS[options.format]
    stem = f"backbone_{options.encoder}" if options.encoder else "backbone"
    output = options.output or options.checkpoint.parent / f"{stem}{suffix}"
    lines = save(method.encoders()[name], output, describe_encoder(method, name, scores))
    print("\n".join([f"{output}: the {name} of {options.checkpoint}", *lines]))


def _timm(encoder: Any, path: Path, metadata: dict[str, Any]) -> list[str]:
    """Save; lines of Python that load it."""
    export_backbone(encoder, path, metadata)
    return loading_lines(path)


def _torchvision(encoder: Any, path: Path, metadata: dict[str, Any]) -> list[str]:
    name = save_torchvision(encoder, path)
    load = f"backbone.load_state_dict(torch.load({quoted(path)}), strict=False)  # only fc is missing"
    normalization = f"images are normalised with mean {metadata['mean']} and std {metadata['std']}"
    return [f"import torch, torchvision; backbone = torchvision.models.{name}(); {load}", normalization]


def _detectron2(encoder: Any, path: Path, metadata: dict[str, Any]) -> list[str]:
    name = save_detectron2(encoder, path)
    settings = {"MODEL.WEIGHTS": str(path), **detectron2_settings(name, metadata["mean"], metadata["std"])}
    return ["settings of a detectron2 config:", *(f"  {key}: {value}" for key, value in settings.items())]


_FORMATS: dict[str, tuple[str, Callable[[Any, Path, dict[str, Any]], list[str]]]] = {
    "timm": (".safetensors", _timm),
    "torchvision": (".pth", _torchvision),
    "detectron2": (".pkl", _detectron2),
}


def _make(config: dict) -> LightningModule:
    """The method that the `model` section of a config describes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
    try:
        parsed = parser.parse_object({"model": config})
    except ArgumentError as error:
        raise ValueError(explain(error, [])) from error
    method: LightningModule = parser.instantiate(parsed).model
    return method
