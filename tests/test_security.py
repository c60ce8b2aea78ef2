"""Nothing that a file says is run: malicious objects go through every reader that the package has."""

import ast
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
import yaml
from safetensors.torch import save_file
from test_cli import SHAPES, TINY, error_of
from torch import nn

import ssl_distill
from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.feature_teacher import FrozenFeatures
from ssl_distill.backbones.projection_teacher import read_projection_teacher
from ssl_distill.backbones.teacher_maps import _read as read_maps
from ssl_distill.cache import cache_folder, cached
from ssl_distill.callbacks.atomic_checkpoint import AtomicCheckpointIO
from ssl_distill.callbacks.start_from import _read as read_start
from ssl_distill.cli import main
from ssl_distill.commands.checkpoints import read_checkpoint
from ssl_distill.convert_layouts import read_official
from ssl_distill.data.sources import open_litdata, open_shards
from ssl_distill.evaluate.fine_tune import _load_encoder
from ssl_distill.export import export_backbone, load_backbone
from ssl_distill.lidar.official import load_waffleiron
from ssl_distill.lidar.official import read_official as read_waffleiron
from ssl_distill.lidar.shards_data import LidarShardsData
from ssl_distill.reading.settings import read_yaml
from ssl_distill.reading.shards import read_shards
from ssl_distill.reading.tensors import load_tensors

PACKAGE = Path(ssl_distill.__file__).parent

# What may run or import what it reads; a name stands for all that is in it.
SUSPECTS = (
    *("torch.load", "torch.jit", "torch.hub", "torch.package", "torch.serialization", "torch.distributed.checkpoint"),
    *("torch.utils.cpp_extension", "numpy.load", "numpy.lib", "scipy.io", "pandas", "joblib", "dill", "cloudpickle"),
    *("pickle", "marshal", "shelve", "yaml", "litdata", "importlib", "runpy", "eval", "exec", "compile"),
    *("__import__", "jsonargparse.set_parsing_settings", "safetensors"),
)
SUSPECT_ENDS = ("import_litdata", "load_from_checkpoint", "load_state_dict_from_url")

# Every place of the package where one of them is, and the tests below that go through it, or why none need to.
TORCH, SHARDS, CACHES, LITDATA, YAML, CLASSES, WEIGHTS = (
    "test_objects_in_files_of_torch",
    "test_objects_in_checkpoints_of_shards",
    "test_objects_in_caches",
    "test_what_litdata_would_obey",
    "test_tags_in_yaml",
    "test_classes_from_elsewhere",
    "test_what_backbones_may_ask_for",
)
READERS = {
    "reading/tensors.py": {
        "torch.load": TORCH,
        "torch.serialization.safe_globals": TORCH,
        "pickle.UnpicklingError": "an error",
        "safetensors.torch.load_file": WEIGHTS,
    },
    "reading/shards.py": {
        "pickle.Unpickler": SHARDS,
        "pickle.UnpicklingError": "an error",
        "torch.load": SHARDS,
        "torch.distributed.checkpoint.load": SHARDS,
        "torch.distributed.checkpoint.FileSystemReader": SHARDS,
        "torch.distributed.checkpoint.DefaultLoadPlanner": SHARDS,
        "torch.distributed.checkpoint.planner.ReadItem": "a type",
        "torch.distributed.checkpoint.metadata.Metadata": "a type",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata": "a type",
        "torch.distributed.checkpoint.api.CheckpointException": "an error",
        "torch.distributed.checkpoint._nested_dict.unflatten_state_dict": "in memory",
    },
    "sharded_strategy.py": {
        f"torch.distributed.checkpoint.state_dict.{name}": "in memory"
        for name in ("get_model_state_dict", "get_optimizer_state_dict", "set_optimizer_state_dict")
    },
    "reading/settings.py": {"yaml.safe_load": YAML, "yaml.YAMLError": "an error", "yaml.MarkedYAMLError": "an error"},
    "sweeps/file.py": {"yaml.safe_load": YAML, "yaml.YAMLError": "an error"},
    "commands/train.py": {
        "yaml.safe_load": "what the parser has just written",
        "yaml.safe_dump": "writes",
        "importlib.import_module": "modules of the package",
    },
    "commands/explain.py": {
        "yaml.MarkedYAMLError": "an error",
        "importlib.import_module": "of a class that the parser has imported before",
    },
    "report/settings.py": {"yaml.safe_dump": "writes"},
    "commands/trust.py": {"jsonargparse.set_parsing_settings": CLASSES},
    "commands/environment.py": {"importlib.metadata.version": "of packages that are named there"},
    "commands/wandb_runs.py": {"importlib.util.find_spec": "of wandb"},
    "export.py": {
        "importlib.metadata.version": "of timm",
        "safetensors.safe_open": WEIGHTS,
        "safetensors.torch.load_file": WEIGHTS,
        "safetensors.torch.save_file": "writes",
    },
    "lidar/shards_data.py": {
        "safetensors.SafetensorError": "is caught",
        "safetensors.numpy.load": LITDATA,
        "safetensors.numpy.save": "writes",
    },
    "cache.py": {"numpy.load": CACHES},
    "backbones/teacher_maps.py": {"numpy.load": CACHES},
    "data/sources.py": {"importlib.import_module": "of LitData", "import_litdata": LITDATA},
    "data/optimize.py": {"ssl_distill.data.sources.import_litdata": "writes"},
    "detection/keys.py": {"pickle.dumps": "writes"},
}


