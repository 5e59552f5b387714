"""A model whose weights, gradients, averages and optimizer state are shared out over processes, by
FSDP2: each process holds some rows of every tensor (a DTensor).

Checkpoints hold whole tensors, so a run may go on with or without shards, and on any number of
processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only


def share_out(model: nn.Module, device: torch.device) -> None:
    """Shard `model`, in place, over all processes. Whole weights of one block at a time are on the
    device in a forward or backward pass; a block is what stands in a ModuleList.

    Weights are split along their first axis; embeddings along their second, if it can be split
    evenly, as DoPr needs each process to have a value of every row."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh(device.type, (world,))
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}

    def axis(weight: nn.Parameter) -> Shard:
        return Shard(1 if weight in tables and weight.shape[1] % world == 0 else 0)

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for blocks in reversed(lists) for block in blocks]
    for block in [*blocks, model]:
        if type(block).forward is not nn.ModuleList.forward:
            # Weights that stayed whole would hide an average that is put in their place.
            fully_shard(block, mesh=mesh, reshard_after_forward=True, shard_placement_fn=axis)


def whole(values: Any, *, kept: bool) -> Any:
    """`values`, a tree, with whole tensors on the CPU in place of shards; all processes must call
    it. Without `kept` a process gets None for them."""

    def gathered(shard: DTensor) -> Tensor | None:
        tensor = shard.full_tensor()
        return tensor.cpu() if kept else None

    return tree_map_only(DTensor, gathered, values)


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole `tensor` if `like` is a shard; else `tensor`."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def placed_weights(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`placed` for each of `weights`, by name."""
    return {name: placed(value, like[name]) for name, value in weights.items()}


def placed_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`placed` for the tensors in a state dict of `optimizer` that have their weight's shape."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    of_weights = {
        number: {
            key: placed(value, weights[number])
            if isinstance(value, Tensor) and value.shape == weights[number].shape
            else value
            for key, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    return {**state, "state": of_weights}
