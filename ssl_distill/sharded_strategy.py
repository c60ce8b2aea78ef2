"""Lightning's FSDP2 for methods with teachers."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ssl_distill.callbacks.atomic import beside, remove_stale
from ssl_distill.reading.shards import PlainPlanner, ShardReader, check_shards, load_shards, write_checksums
from ssl_distill.reading.tensors import load_tensors
from ssl_distill.sharding import divided_like, whole, whole_state_dict


class ShardedStrategy(ModelParallelStrategy):
    """Parameters, gradients, optimiser states and teachers divided over all ranks; for GPUs, tested on CPUs by gloo.

    Checkpoints are files like those of any other strategy, which continue on one device or on any number of them. With
    `save_distributed_checkpoint` they are folders, to which every rank writes its share.

    Deviation: Lightning's own gives the states of an optimiser with several parameter groups to the wrong parameters
    when a run continues from an undivided checkpoint (it takes them in the order of `model.parameters()`), loads no
    extra state of modules from one, loads no shards of an optimiser that has not met all its parameters yet, and
    overwrites the last checkpoint's shards one by one.

    Args:
        min_parameters: Modules with fewer are not gathered one by one.
        save_distributed_checkpoint: A folder of shards instead of one file that rank 0 writes.
        process_group_backend: None is nccl on GPUs, gloo on CPUs.
        timeout: For a rank that does not answer.
    """

    def __init__(
        self,
        min_parameters: int = 65536,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if min_parameters < 1:
            raise ValueError(f"`min_parameters` must be at least 1, got {min_parameters}.")
        self.min_parameters = min_parameters

    def setup_environment(self) -> None:
        """All ranks share all parameters."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """No inference mode: parameters that are gathered in it could not be trained afterwards."""
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The method's state: whole on rank 0 and empty elsewhere, or shards."""
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.model is not None
        state = whole_state_dict(self.model)
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimiser's state: whole on rank 0 and empty elsewhere, or shards."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        state = tree_map(_on_cpu, getattr(optimizer, "_optimizer", optimizer).state_dict())
        return state if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a file, or a folder that takes the place of the old one once it is whole."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path, temporary = self.broadcast((Path(filepath), beside(Path(filepath))))
        if self.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            remove_stale(path, temporary)
        self.barrier()
        super().save_checkpoint(checkpoint, temporary, storage_options)
        self.barrier()
        write_checksums(temporary, self.global_rank)
        self.barrier()
        if self.is_global_zero:
            old = beside(path, "old")
            if path.is_dir():
                path.rename(old)
            else:
                path.unlink(missing_ok=True)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore method and optimisers from a file or a folder of shards; the rest is returned.

        Only tensors and plain values are read, whatever `weights_only` says.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return self._load_shards(path)
        checkpoint: dict[str, Any] = load_tensors(path, "ckpt_path", mmap=True)
        assert self.model is not None
        assert self.lightning_module is not None
        ours, theirs = self.model.state_dict(), checkpoint["state_dict"]
        state = {name: divided_like(ours.get(name), value) for name, value in theirs.items()}
        self.model.load_state_dict(state, strict=self.lightning_module.strict_loading)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            optimizer.load_state_dict(_divided(state, optimizer))
        return checkpoint

    def _load_shards(self, path: Path) -> dict[str, Any]:
        """Every rank reads its share; written by any number of ranks."""
        assert self.model is not None
        assert self.lightning_module is not None
        check_shards(path)
        reader = ShardReader(path)
        method: dict[str, Any] = {"state_dict": get_model_state_dict(self.model)}
        load_shards(method, reader)
        self.model.load_state_dict(method["state_dict"], strict=self.lightning_module.strict_loading)
        saved = reader.read_metadata().state_dict_metadata
        for i, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{i}"
            state: dict[str, Any] = {name: get_optimizer_state_dict(self.model, optimizer)}
            # A layer that had not moved when the checkpoint was written has no moments in it, and gets none here.
            load_shards(state, reader, PlainPlanner(allow_partial_load=True))
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state[name])
            for key, parameter in self.model.named_parameters():
                if not any(each.startswith(f"{name}.state.{key}.") for each in saved):
                    optimizer.state.pop(parameter, None)
        rest: dict[str, Any] = load_tensors(path / "meta.pt", "ckpt_path")
        return rest


def _on_cpu(value: Any) -> Any:
    value = whole(value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _divided(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A whole optimiser state, its tensors divided as the parameters that they belong to."""
    places = [place for group in state["param_groups"] for place in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_place = dict(zip(places, parameters, strict=True))
    return {
        **state,
        "state": {
            place: {name: divided_like(of_place[place], value) for name, value in values.items()}
            for place, values in state["state"].items()
        },
    }