def suspects(tree: ast.AST) -> Iterator[str]:
    """Full names of what a module uses of `SUSPECTS`, whatever it calls them."""
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name.partition(".")[0]] = alias.asname and alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def full_name(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return imported.get(node.id) or node.id
        if isinstance(node, ast.Attribute):
            owner = full_name(node.value)
            return f"{owner}.{node.attr}" if owner else f"?.{node.attr}"
        return None

    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        name = full_name(node) if id(node) not in inner else None
        if name and (f"{name}.".startswith(tuple(f"{each}." for each in SUSPECTS)) or name.endswith(SUSPECT_ENDS)):
            yield name


def test_every_reader_is_in_the_table():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if names := set(suspects(ast.parse(path.read_text(encoding="utf-8")))):
            found[path.relative_to(PACKAGE).as_posix()] = names
    assert found == {file: set(names) for file, names in READERS.items()}
    tests = {name for names in READERS.values() for name in names.values() if name.startswith("test_")}
    assert all(callable(globals()[name]) for name in tests)


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(x)",
        "import torch as t; partial(t.load, x)",
        "from torch import load as read; read(x)",
        "from numpy import load; load(x)",
        "import yaml; yaml.unsafe_load(x)",
        "from pickle import Unpickler",
        "import torch.distributed.checkpoint as dcp; dcp.load(x)",
        "Method.load_from_checkpoint(x)",
        "make().load_from_checkpoint(x)",
        "eval(x)",
    ],
)
def test_a_new_reader_is_found(line):
    tree = ast.parse(line if "Unpickler" not in line else f"{line}; Unpickler(x)")
    assert set(suspects(tree))
    assert not set(suspects(ast.parse("import torch; module.eval(); torch.save(x); re.compile(x)")))


