"""configs/evaluate/authors.yaml: what the papers' k-NN scores were measured on."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from preset_numbers import ROOT, presets

from ssl_distill.cli import main

AUTHORS = "configs/evaluate/authors.yaml"


@pytest.mark.filterwarnings("ignore:`learning_rate` warms up", "ignore:`k` .* is clamped", "ignore:`num_per_class` is")
def test_all_images_are_bank_and_queries(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in {"train": 15, "val": 7}.items():
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    run = tmp_path / "run"
    few = {"root": tmp_path / "train", "labels": "folder", "num_workers": 0, "batch_size": 4}
    few |= {"eval_size": 32, "bank_size": 8, "query_size": 4}
    options = {f"data.init_args.{key}": value for key, value in few.items()}
    options |= {"trainer.max_steps": 1, "trainer.default_root_dir": run, "model.init_args.num_prototypes": 16}
    fit = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert main(["fit", "-c", str(ROOT / "configs/dino/folder_cpu.yaml"), *fit]) == 0
    whole = ["-c", str(ROOT / AUTHORS), "--data.init_args.val_root", str(tmp_path / "val")]
    assert main(["validate", "-c", str(run / "config.yaml"), *whole, "--ckpt_path", str(run / "last.ckpt")]) == 0
    history = json.loads((run / "evaluation.json").read_text())
    sizes = [(entry["protocol"]["bank"], entry["protocol"]["queries"]) for entry in history]
    assert sizes[0] == (8, 4)
    assert sizes[-1] == (30, 14)
    assert history[-1]["protocol"]["KNN"]["temperature"] == 0.07


@pytest.mark.parametrize("preset", presets(), ids=lambda path: path.stem)
def test_headers_say_the_protocol_of_their_number(preset):
    header = " ".join(line for line in preset.read_text().splitlines() if line.startswith("#"))
    if re.search(r"Expect[^:]*: k-NN", header):
        assert AUTHORS in header
