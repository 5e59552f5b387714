"""The processes that train together, and the tensors they shard (DTensor)."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that share the training; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agreed(numbers: list[int], device: torch.device) -> list[int]:
    """Each number if all ranks have the same one, else -1."""
    if world_size() == 1 or not numbers:
        return numbers
    both_ends = torch.tensor([numbers, [-number for number in numbers]], device=device)
    dist.all_reduce(both_ends, op=dist.ReduceOp.MIN)
    lowest, negated_highest = both_ends.tolist()
    pairs = zip(lowest, negated_highest, strict=True)
    return [low if low == -negated else -1 for low, negated in pairs]


def summed(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor summed over all ranks, all with one all-reduce in their widest dtype.

    Every rank must give tensors of the same shapes in the same order. With one rank they come
    back as they are.
    """
    if world_size() == 1 or not tensors:
        return tensors
    device = tensors[0].device
    dtype = max((t.dtype for t in tensors), key=lambda kind: torch.finfo(kind).bits)
    bucket = torch.cat([t.flatten().to(device, dtype) for t in tensors])
    dist.all_reduce(bucket)
    parts = bucket.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t) for part, t in zip(parts, tensors, strict=True)]


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor (DTensor) that this process holds; others unchanged."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def has_whole_rows(tensor: Tensor) -> bool:
    """Whether each process holds whole rows of a DTensor: split along axis 0, or not at all."""
    placements = getattr(tensor, "placements", ())
    return all(placement.is_replicate() or placement.is_shard(0) for placement in placements)


def like_shard(rows: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of `local`: `rows` as the shard of a DTensor placed as `tensor` is."""
    if not is_sharded(tensor):
        return rows
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        rows,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def signs(tensors: list[Tensor]) -> list[Tensor]:
    """The sign of each tensor, of DTensors as well, for which torch 2.11 has no foreach form."""
    found = torch._foreach_sign([local(tensor) for tensor in tensors])
    return [like_shard(sign, tensor) for sign, tensor in zip(found, tensors, strict=True)]