class Evil:
    """Makes a folder when it is unpickled, wherever that is."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def evil(tmp_path):
    """An object; the test fails if it was run."""
    mark = tmp_path / "was run"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.is_dir()  # it would be noticed
    mark.rmdir()
    yield Evil(mark)
    assert not mark.exists()


@pytest.fixture
def evil_module(tmp_path, monkeypatch):
    """The name of a module that can be imported; the test fails if it was."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil_module.py").write_text("from ssl_distill.methods.dino import DINO as Method\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield "evil_module"
    assert sys.modules.pop("evil_module", None) is None


def fine_tuned(path):
    network = create_backbone("vit_nano_patch8_32")
    _load_encoder(network, network, str(path))


FILES_OF_TORCH = {
    "load_tensors": load_tensors,
    "mapped": lambda path: load_tensors(path, mmap=True),
    "checkpoint": read_checkpoint,
    "trainer": lambda path: AtomicCheckpointIO().load_checkpoint(path, weights_only=False),
    "start": lambda path: read_start(str(path), student=True),
    "convert": read_official,
    "feature teacher": lambda path: FrozenFeatures("vit_nano_patch8_32", checkpoint=str(path)),
    "projection teacher": lambda path: read_projection_teacher(str(path), "vit_nano_patch8_32"),
    "WaffleIron": read_waffleiron,
    "classifier": fine_tuned,
}


@pytest.mark.parametrize("kind", ["zip", "older than 1.6", "bare pickle"])
@pytest.mark.parametrize("reader", FILES_OF_TORCH)
def test_objects_in_files_of_torch(reader, kind, evil, tmp_path):
    content = {"state_dict": {}, "model": {}, "object": evil}
    if kind == "bare pickle":
        (tmp_path / "a.pth").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"a\.pth (holds a \w+\.mkdir, which is not loaded|is damaged)") as caught:
        FILES_OF_TORCH[reader](tmp_path / "a.pth")
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and still read
def test_programs_of_torch_are_not_loaded(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth holds a program \(TorchScript\), which is not loaded\.$"):
        load_tensors(tmp_path / "a.pth")


@pytest.fixture
def shards(tmp_path):
    """A good checkpoint in shards."""
    return save_shards(tmp_path / "last.ckpt", 0.1)


def save_shards(folder, rate):
    state = {"state_dict": {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}}
    optimizer = {"state": {"w": {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": rate, "params": "w"}]}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        torch.distributed.checkpoint.save({**state, "optimizer_0": optimizer}, checkpoint_id=folder)
    torch.save({"global_step": 3}, folder / "meta.pt")
    return folder


def test_good_shards_are_read(shards):
    checkpoint = read_shards(shards)
    assert checkpoint["global_step"] == 3
    assert torch.equal(checkpoint["state_dict"]["w"], torch.arange(6.0).view(2, 3))
    assert checkpoint["state_dict"]["b"].dtype == torch.bfloat16
    assert checkpoint["optimizer_states"][0]["param_groups"] == [{"lr": 0.1, "params": "w"}]


@pytest.mark.parametrize("reader", [read_shards, AtomicCheckpointIO().load_checkpoint])
def test_objects_in_checkpoints_of_shards(reader, shards, evil, tmp_path):
    table = (shards / ".metadata").read_bytes()
    (shards / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match=r"has a \.metadata that holds a \w+\.mkdir, which is not loaded because it"):
        reader(shards)
    inside = pickle.loads(table)
    inside.planner_data = {"state_dict.w": evil}
    (shards / ".metadata").write_bytes(pickle.dumps(inside))
    with pytest.raises(ValueError, match=r"has a \.metadata that holds a \w+\.mkdir"):
        reader(shards)
    (shards / ".metadata").write_bytes(table[: len(table) // 2])
    with pytest.raises(ValueError, match=r"has a damaged \.metadata"):
        reader(shards)
    (shards / ".metadata").write_bytes(table)
    reader(shards)
    torch.save({"object": evil}, shards / "meta.pt")
    with pytest.raises(ValueError, match=r"meta\.pt holds a \w+\.mkdir"):
        reader(shards)
    value = save_shards(tmp_path / "value.ckpt", evil)
    with pytest.raises(ValueError, match=r"value\.ckpt cannot be loaded: its entry optimizer_0\.\S+\.lr holds more"):
        reader(value)


def test_shards_outside_of_the_folder(shards, tmp_path):
    table = pickle.loads((shards / ".metadata").read_bytes())
    next(iter(table.storage_data.values())).relative_path = "../secret.distcp"
    (shards / ".metadata").write_bytes(pickle.dumps(table))
    shutil.copy(shards / "__0_0.distcp", tmp_path / "secret.distcp")
    with pytest.raises(ValueError, match=r"names \.\./secret\.distcp, a file outside the folder"):
        read_shards(shards)


def test_objects_in_caches(evil, tmp_path):
    made = {"a": np.ones(2)}
    assert cached("security", {"key": 1}, lambda: made) is made
    (file,) = (cache_folder() / "security").iterdir()
    for save in (np.savez, lambda path, **arrays: path.write_bytes(pickle.dumps(arrays))):
        save(file, a=np.array([evil], dtype=object))
        assert cached("security", {"key": 1}, lambda: made) is made
        save(tmp_path / "0.npz", look=np.array([evil], dtype=object), half=np.ones(1), largest=np.ones(1))
        assert read_maps(tmp_path / "0.npz", torch.zeros(2, 3, 2, 2)) is None


LEAF = {"type": None, "context": None, "children_spec": []}
FACTORY = {"default_factory_module": "evil_module", "default_factory_name": "Method", "dict_context": ["image"]}


def spec_of(kind, context):
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [LEAF]}])


OBEYED = {
    "pickle": ({"data_format": ["pickle"]}, "names items of format pickle, which are not read because"),
    "graph": ({"data_format": ["graph:pickle"]}, "names items of format graph:pickle"),
    "hidden": ({"data_format": ["bytes:pickle"]}, "names items of format bytes:pickle"),
    "video": ({"data_format": ["video"]}, "names items of format video"),
    "factory": (
        {"data_spec": spec_of("collections.defaultdict", FACTORY)},
        r"is no index of LitData's shards|describes items that are not plain dicts",
    ),
    "enum": (
        {"data_spec": spec_of("builtins.dict", json.dumps([{"__enum__": True, "fqn": "evil_module:X", "name": "Y"}]))},
        "describes items that are not plain dicts",
    ),
}


@pytest.fixture
def litdata_shards(evil, tmp_path):
    """Shards whose only field is a malicious pickle, by an index that calls it bytes."""
    pytest.importorskip("litdata")
    from litdata.streaming.serializers import BytesSerializer
    from litdata.streaming.writer import BinaryWriter

    root = tmp_path / "shards"
    writer = BinaryWriter(str(root), chunk_size=9, serializers={"bytes": BytesSerializer()})
    for position in range(3):
        writer.add_item(position, {"image": pickle.dumps(evil)})
    writer.done()
    writer.merge()
    (root / "images.csv").write_text("path,label\n" + "a.jpg,b\n" * 3)
    (root / "frames.json").write_text(json.dumps({"num_frames": 3, "bank_size": 1, "query_size": 1, "class_names": []}))
    return root


@pytest.mark.parametrize("case", OBEYED)
def test_what_litdata_would_obey(case, litdata_shards, evil_module, capsys):
    file = litdata_shards / "index.json"
    source, _ = open_shards(litdata_shards)
    assert source.read(0).startswith(b"\x80")  # good shards, whose bytes are only bytes
    changes, message = OBEYED[case]
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "config": {**index["config"], **changes}}))
    for reader in (open_shards, open_litdata, lambda root: LidarShardsData(str(root))):
        with pytest.raises(ValueError, match=message):
            reader(litdata_shards)
    assert "index.json" in error_of(["doctor", str(litdata_shards), "--quarantine", "--workers", "0"], capsys)


