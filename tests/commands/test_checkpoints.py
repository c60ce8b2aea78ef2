import pytest
import torch
from torch import nn

from ssl_distill.commands.checkpoints import check_fits, read_checkpoint

LAYER = {"ssl_distill": {"method": "torch.nn.modules.linear.Linear"}}


def test_differences_are_named_by_the_config_beside_the_checkpoint(tmp_path):
    checkpoint = {**LAYER, "state_dict": nn.Linear(2, 3).state_dict()}
    check_fits(checkpoint, tmp_path / "last.ckpt", nn.Linear(2, 3), {})
    with pytest.raises(ValueError, match=r"weight is \(3, 2\) there and \(4, 2\) here\.$"):
        check_fits(checkpoint, tmp_path / "last.ckpt", nn.Linear(2, 4), {})
    (tmp_path / "config.yaml").write_text("model: {class_path: Linear, init_args: {out: 3, head: {init_args: {k: 1}}}}")
    config = {"class_path": "Linear", "init_args": {"out": 4, "head": {"init_args": {"k": 1}}, "new": 5}}
    with pytest.raises(ValueError, match=r"; arguments differ: out is 3 there and 4 here\.$"):
        check_fits(checkpoint, tmp_path / "last.ckpt", nn.Linear(2, 4), config)


def test_missing_and_unknown_weights(tmp_path):
    checkpoint = {**LAYER, "state_dict": nn.Linear(2, 3, bias=False).state_dict()}
    with pytest.raises(ValueError, match="it has no bias"):
        check_fits(checkpoint, "last.ckpt", nn.Linear(2, 3), {})
    module = nn.Linear(2, 3)
    module.strict_loading = False  # a method that leaves a frozen teacher out of its checkpoints
    check_fits(checkpoint, "last.ckpt", module, {})


def test_a_folder_of_shards(tmp_path):
    torch.save({**LAYER, "global_step": 7}, tmp_path / "meta.pt")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint["global_step"] == 7
    check_fits(checkpoint, tmp_path, nn.Linear(2, 3), {})
    with pytest.raises(ValueError, match=r"is of torch.nn.modules.linear.Linear, but `model` is"):
        check_fits(checkpoint, tmp_path, nn.ReLU(), {})


def test_objects_are_not_loaded(tmp_path):
    torch.save({"state_dict": {}, "module": nn.Linear(2, 2)}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt holds a torch\S+Linear, which is not loaded because"):
        read_checkpoint(tmp_path / "last.ckpt")
