"""Where a restored run goes on."""

import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop

from ssl_distill.data.sampler import EpochSampler

# Why not torchdata's `StatefulDataLoader`: it restores where the loader was, but the counters that `resume_position`
# mends are Lightning's. Measured with torchdata 0.11, Lightning 2.6.6 and a sampler that saves its position, 0 and
# 2 workers: bit-equal in mid-epoch, but not between optimiser steps (the gradients so far are lost), after the last
# batch before its validation (training ends after 16 of 24 steps), at the end of an epoch with `max_steps` (images are
# left out or repeated), nor just before a validation in mid-epoch (it is left out).


def resumed(sampler: EpochSampler, trainer: Trainer | None) -> EpochSampler:
    """The sampler, of a restored run at what was not trained on yet; to be called in `train_dataloader()`."""
    if trainer is not None:
        sampler.resume_at(*resume_position(trainer, sampler.num_batches))
    return sampler


def resume_position(trainer: Trainer, num_batches: int) -> tuple[int, int]:
    """Epoch and batches of it that are done, with Lightning's restored counters made to agree.

    To be called in `train_dataloader()`: the counters are restored by then, and not yet looked at.

    Deviation: Lightning 2.6 goes on wrongly from three kinds of checkpoint. Saved after the last batch of an epoch and
    before its end: the validation of that epoch is lost, and a checkpoint of the resumed run repeats an epoch. Saved at
    the end of an epoch of a run with `max_steps`: a batch too many, or an epoch too few. Saved between optimiser steps:
    the gradients so far are lost; we train these batches again. The counters set here are those of a checkpoint that
    Lightning continues exactly.

    Args:
        trainer: In `fit`, at any stage.
        num_batches: Batches per epoch of the loader.

    Raises:
        RuntimeError: If a checkpoint is given and its counters are not restored yet.
    """
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs: Any = fit_loop.epoch_progress
    batches: Any = epoch_loop.batch_progress
    validation: Any = epoch_loop.val_loop.batch_progress
    epoch = epochs.current.processed
    if not fit_loop._loaded_from_state_dict:
        if trainer._checkpoint_connector._loaded_checkpoint:
            raise RuntimeError(
                "the training data were asked for before the checkpoint's counters were restored;"
                " use `trainer.estimated_stepping_batches` from `on_train_start` on."
            )
        return epoch, 0

    if epochs.current.ready == epoch:  # between two epochs
        _set_count(epochs, epoch)
        _Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]  # its own setter says True with `max_steps`
        epoch_loop._batches_that_stepped = trainer.global_step
        return epoch, 0

    limit = trainer.limit_train_batches
    num_used = min(limit, num_batches) if isinstance(limit, int) else int(num_batches * limit)
    done = batches.current.processed
    if done < num_used:
        done -= done % trainer.accumulate_grad_batches
    saved_before_validation = (
        batches.current.completed < batches.current.processed or validation.total.completed < validation.total.ready
    )
    _set_count(batches, done)
    validates = _validates_here(trainer, num_used)
    if validates and saved_before_validation and done > 0:
        validation.reset()
        validation.total.ready = validation.total.started = 1  # Lightning's sign of a validation to be gone back to
    epoch_loop._batches_that_stepped = trainer.global_step - validates  # Lightning adds 1 after a validation
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    return epoch, done if done < num_used else num_batches


def _set_count(progress: Any, count: int) -> None:
    """Exactly `count` events of the current epoch or run have been, and none is under way."""
    total = progress.total.processed - progress.current.processed + count
    for tracker, value in ((progress.total, total), (progress.current, count)):
        tracker.ready = tracker.started = tracker.processed = tracker.completed = value


def _validates_here(trainer: Trainer, num_used: int) -> bool:
    """Whether a validation follows the last batch done. Lightning's own rule needs the loader, not made yet."""
    epoch_loop, interval = trainer.fit_loop.epoch_loop, trainer.val_check_interval
    if not epoch_loop._should_check_val_epoch() or getattr(trainer, "_val_check_time_interval", None):
        return False
    progress = epoch_loop.batch_progress
    done = (progress.total if trainer.check_val_every_n_epoch is None else progress.current).completed
    return done % (interval if isinstance(interval, int) else max(1, int(num_used * interval))) == 0
