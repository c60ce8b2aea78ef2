import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule
from PIL import Image
from safetensors.torch import load_file

from ssl_distill.callbacks.metrics_file import read_metrics
from ssl_distill.cli import main
from ssl_distill.export import read_metadata
from ssl_distill.methods.dino import DINO

MODEL = {
    "class_path": "ssl_distill.methods.dino.DINO",
    "init_args": {
        "backbone": "convnet_nano",
        "num_prototypes": 16,
        "head": {
            "class_path": "ssl_distill.heads.prototype.PrototypeHead",
            "init_args": {"hidden_dim": 16, "bottleneck_dim": 8},
        },
        "augment": {
            "class_path": "ssl_distill.augment.multi_crop.MultiCropAugment",
            "init_args": {"global_size": 32, "local_size": 16, "num_local": 1},
        },
        "learning_rate": {"start": 1e-3, "end": 1e-5, "warmup_epochs": 0},
    },
}
SHAPES = {"num_images": 32, "batch_size": 8, "bank_size": 32, "query_size": 16}
TINY = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "model": MODEL,
    "data": {"class_path": "ssl_distill.data.shapes.ShapesData", "init_args": SHAPES},
    "evaluation": {"evaluators": [{"class_path": "ssl_distill.evaluate.knn.KNN", "init_args": {"k": [5]}}]},
}


class OtherMethod(DINO):
    """The same weights by another name."""


class InterruptAt(Callback):
    """What Ctrl-C in a certain step is."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


class NaNAt(Callback):
    """Breaks the weights in a certain step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(pl_module.student.parameters()).fill_(float("nan"))


