"""Methods whose parameters are divided over ranks (FSDP2), students and teachers alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm


def shard(method: nn.Module, mesh: DeviceMesh, min_parameters: int) -> None:
    """Divide all parameters of a method over the ranks of a mesh, in place; nothing happens the second time.

    Blocks and large layers are gathered one by one, when their `forward` is called. Tokens, positions, norms and all
    other small parameters are gathered together for the whole of `losses` and of a validation, because methods reach
    them by other ways than `forward`.

    Args:
        method: A `Distiller`.
        mesh: One-dimensional.
        min_parameters: Smaller modules are not gathered one by one.

    Raises:
        ValueError: If it has batch norms, or a parameter without dimensions.
    """
    if isinstance(method, FSDPModule):
        return
    _check(method)
    name = (type(method).__module__, type(method).__name__, type(method).__qualname__)
    # Order matters: inner modules first; the outer ones take what is left. A teacher that stayed whole after its
    # forward would meet a sharded student in the moving average: both are divided again each time.
    for module in _units(method, min_parameters):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(method, mesh=mesh, reshard_after_forward=True)
    cls = type(method)  # made by `fully_shard`; checkpoints and exports name the method's own class
    cls.__module__, cls.__name__, cls.__qualname__ = name
    for entry in ("losses", "validation_step"):
        register_fsdp_forward_method(method, entry)


def _check(method: nn.Module) -> None:
    for name, module in method.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"`trainer.strategy` ShardedStrategy does not synchronise batch norm, got {name}; use ddp with"
                " `trainer.sync_batchnorm` (configs/trainer/ddp.yaml), or another norm."
            )
    for name, parameter in method.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(
                f"`trainer.strategy` ShardedStrategy divides parameters by their first dimension, got {name} without"
                " one; give it the shape (1,)."
            )


def _units(module: nn.Module, min_parameters: int, inside: bool = False) -> Iterator[nn.Module]:
    """Modules that are gathered one by one, inner ones first: blocks, and large layers that stand outside of blocks."""
    for child in module.children():
        is_block = isinstance(module, nn.Sequential | nn.ModuleList)
        is_layer = not inside and not any(True for _ in child.children()) and not _reaches_into_layers(module)
        is_unit = (
            (is_block or is_layer)
            and not isinstance(child, nn.ModuleList | nn.ModuleDict)
            and sum(parameter.numel() for parameter in child.parameters()) >= max(min_parameters, 1)
        )
        yield from _units(child, min_parameters, inside or is_unit)
        if is_unit:
            yield child


def _reaches_into_layers(module: nn.Module) -> bool:
    """Whether a module uses the weights of its layers without calling them."""
    return isinstance(module, nn.MultiheadAttention)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Plain whole parameters inside, in place of shards; what is written to them is divided again afterwards.

    Of use where weights are drawn or copied. All ranks must write the same, and no `forward` may run.
    """
    sharded: list[tuple[nn.Module, str, Any]] = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    for owner, name, parameter in sharded:
        owner._parameters[name] = nn.Parameter(whole(parameter).clone(), parameter.requires_grad)
    try:
        yield
    finally:
        for owner, name, parameter in sharded:
            written = owner._parameters[name]
            assert written is not None
            owner._parameters[name] = parameter
            with torch.no_grad():
                parameter.to_local().copy_(divided_like(parameter, written.detach()).to_local())


def whole(value: Any) -> Any:
    """A tensor put together from its shards, on all ranks at once; anything else as it is."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def share(value: Tensor) -> Tensor:
    """What this rank holds of a tensor, with its gradient; all of it if it is not divided."""
    return value.to_local() if isinstance(value, DTensor) else value


def divided_like(pattern: Any, value: Any) -> Any:
    """This rank's share of a whole tensor, if the pattern is divided; all ranks have the whole, nothing is sent."""
    if not isinstance(pattern, DTensor) or not isinstance(value, Tensor) or value.shape != pattern.shape:
        return value
    value = value.to(pattern.device)
    return distribute_tensor(value, pattern.device_mesh, pattern.placements, src_data_rank=None)


def whole_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state of a module, sharded or not, on the CPU; to be called on all ranks."""
    state = {}
    for name, value in module.state_dict().items():
        value = whole(value)
        state[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    return state
