"""`ssl-distill fit | validate | test | predict`: method, data and trainer from one config."""

import argparse
import importlib
import os
import pkgutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ssl_distill import callbacks, data, evaluate, methods
from ssl_distill.callbacks.atomic import replacing
from ssl_distill.callbacks.atomic_checkpoint import AtomicCheckpointIO
from ssl_distill.callbacks.feature_maps import FeatureMaps
from ssl_distill.callbacks.health import Health, TrainingFailure
from ssl_distill.callbacks.metrics_file import MetricsFile
from ssl_distill.callbacks.neighbours import Neighbours
from ssl_distill.callbacks.preemption import Preemption
from ssl_distill.callbacks.run_folder import RunFolder
from ssl_distill.callbacks.throughput import Throughput
from ssl_distill.callbacks.wandb_report import WandbReport
from ssl_distill.commands.checkpoints import check_fits, read_checkpoint
from ssl_distill.commands.environment import record_end, record_start
from ssl_distill.commands.explain import explain
from ssl_distill.commands.folders import find_checkpoint, run_folder
from ssl_distill.commands.quiet import without_advice
from ssl_distill.commands.trust import take_trust
from ssl_distill.commands.wandb_runs import open_runs, without_missing_wandb
from ssl_distill.evaluate.evaluation import Evaluation
from ssl_distill.methods.base import Distiller

_CHECKPOINTS: dict[str, dict[str, Any]] = {
    "last_checkpoint": {"filename": "last", "every_n_train_steps": 200, "enable_version_counter": False},
    "best_checkpoint": {
        "filename": "best",
        "monitor": "val/score",
        "mode": "max",
        "save_on_train_epoch_end": False,  # `val/score` comes with a validation
        "enable_version_counter": False,
    },
}
_CALLBACKS: dict[str, type[Callback]] = {
    "evaluation": Evaluation,
    "health": Health,
    "throughput": Throughput,
    "feature_maps": FeatureMaps,
    "neighbours": Neighbours,
    "run_folder": RunFolder,
    "wandb_report": WandbReport,
    **dict.fromkeys(_CHECKPOINTS, ModelCheckpoint),
    "preemption": Preemption,
}
_RERUNNABLE = ("seed_everything", "trainer", "model", "data", *_CALLBACKS)


