"""Evaluators in the validation loop of any method."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.evaluate.evaluator import Evaluator
from ssl_distill.evaluate.features import FeatureBank, Features
from ssl_distill.evaluate.knn import KNN
from ssl_distill.evaluate.linear_probe import LinearProbe
from ssl_distill.evaluate.low_shot import LowShot
from ssl_distill.evaluate.quality import Quality
from ssl_distill.evaluate.reading import ImageReading, Reading
from ssl_distill.evaluate.report import Scores, score_table, show


class Evaluation(Callback):
    """Judges every encoder of a method on frozen features, before the first step and at every validation.

    The first validation loader is the bank, the second the queries; both yield `LabelledBatch`, or what `reading`
    takes. Features are extracted once per encoder, on all ranks. Logged are `val/<encoder>/<score>` and the headline
    `val/score`: the first score of the first evaluator, of the best encoder if it needs labels (k-NN top-1), else of
    the first encoder (RankMe).

    A sanity check over the whole loaders (`num_sanity_val_steps=-1`) is the baseline; it is logged as step 0. All
    scores, each with its protocol, are in `evaluation.json` in the trainer's `default_root_dir` and in checkpoints. A
    run that is gone on with keeps the baseline and the scores that it has, and makes no sanity check.

    Args:
        evaluators: What to judge with, the headline first. None is `KNN`, `LinearProbe`, `LowShot` and `Quality`,
            without those that need labels where there are none.
        reading: What of a batch is judged; None is `ImageReading`, whole images. `ObjectReading` judges objects.
    """

    def __init__(self, evaluators: Sequence[Evaluator] | None = None, reading: Reading | None = None) -> None:
        if evaluators is not None and not evaluators:
            raise ValueError("`evaluators` must not be empty; leave it out for the default ones.")
        self.asked_for = evaluators is not None
        self.evaluators = list(evaluators or (KNN(), LinearProbe(), LowShot(), Quality()))
        self.reading = reading or ImageReading()
        self.history: list[dict[str, Any]] = []
        self._features: dict[str, dict[str, tuple[FeatureBank, FeatureBank]]] = {}  # encoder, then name of the reading
        self._view = ""

    @property
    def baseline(self) -> Scores:
        """Scores before the first step; empty if there was no full sanity check."""
        return next((entry["scores"] for entry in self.history if entry["stage"] == "baseline"), {})

    def state_dict(self) -> dict[str, Any]:
        """The scores so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the scores of a checkpoint."""
        self.history = state_dict["history"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the sanity check of a run that is gone on with: what it judged would be no baseline.

        Deviation: Lightning checks again where a checkpoint is of the end of an epoch.
        """
        if trainer.ckpt_path:
            trainer.num_sanity_val_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what `validate` has added to the file of the run that is gone on with."""
        if trainer.ckpt_path:
            self.history += [
                each for each in _read_history(trainer) if each["stage"] == "validate" and each not in self.history
            ]

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start collecting.

        Raises:
            ValueError: If there are not two validation loaders.
        """
        num_loaders = len(trainer.num_val_batches)
        if num_loaders != 2:
            raise ValueError(f"`val_dataloader` must return two loaders, bank and queries, got {num_loaders}.")
        device = pl_module.device
        self._features = {
            encoder: {name: (FeatureBank(device), FeatureBank(device)) for name in self.reading.names}
            for encoder in pl_module.encoders()
        }

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Extract the features of a batch."""
        images = pl_module.prepare(batch.image)
        self._view = " x ".join(str(size) for size in batch.image.shape[2:])
        for name, encoder in pl_module.encoders().items():
            read = self.reading(encoder, images, batch)
            for banks, features in zip(self._features[name].values(), read, strict=True):
                banks[dataloader_idx].update(*features)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge, log, print."""
        if trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches:
            return
        scores, protocol, headline = self._judge()
        metrics = {f"val/{encoder}/{name}": value for encoder, row in scores.items() for name, value in row.items()}
        metrics["val/score"] = headline
        judged = {"protocol": protocol, "scores": scores}
        if trainer.sanity_checking:
            self.history = [{"stage": "baseline", "epoch": 0, "step": 0, **judged}]
            for logger in trainer.loggers:  # Lightning drops what is logged during a sanity check
                logger.log_metrics(metrics, step=0)
            pl_module.print(self._table("Before the first step"))
        else:
            # Every rank has the same values; synchronising keeps them equal to the last bit, and Lightning quiet.
            pl_module.log_dict(metrics, sync_dist=True)
        if trainer.state.fn == TrainerFn.VALIDATING:
            checkpoint = str(trainer.ckpt_path) if trainer.ckpt_path else None
            self.history = [
                *(_read_history(trainer) or self.history),
                {"stage": "validate", "of": checkpoint, **judged},
            ]
            pl_module.print(self._table(f"Evaluation of {checkpoint or 'the model as it is'}"))
        elif not trainer.sanity_checking:
            epoch = trainer.fit_loop.epoch_progress.current.ready  # epochs begun; `current_epoch` moves on at the end
            self.history.append({"stage": "fit", "epoch": epoch, "step": trainer.global_step, **judged})
            pl_module.print(f"epoch {epoch}: {self._short(scores)}")
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set where mypy is blind
            with replacing(_history_file(trainer)) as temporary:
                temporary.write_text(json.dumps(self.history, indent=1))

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Judge once more if training stopped between two validations, as `max_steps` may make it."""
        if self.history and self.history[-1].get("step") != trainer.global_step and trainer.enable_validation:
            loop = trainer.fit_loop.epoch_loop
            loop._batches_that_stepped -= (
                1  # logged, as any evaluation, with the step before it: a resumed run keeps it
            )
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
            loop._batches_that_stepped += 1

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last scores in full."""
        if self.history and self.history[-1]["stage"] == "fit":
            trainer.print(self._table("After epoch {epoch}, step {step}".format(**self.history[-1])))

    def _judge(self) -> tuple[Scores, dict[str, Any], float]:
        """Scores of every encoder, how they came about, and the headline."""
        scores: Scores = {}
        for encoder, readings in self._features.items():
            scores[encoder] = {}
            for name, banks in readings.items():
                bank, query = (each.compute() for each in banks)
                evaluators = self._fitting(bank, query)
                for evaluator in evaluators:
                    evaluator.reset()
                    evaluator.update(bank, query)
                    ending = f"_{name}" if name else ""
                    scores[encoder] |= {f"{key}{ending}": float(value) for key, value in evaluator.compute().items()}
        self._features = {}
        protocol = {"bank": len(bank.index), "queries": len(query.index), "view": self._view}
        protocol |= {type(evaluator).__name__: evaluator.protocol for evaluator in evaluators}
        first = [next(iter(row.values())) for row in scores.values()]
        return scores, protocol, max(first) if evaluators[0].needs_labels else first[0]

    def _fitting(self, bank: Features, query: Features) -> list[Evaluator]:
        """The evaluators that the data allow, unless the user asked for others: those say themselves what they lack."""
        has_labels = bool((bank.labels >= 0).any()) and bool((query.labels >= 0).any())
        return [each for each in self.evaluators if self.asked_for or has_labels or not each.needs_labels]

    def _table(self, title: str) -> str:
        entry = self.history[-1]
        baseline = {} if entry["stage"] == "baseline" else self.baseline
        return "\n" + score_table(title, entry["scores"], baseline, entry["protocol"])

    def _short(self, scores: Scores) -> str:
        """The first score of every encoder, with its baseline."""
        parts = []
        for encoder, row in scores.items():
            name, value = next(iter(row.items()))
            before = self.baseline.get(encoder, {}).get(name)
            parts.append(f"{encoder} {name} {show(name, value)} (baseline {show(name, before)})")
        return ", ".join(parts)


def _history_file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "evaluation.json"


def _read_history(trainer: Trainer) -> list[dict[str, Any]]:
    """What the run folder knows already; a validation adds to it."""
    path = _history_file(trainer)
    return json.loads(path.read_text()) if path.exists() else []