def test_litdata_would_obey(litdata_shards, tmp_path):
    """What these tests look for is there: without the check, the pickle runs."""
    from litdata import StreamingDataset

    index = json.loads((litdata_shards / "index.json").read_text())
    index["config"]["data_format"] = ["pickle"]
    (litdata_shards / "index.json").write_text(json.dumps(index))
    with suppress(FileExistsError):  # it runs more than once
        StreamingDataset(str(litdata_shards), shuffle=False)[0]
    (tmp_path / "was run").rmdir()


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "..", ""])
def test_chunks_outside_of_the_folder(name, litdata_shards):
    index = json.loads((litdata_shards / "index.json").read_text())
    index["chunks"][0]["filename"] = name
    (litdata_shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the shard .*outside of the folder"):
        open_litdata(litdata_shards)


TAG = "!!python/object/apply:os.mkdir ['{}']"


def test_tags_in_yaml(evil, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("model: " + TAG.format(evil.mark))
    with pytest.raises(ValueError, match=r"config\.yaml is no YAML of plain values: could not determine a constructor"):
        read_yaml(file)
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    for command in (
        ["fit", "-c", file],
        ["validate", "-c", file],
        ["export", tmp_path / "last.ckpt"],
        ["report", tmp_path],
        ["sweep", file],
        ["data", "optimize", file, tmp_path / "out"],
    ):
        assert "could not determine a constructor" in error_of([str(part) for part in command], capsys)


@pytest.fixture
def run(tmp_path):
    """The config and the checkpoint of a run from elsewhere."""
    data = {"class_path": TINY["data"]["class_path"], "init_args": {**SHAPES, "num_images": 8}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**TINY, "data": data}))
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    return tmp_path


