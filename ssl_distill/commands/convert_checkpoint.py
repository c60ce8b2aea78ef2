"""Official checkpoints with heads, centers and moments as ones that `ssl-distill fit` goes on from."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from ssl_distill.backbones.official import load_exactly
from ssl_distill.commands.quiet import without_advice
from ssl_distill.commands.train import CommandLine

_CENTERS = {  # entry of the file, its center: our name
    "dino": {("dino_loss", "center"): "targets.value"},
    "ibot": {("ibot_loss", "center"): "class_center.value", ("ibot_loss", "center2"): "patch_center.value"},
}
_RENAMED = {  # how newer versions of torch name what they save
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}


def convert_checkpoint(content: Mapping[str, Any], layout: str, configs: Sequence[Path], output: Path) -> None:
    """Put the file's weights, centers, moments and epoch into a checkpoint of the run that the configs describe.

    Args:
        content: What `read_official` gave.
        layout: Whose it is.
        configs: As for `ssl-distill fit`; the last one overrides the others.
        output: Where to.

    Raises:
        ValueError: If the layout has none of ours, the file holds no heads, or the config makes other networks.
    """
    if layout not in _CENTERS:
        raise ValueError(
            f"`--output` must end in .safetensors for {layout}: checkpoints are made of {' and '.join(_CENTERS)}."
        )
    missing = [name for name in ("student", "teacher") if not isinstance(content.get(name), Mapping)]
    if missing:
        raise ValueError(
            f"`file` must hold a whole run to go on from, this one has no entry {missing[0]}; as a backbone alone it"
            " goes into an --output that ends in .safetensors."
        )
    arguments = [part for config in configs for part in ("-c", str(config))]
    with without_advice(), ExitStack() as stack:
        line = CommandLine(arguments, stack, run=False)
        theirs = type(line.model).__name__
        if theirs.lower() != layout:
            raise ValueError(f"`--config` must be of {layout.upper()}, as the file is, got one of {theirs}.")
        load_exactly(line.model, _our_state(content, layout, line.model))
        trainer: Any = line.trainer
        trainer.callbacks.append(_WriteAndStop(content, output))
        with suppress(_Written):
            trainer.fit(line.model, line.datamodule)
    print(f"{output}: epoch {int(content.get('epoch', 0))}; ssl-distill fit {' '.join(arguments)} --ckpt_path {output}")


class _Written(Exception):
    """The checkpoint is there: the way out of a fit that is over before its first step."""


class _WriteAndStop(Callback):
    """Saves the run as it would be after the file's epochs, before anything is trained or evaluated."""

    def __init__(self, content: Mapping[str, Any], output: Path) -> None:
        self.content = content
        self.output = output

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimiser is there by now."""
        trainer.fit_loop.setup_data()
        epochs = int(self.content.get("epoch", 0))
        steps = epochs * pl_module.position.steps_per_epoch  # type: ignore[operator, union-attr]
        fit_loop: Any = trainer.fit_loop
        for progress in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
            progress.ready = progress.started = progress.processed = progress.completed = epochs
        optimizer_steps = fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        optimizer_steps.ready = optimizer_steps.completed = steps
        fit_loop.epoch_loop._batches_that_stepped = steps
        if not _take_moments(trainer.optimizers[0], self.content.get("optimizer")):
            rank_zero_info("the file's optimiser does not fit this one: moments start anew")
        trainer.save_checkpoint(self.output)
        raise _Written


def _our_state(content: Mapping[str, Any], layout: str, method: nn.Module) -> dict[str, Tensor]:
    """The file's weights and centers by our names."""
    ours = method.state_dict()
    state = {}
    for branch in ("student", "teacher"):
        for name, value in content[branch].items():
            name = name.removeprefix("module.")
            for old, new in _RENAMED.items():
                name = name.replace(old, new)
            state[f"{branch}.{name}"] = value
    for branch in ("student", "teacher"):
        token = state.pop(f"{branch}.backbone.masked_embed", None)
        if token is not None and branch == "student":
            state["mask_token"] = token
        for name in [name for name in state if name.startswith(f"{branch}.head.last_layer2.")]:
            if name not in ours:  # a head that is shared is there twice
                del state[name]
    for (entry, name), our_name in _CENTERS[layout].items():
        if name in content.get(entry, {}):
            state[our_name] = content[entry][name].reshape(1, -1)
    return state


def _take_moments(optimizer: torch.optim.Optimizer, theirs: Any) -> bool:
    """Load the file's moments, if it has the same parameters in the same order."""
    if not isinstance(theirs, Mapping):
        return False
    ours = optimizer.state_dict()
    sizes = [[len(group["params"]) for group in each["param_groups"]] for each in (ours, theirs)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if sizes[0] != sizes[1] or any(
        theirs["state"][number].get("exp_avg", parameters[number]).shape != parameters[number].shape
        for number in theirs["state"]
    ):
        return False
    optimizer.load_state_dict({"state": theirs["state"], "param_groups": ours["param_groups"]})
    return True
