import json

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

from ssl_distill.data.batch import LabelledBatch
from ssl_distill.evaluate.evaluation import Evaluation
from ssl_distill.evaluate.evaluator import Evaluator
from ssl_distill.evaluate.knn import KNN
from ssl_distill.evaluate.low_shot import LowShot
from ssl_distill.evaluate.quality import Quality


def loader(num, seed, labelled=True, batch_size=8):
    """Images whose colour tells three classes apart, with noise."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(num) % 3
    noise = torch.randint(60, (num, 3, 4, 4), generator=generator)
    image = (torch.eye(3)[label][:, :, None, None] * 90 + noise).to(torch.uint8)
    labels = label if labelled else torch.full_like(label, -1)
    rows = [LabelledBatch(*row) for row in zip(image, labels, torch.arange(num), strict=True)]
    return DataLoader(rows, batch_size=batch_size)


class Toy(LightningModule):
    """Two encoders; training moves the student only. In training mode it would destroy its features."""

    def __init__(self, rate=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.rate = rate
        self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Dropout(0.999))
        self.student = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Dropout(0.999))
        self.teacher.requires_grad_(False)

    def encoders(self):
        return {"teacher": self.teacher, "student": self.student}

    def prepare(self, image):
        return image.to(self.dtype) / 255

    def training_step(self, batch, batch_idx):
        return self.student(self.prepare(batch.image)).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.rate)


class MemoryLogger(Logger):
    def __init__(self):
        super().__init__()
        self.rows = []

    name = version = None

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


EVALUATORS = [KNN(k=(3, 1)), Quality(num_clusters=4)]


def trainer_in(folder, evaluation, epochs=2, sanity=-1, callbacks=(), **arguments):
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        num_sanity_val_steps=sanity,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[evaluation, *callbacks],
        **{"logger": False, "enable_checkpointing": bool(callbacks), "log_every_n_steps": 1} | arguments,
    )


def history(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_fit_starts_from_a_baseline_and_validate_gives_the_same_numbers(tmp_path, capsys):
    logger, evaluation = MemoryLogger(), Evaluation(EVALUATORS)
    best = ModelCheckpoint(tmp_path, "best", monitor="val/score", mode="max")
    trainer = trainer_in(tmp_path, evaluation, callbacks=[best], logger=logger)
    trainer.fit(Toy(), loader(24, 0), [loader(30, 1), loader(12, 2)])

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    baseline, first, second = history(tmp_path)
    assert [entry["stage"] for entry in (baseline, first, second)] == ["baseline", "fit", "fit"]
    assert [(entry["epoch"], entry["step"]) for entry in (baseline, first, second)] == [(0, 0), (1, 3), (2, 6)]
    assert baseline["scores"]["teacher"] == second["scores"]["teacher"]  # it was not trained
    assert baseline["scores"]["student"] != second["scores"]["student"]
    assert second["scores"]["teacher"]["knn_top1"] > 0.8  # features in eval mode
    expected_protocol = {"bank": 30, "queries": 12, "view": "4 x 4"}
    expected_protocol |= {"KNN": EVALUATORS[0].protocol, "Quality": EVALUATORS[1].protocol}
    assert second["protocol"] == expected_protocol

    rows = [(step, row) for step, row in logger.rows if "val/score" in row]
    assert [step for step, _ in rows] == [0, 2, 5]
    for (_, row), entry in zip(rows, (baseline, first, second), strict=True):
        for encoder, scores in entry["scores"].items():
            assert {name: row[f"val/{encoder}/{name}"] for name in scores} == pytest.approx(scores)
        assert row["val/score"] == pytest.approx(max(each["knn_top1"] for each in entry["scores"].values()))
    assert best.best_model_score == max(row["val/score"] for _, row in rows[1:])

    printed = capsys.readouterr().out
    assert printed.index("Before the first step") < printed.index("epoch 1: teacher knn_top1")
    assert printed.index("epoch 2: teacher") < printed.index("After epoch 2, step 6")
    assert printed.count("bank 30, queries 12, view 4 x 4") == 2  # two whole tables, each with its protocol

    trainer = trainer_in(tmp_path, again := Evaluation(EVALUATORS), callbacks=[best])
    loaders = [loader(30, 1), loader(12, 2)]
    trainer.validate(Toy(), loaders, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert history(tmp_path)[:3] == [baseline, first, second]
    validated = history(tmp_path)[3]
    assert validated["stage"] == "validate"
    assert validated["of"] == str(tmp_path / "last.ckpt")
    assert validated["scores"] == second["scores"]
    assert again.baseline == baseline["scores"]
    assert f"Evaluation of {tmp_path / 'last.ckpt'}" in capsys.readouterr().out
    assert trainer.callback_metrics["val/score"] == pytest.approx(rows[-1][1]["val/score"])


def test_baseline_survives_a_resume(tmp_path):
    saved = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=False)
    fit_data = loader(24, 0), [loader(30, 1), loader(12, 2)]
    trainer_in(tmp_path, Evaluation(EVALUATORS), epochs=1, callbacks=[saved]).fit(Toy(), *fit_data)
    baseline, first = history(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    resumed = trainer_in(tmp_path, evaluation := Evaluation(EVALUATORS), callbacks=[saved])
    resumed.fit(Toy(), *fit_data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert history(tmp_path)[:2] == [baseline, first]
    assert [entry["epoch"] for entry in history(tmp_path)] == [0, 1, 2]
    assert evaluation.baseline == baseline["scores"]


def test_the_end_is_judged_between_validations(tmp_path):
    data = loader(24, 0), [loader(30, 1), loader(12, 2)]
    trainer_in(tmp_path, Evaluation(EVALUATORS), epochs=3, check_val_every_n_epoch=2).fit(Toy(), *data)
    assert [(entry["epoch"], entry["step"]) for entry in history(tmp_path)] == [(0, 0), (2, 6), (3, 9)]
    trainer_in(tmp_path, Evaluation(EVALUATORS), max_steps=4).fit(Toy(), *data)
    assert [(entry["epoch"], entry["step"]) for entry in history(tmp_path)] == [(0, 0), (1, 3), (2, 4)]


def test_partial_sanity_check_is_no_baseline(tmp_path, capsys):
    trainer_in(tmp_path, evaluation := Evaluation(EVALUATORS), epochs=1, sanity=1).fit(
        Toy(), loader(24, 0), [loader(30, 1), loader(12, 2)]
    )
    assert evaluation.baseline == {}
    assert [entry["stage"] for entry in history(tmp_path)] == ["fit"]
    assert "(baseline -)" in capsys.readouterr().out


def test_unlabelled_data_get_what_needs_no_labels(tmp_path):
    loaders = [loader(30, 1, labelled=False), loader(12, 2, labelled=False)]
    trainer = trainer_in(tmp_path, Evaluation())
    trainer.validate(Toy(), loaders, verbose=False)
    (entry,) = history(tmp_path)
    assert set(entry["scores"]["teacher"]) == {
        "rankme", "alpha_req", "stable_rank", "uniformity", "clid_dimension", "clid_learnability"
    }  # fmt: skip
    assert trainer.callback_metrics["val/score"] == pytest.approx(entry["scores"]["teacher"]["rankme"])


@pytest.mark.filterwarnings("ignore:`k` 200 is clamped")
def test_default_evaluators_of_labelled_data(tmp_path):
    trainer_in(tmp_path, Evaluation()).validate(Toy(), [loader(60, 1), loader(12, 2)], verbose=False)
    (entry,) = history(tmp_path)
    assert {"knn_top1", "linear_top1", "low_shot_top1", "rankme"} < set(entry["scores"]["student"])
    assert entry["scores"]["student"]["linear_top1"] > 0.8


def test_training_draws_the_same_random_numbers_with_and_without(tmp_path):
    weights = []
    for callback in (Evaluation(EVALUATORS), Callback()):
        trainer_in(tmp_path, callback, epochs=1).fit(toy := Toy(), loader(24, 0), [loader(30, 1), loader(12, 2)])
        weights.append(toy.student[1].weight)
    assert torch.equal(*weights)


class NotANumber(Toy):
    def prepare(self, image):
        return image / 255 * float("nan")


@pytest.mark.parametrize(
    ("method", "evaluators", "loaders", "message"),
    [
        (Toy, [KNN(k=(1,))], [(30, 1, False), (12, 2, False)], "`KNN` needs labels, and those of the bank are all -1"),
        (
            Toy,
            [Quality(), LowShot()],
            [(30, 1, True), (12, 2, False)],
            "`LowShot` needs labels, and those of the queries",
        ),
        (Toy, None, [(30, 1, True)], "`val_dataloader` must return two loaders, bank and queries, got 1"),
        (NotANumber, None, [(30, 1, True), (12, 2, True)], "features of 30 of 30 images are not finite"),
    ],
)
def test_errors(method, evaluators, loaders, message, tmp_path):
    trainer = trainer_in(tmp_path, Evaluation(evaluators))
    with pytest.raises(ValueError, match=message):
        trainer.fit(method(), loader(24, 0), [loader(*arguments) for arguments in loaders])


def test_no_evaluators():
    with pytest.raises(ValueError, match="`evaluators` must not be empty"):
        Evaluation([])


class Largest(Evaluator):
    """A user's own evaluator."""

    needs_labels = False

    @property
    def protocol(self):
        return {"of": "the bank"}

    def scores(self, bank, query):
        return {"largest": float(bank.features.max())}


def test_own_evaluator(tmp_path):
    trainer_in(tmp_path, Evaluation([Largest()])).validate(Toy(), [loader(30, 1), loader(12, 2)], verbose=False)
    assert set(history(tmp_path)[0]["scores"]["teacher"]) == {"largest"}


@pytest.mark.ddp
def test_ranks(tmp_path):
    """Two ranks whose loaders are padded to equal length find what one rank finds."""
    loaders = [loader(31, 1, batch_size=4), loader(13, 2, batch_size=4)]
    for folder, arguments in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_spawn"})):
        trainer = trainer_in(tmp_path / folder, Evaluation([KNN(k=(3, 1)), LowShot(3), Quality()]), **arguments)
        trainer.validate(Toy(), loaders, verbose=False)
    (one,), (two,) = history(tmp_path / "one"), history(tmp_path / "two")
    assert two["protocol"] == one["protocol"]
    for encoder, scores in one["scores"].items():
        assert two["scores"][encoder] == pytest.approx(scores, rel=1e-5)