NAMED = {
    "the method": (("model", "class_path"), "evil_module.Method"),
    "a part": (("model", "init_args", "head"), "evil_module.Method"),
    "a function": (("model", "init_args", "head"), "torch.os.system"),
    "the data": (("data", "class_path"), "evil_module.Method"),
    "a callback": (("trainer", "callbacks"), [{"class_path": "evil_module.Method"}]),
    "another file": (("model",), "nested.yaml"),
}


@pytest.mark.parametrize("case", NAMED)
def test_classes_from_elsewhere(case, run, evil_module, capsys, monkeypatch):
    (*owners, key), value = NAMED[case]
    config = yaml.safe_load((run / "config.yaml").read_text())
    place = config
    for owner in owners:
        place = place[owner]
    place[key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "nested.yaml").write_text("class_path: evil_module.Method\n")
    monkeypatch.chdir(run)
    validate = ["validate", "-c", "config.yaml"]
    refused = r"(evil_module\.Method|\w+\.system) is not of ssl_distill, .*; read it, then give --trust\.$"
    message = error_of(validate, capsys)
    assert re.search(refused, message), message
    if owners[:1] == ["model"]:  # all that `export` makes
        message = error_of(["export", "last.ckpt"], capsys)
        assert re.search(refused, message), message
    if case != "another file":  # which `fit` never leaves
        assert main(["report", "."]) == 0  # and imports nothing


def test_nothing_is_made_where_anything_may_stand(run, evil, capsys):
    """torch has a class that starts a program: of a known package, and no subclass of anything that is asked for."""
    program = {
        "class_path": "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
        "init_args": {"entrypoint": "mkdir", "args": [str(evil.mark)], "local_rank_id": 0}
        | dict.fromkeys(("stdout", "stderr"), None)
        | {"env": {}},
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in ("backbone_kwargs", "head", "optimizer", "augment"):
        model = {**config["model"]["init_args"], key: {"any": program} if key == "backbone_kwargs" else program}
        changed = {**config, "model": {**config["model"], "init_args": model}}
        (run / "config.yaml").write_text(yaml.safe_dump(changed))
        assert key in error_of(["validate", "-c", str(run / "config.yaml")], capsys)
        assert key in error_of(["export", str(run / "last.ckpt")], capsys)


def test_trust(run, evil_module, capsys):
    config = str(run / "config.yaml")
    method = ["--model.class_path", "evil_module.Method"]
    assert main(["validate", "-c", config, *method, "--trust", "--trainer.limit_val_batches", "0"]) == 0
    assert sys.modules.pop("evil_module")
    assert "`trust` is no argument" in error_of(["fit", "-c", config, "--trust"], capsys)


def test_what_backbones_may_ask_for(evil_module, tmp_path):
    path = tmp_path / "backbone.safetensors"
    facts = {"timm_name": None, "class": "WaffleIron", "timm_kwargs": {"channels": 8, "activation": "torch.nn.ReLU"}}
    for name in ("evil_module.Method", "os.system", "torch.nn.os", "torch.nn.functional.relu"):
        facts["timm_kwargs"]["norm"] = name
        save_file({"w": torch.ones(1)}, path, {"ssl_distill": json.dumps(facts)})
        with pytest.raises(ValueError, match=f"names {name}, which is no layer of torch.nn"):
            load_waffleiron(path)
    wanted = [{"timm_kwargs": {name: "x"}} for name in ("pretrained", "checkpoint_path", "pretrained_cfg_overlay")]
    for each in [{"timm_name": "hf-hub:a/b"}, *wanted]:
        export_backbone(create_backbone("vit_nano_patch8_32"), path, each)
        with pytest.raises(ValueError, match="asks timm for weights from elsewhere"):
            load_backbone(path)
