"""What the seven methods have in common."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from ssl_distill.callbacks.logged_step import is_logged_step
from ssl_distill.draws import Draws, run_seed
from ssl_distill.optim.parameters import clip_each_tensor, decay_groups
from ssl_distill.optim.schedules import Position
from ssl_distill.sharded_strategy import ShardedStrategy
from ssl_distill.sharding import shard

Views = TypeVar("Views")


class Distiller(LightningModule, ABC, Generic[Views]):
    """Students that learn from teachers. Subclasses are final.

    Args:
        augment: Raw batch, already on the device, and random draws to what the method eats. Its `mean` and `std`
            normalise evaluation images too.
        optimizer: Parameter groups to optimiser; schedules set its rate and decay.
        clip_norm: Every gradient tensor is clipped to this L2 norm of its own; 0 for no clipping.
    """

    def __init__(self, augment: Callable[[Any, Draws], Views], optimizer: OptimizerCallable, clip_norm: float) -> None:
        super().__init__()
        if clip_norm < 0:
            raise ValueError(f"`clip_norm` must be at least 0 (0: no clipping), got {clip_norm}.")
        self.augment = augment
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.health: dict[str, Tensor] = {}
        self.batch_arrived_at = 0.0

    @abstractmethod
    def losses(self, views: Views) -> dict[str, Tensor]:
        """Weighted scalar terms by name. Their sum is minimised, each is logged."""

    @abstractmethod
    def encoders(self) -> dict[str, nn.Module]:
        """Networks to evaluate and export, by name; the first is the headline."""

    @property
    def position(self) -> Position:
        """Where training stands: what every schedule is a function of."""
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError("`trainer.max_epochs` or `trainer.max_steps` must be set: schedules need a run's length.")
        steps_per_epoch = -(-self.trainer.num_training_batches // self.trainer.accumulate_grad_batches)
        return Position(self.trainer.global_step, int(total_steps), int(steps_per_epoch))

    @property
    def monitoring(self) -> bool:
        """Whether the step under way is a logged one, so that computing `health` is worth its time."""
        return is_logged_step(self.trainer, self.trainer.global_step + 1)

    def monitor(self) -> dict[str, Tensor]:
        """Signs of a healthy or collapsing run at the last logged step; the `Health` callback judges them."""
        return self.health

    @torch.no_grad()
    def prepare(self, image: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Evaluation images as the encoders eat them: in [0, 1], then normalised as in training."""
        dtype = next(self.parameters()).dtype
        mean, std = (image.new_tensor(values, dtype=dtype).view(3, 1, 1) for values in self.normalization)
        return (image.to(dtype) / 255 - mean) / std

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that inputs are normalised with."""
        return self.augment.mean, self.augment.std  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Divide students and teachers over the ranks, if the strategy asks for it.

        Raises:
            ValueError: If the strategy divides parameters in a way that teachers cannot follow.
        """
        strategy = self._trainer.strategy if self._trainer else None
        if isinstance(strategy, ShardedStrategy):
            shard(self, strategy.device_mesh["data_parallel"], strategy.min_parameters)
        elif isinstance(strategy, (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"`trainer.strategy` must be ddp or ssl_distill.sharded_strategy.ShardedStrategy (FSDP2), by which"
                f" teachers are sharded like their students, got {type(strategy).__name__}."
            )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches on the device, in the trainer's precision."""
        self.batch_arrived_at = time.perf_counter()  # what passed since the last step was waiting for data
        if not self.trainer.training:
            return batch
        views = self.augment(batch, Draws(run_seed(), self.trainer.current_epoch))
        return self.trainer.precision_plugin.convert_input(views)

    def on_train_start(self) -> None:
        """Let gradients be unscaled before they are clipped; a fused optimiser would do it after, in its step."""
        for optimizer in self.trainer.optimizers:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # what Lightning and torch ask

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed drop path and its like by position, so that a resumed run draws what it would have drawn."""
        torch.manual_seed(Draws(run_seed(), self.trainer.current_epoch).batch_seed(batch_idx, self.global_rank))

    def training_step(self, views: Views, batch_idx: int) -> Tensor:
        """Sum of the method's terms."""
        losses = self.losses(views)
        total = torch.stack(list(losses.values())).sum()
        if self.monitoring:
            self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()})
        self.log("train/loss", total.detach(), prog_bar=True)
        return total

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Empty on purpose: evaluators are callbacks, and without it Lightning skips the loop."""

    def on_validation_start(self) -> None:
        """Evaluators reach into encoders: what is sharded but in no block stays whole while they do."""
        if isinstance(self, FSDPModule):
            self.set_reshard_after_forward(False, recurse=False)

    def on_validation_epoch_end(self) -> None:
        """Divide it again, before a checkpoint is written."""
        if isinstance(self, FSDPModule):
            self.set_reshard_after_forward(True, recurse=False)
            self.reshard()

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip each tensor of its own, then whatever `trainer.gradient_clip_val` asks for."""
        if self.clip_norm > 0:
            clip_each_tensor(self.parameters(), self.clip_norm)
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def configure_optimizers(self) -> Optimizer:
        """One optimiser over the trainable parameters; teachers need no special case."""
        return self.optimizer(decay_groups(self))