class Classifier(LightningModule):
    """A model that is no method: no encoders, no views."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = torch.nn.Linear(3, width)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch.image.float().mean((2, 3))).square().mean()
        self.log("probe/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return "tiny.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run folder of a short run; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    run = folder / "run"
    assert main(["fit", "-c", str(folder / "tiny.yaml"), "--trainer.default_root_dir", str(run)]) == 0
    return run


def weights(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_equal_weights(checkpoint, other):
    ours, theirs = weights(checkpoint), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_help_and_methods_import_nothing_heavy():
    code = (
        "import sys; from ssl_distill.cli import main;"
        "assert main(['--help']) == main(['methods']) == main(['--version']) == 0;"
        "heavy = {'torch', 'lightning', 'timm', 'jsonargparse', 'numpy', 'yaml'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "ssl-distill fit -c configs/quickstart.yaml" in output
    assert "ssl-distill 0." in output
    line = next(line for line in output.splitlines() if line.startswith("DINO "))
    assert "ssl_distill.methods.dino.DINO Self-distillation with no labels" in " ".join(line.split())  # columns vary
    assert line.endswith("arXiv 2104.14294, algorithm 1")


def test_fit_leaves_a_run_folder(finished):
    assert {path.name for path in finished.iterdir()} == {
        "backbone.safetensors", "best.ckpt", "config.yaml", "curves.png", "environment.json", "evaluation.json",
        "last.ckpt", "metrics.csv", "neighbours.png", "pca.png", "views.png",
    }  # fmt: skip
    rows = read_metrics(finished / "metrics.csv")
    assert [row["step"] for row in rows if "val/score" in row] == [0, 3, 7]  # before the first step, and after epochs
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 3, 5, 7]
    assert {"train/images_per_s", "train/data_wait", "schedule/momentum"} <= set().union(*rows)
    for name in ("curves.png", "views.png"):
        with Image.open(finished / name) as picture:
            assert min(picture.size) > 100
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(finished / name, weights_only=True)
        assert checkpoint["ssl_distill"]["method"] == "ssl_distill.methods.dino.DINO"
        assert checkpoint["ssl_distill"]["scores"]["val/score"] >= 0


def test_fit_prints_what_loads_the_backbone(tiny, capsys):
    assert main(["fit", "-c", tiny, "--trainer.max_epochs", "1"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "; backbone = " in line]
    assert len(lines) == 2
    images = torch.rand(2, 3, 32, 32)
    outputs = []
    for line in lines:
        names = {}
        exec(line, names)
        outputs.append(names["backbone"].eval()(images))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
    assert Path("runs/dino/last.ckpt").exists()  # the folder where none is given


def test_validate_gives_the_same_numbers(finished, tmp_path, capsys):
    output = tmp_path / "again"
    args = ["-c", str(finished / "config.yaml"), "--ckpt_path", str(finished / "last.ckpt")]
    assert main(["validate", *args, "--trainer.default_root_dir", str(output)]) == 0
    before, after = (json.loads((folder / "evaluation.json").read_text())[-1] for folder in (finished, output))
    assert (before["stage"], after["stage"]) == ("fit", "validate")
    assert after["scores"] == before["scores"]
    printed = capsys.readouterr().out
    assert printed.count("knn_top1") == 1
    assert "DataLoader 0" not in printed


def test_the_saved_config_runs_again_and_overwrites_nothing(finished, tmp_path):
    Path(tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    args = ["fit", "-c", str(tmp_path / "config.yaml"), "--trainer.default_root_dir"]
    assert main([*args, str(tmp_path / "run")]) == main([*args, str(tmp_path / "run")]) == 0
    assert_equal_weights(tmp_path / "run" / "last.ckpt", finished / "last.ckpt")
    assert_equal_weights(tmp_path / "run-2" / "last.ckpt", finished / "last.ckpt")
    saved = yaml.safe_load((tmp_path / "run-2" / "config.yaml").read_text())
    assert saved["trainer"]["default_root_dir"] == str(tmp_path / "run-2")
    assert "ckpt_path" not in saved


def test_an_interrupted_run_goes_on(tiny, finished):
    handler = signal.getsignal(signal.SIGINT)
    interrupt = json.dumps([{"class_path": "test_cli.InterruptAt", "init_args": {"step": 6}}])
    args = ["fit", "-c", tiny, "--last_checkpoint.every_n_train_steps", "5"]
    try:
        with pytest.raises(SystemExit):
            main([*args, "--trainer.callbacks", interrupt])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    run = Path("runs/dino")
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 5
    assert not (run / "backbone.safetensors").exists()

    assert main([*args, "--ckpt_path", "last"]) == 0
    assert not Path("runs/dino-2").exists()
    assert_equal_weights(run / "last.ckpt", finished / "last.ckpt")
    steps = [row["step"] for row in read_metrics(run / "metrics.csv") if "train/loss" in row]
    assert steps == [1, 3, 5, 7]
    assert [row["step"] for row in read_metrics(run / "metrics.csv") if "val/score" in row] == [0, 3, 7]


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tiny, capsys):
    nan = json.dumps([{"class_path": "test_cli.NaNAt", "init_args": {"step": 6}}])
    assert main(["fit", "-c", tiny, "--last_checkpoint.every_n_train_steps", "5", "--trainer.callbacks", nan]) == 2
    assert "error: the loss is not finite at step 6" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in weights("runs/dino/last.ckpt").values())


def test_export(finished, tmp_path, capsys):
    for options, name in ([], "backbone"), (["--encoder", "student"], "student"):
        output = tmp_path / f"{name}.safetensors"
        assert main(["export", str(finished / "best.ckpt"), "--output", str(output), *options]) == 0
        assert str(output) in capsys.readouterr().out
    ours, at_the_end = (folder / "backbone.safetensors" for folder in (tmp_path, finished))
    assert read_metadata(ours) == read_metadata(at_the_end)
    for name, value in load_file(at_the_end).items():
        assert torch.equal(value, load_file(ours)[name])
    assert read_metadata(tmp_path / "student.safetensors")["encoder"] == "student"


def test_preview(tiny):
    assert main(["preview", "-c", tiny, "-n", "3", "--output", "three.png", "--model.augment.num_local", "2"]) == 0
    with Image.open("three.png") as picture:
        assert picture.size == (5 * 100, 16 + 3 * 100)


def test_short_names_and_chained_configs(tiny):
    Path("trainer.yaml").write_text(yaml.safe_dump({key: TINY[key] for key in ("trainer", "evaluation")}))
    Path("method.yaml").write_text("model: ssl_distill.methods.dino.DINO\ndata: ShapesData\n")
    Path("steps.yaml").write_text("trainer: {max_epochs: 1, num_sanity_val_steps: 0}\n")
    options = {f"--model.{key}": json.dumps(value) if isinstance(value, dict) else str(value)
               for key, value in MODEL["init_args"].items()}  # fmt: skip
    options |= {f"--data.{key}": str(value) for key, value in SHAPES.items()}
    configs = ["-c", "trainer.yaml", "-c", "method.yaml", "-c", "steps.yaml"]
    assert main(["fit", *configs, *(part for pair in options.items() for part in pair)]) == 0
    assert torch.load("runs/dino/last.ckpt", weights_only=True)["global_step"] == 4
    assert main(["validate", "-c", tiny, "--model", "DINO", "--data", "ShapesData", "--ckpt_path", "best"]) == 0


def test_a_model_that_is_no_method(tiny):
    Path("probe.yaml").write_text(yaml.safe_dump({key: TINY[key] for key in ("trainer", "data")}))
    model = json.dumps({"class_path": "test_cli.Classifier", "init_args": {"width": 4}})
    assert main(["fit", "-c", "probe.yaml", "--model", model]) == 0
    assert {path.name for path in Path("runs/classifier").iterdir()} == {
        "config.yaml", "curves.png", "environment.json", "last.ckpt", "metrics.csv"
    }  # fmt: skip


def test_quickstart_config(tmp_path):
    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    less = ["--data.num_images", "8", "--data.batch_size", "4", "--data.query_size", "8"]
    assert main(["preview", "-c", str(config), "-n", "2", "--output", str(tmp_path / "views.png"), *less]) == 0


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("--trainer.precision bf16-mixed", 8),
        ("--trainer.precision bf16-mixed --trainer.gradient_clip_val 1.0", 8),
        ("--trainer.accumulate_grad_batches 2", 4),
        ("--trainer.max_steps 3", 3),
        ("--trainer.max_time 00:01:00:00 --trainer.max_steps 2", 2),
    ],
)
def test_trainer_options(tiny, options, steps):
    assert main(["fit", "-c", tiny, *options.split()]) == 0
    checkpoint = torch.load("runs/dino/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    assert all(value.dtype == torch.float32 for value in checkpoint["state_dict"].values() if value.is_floating_point())
    rows = read_metrics("runs/dino/metrics.csv")
    assert {"val/score", "train/loss"} <= {key for row in rows for key in row}


def test_a_function_may_be_an_argument_of_a_part(tiny):
    """Its default too: jsonargparse would keep the name of one that is said to return a class."""
    sphere = {"class_path": "ssl_distill.losses.entropy.SphereEntropy", "init_args": {"weight": 0.1}}
    options = ["--model.init_args.regularizers", json.dumps({"spread": sphere}), "--trainer.log_every_n_steps", "1"]
    assert main(["fit", "-c", tiny, *options]) == 0
    assert any("train/spread" in row for row in read_metrics("runs/dino/metrics.csv"))


@pytest.mark.ddp
def test_two_ranks_share_a_folder(tiny):
    Path("runs/dino").mkdir(parents=True)
    Path("runs/dino/last.ckpt").touch()
    command = [sys.executable, "-m", "ssl_distill.cli", "fit", "-c", tiny, "--trainer.devices", "2"]
    subprocess.run([*command, "--trainer.max_epochs", "1"], check=True, capture_output=True, timeout=300)
    assert {path.name for path in Path("runs").iterdir()} == {"dino", "dino-2"}
    assert torch.load("runs/dino-2/last.ckpt", weights_only=True)["global_step"] == 2
    assert Path("runs/dino-2/backbone.safetensors").exists()


def test_wandb(tiny):
    command = [sys.executable, "-m", "ssl_distill.cli", "fit", "-c", tiny, "--trainer.logger", "WandbLogger"]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    assert list(Path("runs/dino/wandb").glob("offline-run-*"))
    assert not Path("wandb").exists()
    assert any("val/score" in row for row in read_metrics("runs/dino/metrics.csv"))


METHOD = "ssl_distill.methods.dino.DINO"
CROPS = "ssl_distill.augment.multi_crop.MultiCropAugment"
SHAPES_DATA = "ssl_distill.data.shapes.ShapesData"

BAD_COMMANDS = [
    ("fitt -c tiny.yaml", "there is no command 'fitt'; did you mean fit?"),
    ("fit", "`data` and `model` must be given"),
    (
        f"fit --model {METHOD} --data ImageFolderData",
        "`root` must be given, in a config (-c FILE) or by --data.root VAL",
    ),
    ("fit -c none.yaml", "File does not exist"),
    ("preview", "the following arguments are required: -c/--config"),
    ("preview -c tiny.yaml -n 0", "`-n` must be at least 1, got 0"),
    ("export none.ckpt", "`checkpoint` none.ckpt does not exist"),
]

BAD_OPTIONS = [
    ("extra", "'extra' belongs to no option"),
    ("--trainer.devices 99x", "`trainer.devices` 99x here"),
    ("--trainer.accelerator tpu", "`trainer.accelerator` tpu and"),
    ("--trainer.check_val_every_n_epoch 0", "`trainer.check_val_every_n_epoch` must be at least 1, got 0"),
    ("--trainer.accumulate_grad_batches 0", "`trainer.accumulate_grad_batches` must be at least 1, got 0"),
    ("--model.student_temperature 0", "`student_temperature` must be above 0, got 0.0"),
    ("--trainer.max_epoch 3", "`trainer.max_epoch` is no argument; did you mean `trainer.max_epochs`?"),
    ("--trainer.max_epochs three", "`trainer.max_epochs`: must be one of int, null, got three"),
    ("--trainer.logger WandbLoger", "no class WandbLoger; did you mean lightning.pytorch.loggers.WandbLogger?"),
    ("--model DINOO", f"`model`: there is no class DINOO; did you mean {METHOD}?"),
    ("--model ssl_distill.methods.dinno.DINO", f"no class ssl_distill.methods.dinno.DINO; did you mean {METHOD}?"),
    (f"--model {SHAPES_DATA}", f"`model`: Import path {SHAPES_DATA} does not correspond to a subclass"),
    ("--data ImageFolder", "did you mean ssl_distill.data.image_folder.ImageFolderData?"),
    ("--model.num_prototype 3", f"is no argument of {METHOD}; did you mean `num_prototypes`?"),
    ("--model.momentum.strt 1", f"`model.init_args.momentum.strt` is no argument of {METHOD}; did you mean"),
    ("--model.num_prototypes many", "`model.init_args.num_prototypes`: must be a int, got many"),
    ("--evaluation.evaluator 1", "did you mean `evaluation.evaluators`?"),
    ("--model.backbone vit_smal_patch16_224", "'vit_smal_patch16_224' is not a timm model; did you mean vit_small_pat"),
    ("--model.clip_norm -1", "`clip_norm` must be at least 0"),
    ("--data ImageFolderData --data.root nowhere", "nowhere does not exist"),
    ("--data.batch_size 64", "`batch_size` must be at most 32"),
    ("--run_folder.picture_rows -1", "`picture_rows` must be at least 0"),
    ("--ckpt_path last", "`ckpt_path` is last, but runs/dino holds no last.ckpt"),
    ("--ckpt_path none.ckpt", "`ckpt_path` none.ckpt does not exist"),
]


def method(**init_args):
    return {"model": {"init_args": init_args}}


BAD_CONFIGS = [
    ({"trainer": {"max_epohs": 1}}, "`trainer.max_epohs` is no argument; did you mean `trainer.max_epochs`?"),
    ({"modell": "DINO"}, "`modell` is no argument; did you mean `model`?"),
    ({"data": {"init_args": {"num_imags": 3}}}, f"no argument of {SHAPES_DATA}; did you mean `num_images`?"),
    (method(augment={"class_path": CROPS[:-4]}), f"`model.init_args.augment`: there is no class {CROPS[:-4]}; did you"),
    (method(augment={"init_args": {"globl_size": 3}}), f"globl_size` is no argument of {CROPS}; did you mean `global_"),
    (method(targets={"class_path": "ssl_distill.targets.center.Centre"}), "did you mean ssl_distill.targets.center.Ce"),
]


def error_of(args, capsys):
    """The one line that a command with bad input prints."""
    assert main(args) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(("command", "message"), BAD_COMMANDS)
def test_errors(tiny, capsys, command, message):
    assert message in error_of(command.split(), capsys)


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_errors_in_options(tiny, capsys, options, message):
    assert message in error_of(["fit", "-c", tiny, *options.split()], capsys)
    assert not list(Path().glob("runs/*/*.ckpt"))


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_errors_in_configs(tiny, capsys, config, message):
    Path("bad.yaml").write_text(yaml.safe_dump(config))
    assert message in error_of(["fit", "-c", tiny, "-c", "bad.yaml"], capsys)


def test_errors_in_yaml(tiny, capsys):
    Path("bad.yaml").write_text("model: {class_path: x\n")
    assert "a config is no YAML" in error_of(["fit", "-c", tiny, "-c", "bad.yaml"], capsys)


def test_errors_of_checkpoints(tiny, finished, capsys):
    whole = (finished / "last.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[: len(whole) // 2])
    Path("empty.ckpt").touch()
    Path("text.ckpt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(1)}, "weights.ckpt")
    last = str(finished / "last.ckpt")
    table = [
        (["cut.ckpt"], "`ckpt_path` cut.ckpt is damaged, perhaps cut off"),
        (["empty.ckpt"], "`ckpt_path` empty.ckpt is damaged, perhaps cut off"),
        (["text.ckpt"], "`ckpt_path` text.ckpt is"),
        (["weights.ckpt"], "`ckpt_path` weights.ckpt is no checkpoint: it has no `state_dict`"),
        ([last, "--model", "test_cli.OtherMethod"], f"is of {METHOD}, but `model` is test_cli.OtherMethod"),
        ([last, "--model.num_prototypes", "8"], "arguments differ: num_prototypes is 16 there and 8 here"),
        ([last, "--model.backbone", "resnet10_nano"], "backbone is convnet_nano there and resnet10_nano here"),
    ]
    for options, message in table:
        assert message in error_of(["fit", "-c", tiny, "--ckpt_path", *options], capsys)
    assert not Path("runs/dino/last.ckpt").exists()


def test_debug_shows_the_traceback(tiny, monkeypatch):
    monkeypatch.setenv("SSL_DISTILL_DEBUG", "1")
    with pytest.raises(ValueError, match="is no argument"):
        main(["fit", "-c", tiny, "--trainer.max_epoch", "1"])


def test_debug_is_an_argument_too():
    with pytest.raises(ValueError, match="there is no command 'fitt'"):
        main(["fitt", "--debug"])