class CommandLine(LightningCLI):
    """LightningCLI in subclass mode with this package's callbacks, run folder and errors.

    Args:
        args: The command and its options.
        stack: Holds the run folder until the run is over.
        run: False only builds model, data and trainer; then `args` has no command.
    """

    def __init__(self, args: list[str], stack: ExitStack, run: bool = True) -> None:
        self._args = args
        self._stack = stack
        for package in (methods, data, evaluate, callbacks):  # classes that are imported have short names
            for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
        options = {"allow_abbrev": False, "exit_on_error": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            trainer_defaults={"num_sanity_val_steps": -1},  # the whole evaluation once before the first step
            seed_everything_default=0,
            parser_kwargs={"prog": "ssl-distill", **options, **{name: dict(options) for name in self.subcommands()}},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, each under its own key."""
        for key, callback in _CALLBACKS.items():
            parser.add_class_arguments(callback, key, fail_untyped=False)
        for key, defaults in _CHECKPOINTS.items():
            parser.set_defaults({f"{key}.{name}": value for name, value in defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what is wrong comes out in one line."""
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            parsers = getattr(self, "_subcommand_parsers", {})
            parser = parsers.get(args[0], parser)
            raise ValueError(explain(error, [action.dest for action in parser._actions])) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would read the checkpoint's hyper-parameters into the config."""

    @property
    def section(self) -> Any:
        """The parsed config of the command that runs."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and the checkpoint.

        Raises:
            ValueError: If a count of the trainer is below 1, or there is no such checkpoint.
        """
        section = self.section
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            count = section.trainer[name]
            if count is not None and count < 1:
                raise ValueError(f"`trainer.{name}` must be at least 1, got {count}.")
        root = Path(section.trainer.default_root_dir or f"runs/{section.model.class_path.rpartition('.')[2].lower()}")
        self._checkpoint: dict[str, Any] | None = None
        if name := section.get("ckpt_path"):
            section.ckpt_path = str(find_checkpoint(name, root))
            self._checkpoint = read_checkpoint(section.ckpt_path)
        if self._writes_run_folder:
            folder = self._stack.enter_context(run_folder(root, Path(section.ckpt_path) if section.ckpt_path else None))
            if folder != root:
                rank_zero_info(f"{root} holds another run: this one goes to {folder}")
            root = folder
        section.trainer.default_root_dir = str(root)
        self._saved_config = self._rerunnable_config()
        loggers = without_missing_wandb(_as_list(section.trainer.logger))
        if len(loggers) < len(_as_list(section.trainer.logger)):
            section.trainer.logger = loggers or None
        for logger in loggers:
            if isinstance(logger, Namespace) and logger.get("init_args.save_dir") == ".":  # WandbLogger's default
                logger.init_args.save_dir = str(root)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with our callbacks, whole checkpoints and a `metrics.csv` beside whatever other logger."""
        init = self.config_init[self.subcommand] if self.subcommand else self.config_init
        given = init["trainer"]
        ours = {key: init[key] for key in _CALLBACKS}
        if not isinstance(self.model, Distiller):
            del ours["evaluation"], ours["feature_maps"], ours["neighbours"]  # which look at encoders
            if ours["best_checkpoint"].monitor == "val/score":  # which `Evaluation` logs
                del ours["best_checkpoint"]
        for key in _CHECKPOINTS.keys() & ours.keys():
            if given["enable_checkpointing"] is False:
                del ours[key]
            elif ours[key].dirpath is None:
                ours[key].dirpath = os.path.realpath(given["default_root_dir"])
        if given["enable_checkpointing"] is False:
            del ours["preemption"]  # which ends with a checkpoint
        loggers = _as_list(given["logger"])
        if self.subcommand and not given["fast_dev_run"]:
            loggers = open_runs(loggers)
        if self._writes_run_folder and given["logger"] is not False:
            from_step = self._checkpoint["global_step"] if self._checkpoint else 0
            loggers.append(MetricsFile(given["default_root_dir"], from_step))
        plugins = _as_list(given["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        callbacks = [*_as_list(given["callbacks"]), *ours.values()]
        try:
            return super().instantiate_trainer(callbacks=callbacks, logger=loggers, plugins=plugins, **kwargs)
        except (TypeError, ImportError, MisconfigurationException) as error:  # what Lightning refuses devices with
            raise ValueError(
                f"there is no trainer with `trainer.accelerator` {given['accelerator']} and `trainer.devices`"
                f" {given['devices']} here: {str(error).splitlines()[0]}"
            ) from error

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint that does not fit, and leave in the run folder what was run and where."""
        if self._checkpoint is not None:
            check_fits(self._checkpoint, self.section.ckpt_path, self.model, self._saved_config["model"])
            self._checkpoint = None
        elif self.subcommand in ("validate", "test", "predict"):
            rank_zero_info("no --ckpt_path was given: this is the network before training")
        if self._writes_run_folder and self.trainer.is_global_zero:
            folder = Path(self.section.trainer.default_root_dir)
            with replacing(folder / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(self._saved_config, sort_keys=False), encoding="utf-8")
            record_start(folder, self._args, self.trainer.world_size, resumed=bool(self.section.get("ckpt_path")))

    def after_fit(self) -> None:
        """Note when the run came to its end."""
        if self._writes_run_folder and self.trainer.is_global_zero:
            record_end(Path(self.section.trainer.default_root_dir))

    def validate(self, verbose: bool, **kwargs: Any) -> None:
        """Run the validation loop; Lightning's table of results would repeat that of `Evaluation`."""
        self.trainer.validate(verbose=verbose and not isinstance(self.model, Distiller), **kwargs)

    @property
    def _writes_run_folder(self) -> bool:
        return self.subcommand == "fit" and not self.section.trainer.fast_dev_run

    def _rerunnable_config(self) -> dict[str, Any]:
        """The resolved config without what belongs to one command: `fit` and `validate` both take it."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config = config[self.subcommand] if self.subcommand else config
        return {key: value for key, value in config.items() if key in _RERUNNABLE}


def train(command: str, args: list[str]) -> None:
    """Run a trainer's command.

    Raises:
        ValueError: If the arguments, the config or the data are wrong.
    """
    if command != "fit":  # which is for one's own configs; the others look at runs from anywhere
        args = take_trust(args)
    with without_advice(), ExitStack() as stack:
        try:
            CommandLine([command, *args], stack)
        except (MisconfigurationException, TrainingFailure) as error:
            raise ValueError(str(error)) from error


def _as_list(value: Any) -> list[Any]:
    """The entries of an option that takes one or several."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
