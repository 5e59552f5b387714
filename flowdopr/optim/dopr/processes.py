"""What DoPr needs of several processes: sums in one fixed order, and a share of the inversions.

Every rank gives every tensor to a collective, zeros where a layer did not run there, so that the
collective is the same on all ranks whatever gradients are present.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes that share the training; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_split_along(tensor: Tensor, axis: int | None) -> bool:
    """Whether processes hold parts of a DTensor along this axis alone, or all of it."""
    placements = getattr(tensor, "placements", ())
    return all(placement.is_replicate() or placement.is_shard(axis) for placement in placements)


def agreed(numbers: list[int], device: torch.device) -> list[int]:
    """Each number if all ranks have the same one, else -1. The host waits for the answer."""
    if world_size() == 1 or not numbers:
        return numbers
    both_ends = torch.tensor([numbers, [-number for number in numbers]], device=device)
    dist.all_reduce(both_ends, op=dist.ReduceOp.MIN)
    lowest, negated_highest = both_ends.tolist()
    pairs = zip(lowest, negated_highest, strict=True)
    return [low if low == -negated else -1 for low, negated in pairs]


def summed(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor summed over all ranks, all with one all-reduce in their widest dtype.

    Every rank must give tensors of the same shapes in the same order. With one rank they come back
    as they are.
    """
    if world_size() == 1 or not tensors:
        return tensors
    device = tensors[0].device
    dtype = max((t.dtype for t in tensors), key=lambda kind: torch.finfo(kind).bits)
    bucket = torch.cat([t.flatten().to(device, dtype) for t in tensors])
    dist.all_reduce(bucket)
    pieces = bucket.split([t.numel() for t in tensors])
    return [piece.view(t.shape).to(t) for piece, t in zip(pieces, tensors, strict=True)]


def own_share(sides: Sequence[int]) -> list[int]:
    """Which matrices, of these sides, this rank inverts: each rank gets as many of each size."""
    by_size = sorted(range(len(sides)), key=lambda i: (sides[i], i))
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    return sorted(by_size[rank::world])


def exchanged(
    transforms: Sequence[Tensor | None], failed: Sequence[Tensor | None], zeros: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The transforms of all ranks, and whether each failed, with one all-reduce.

    Args:
        transforms, failed: what this rank has made; None at what other ranks make.
        zeros: for each transform zeros of its shape and dtype, on its device.
    """
    made = [
        nothing if transform is None else transform
        for transform, nothing in zip(transforms, zeros, strict=True)
    ]
    none = torch.zeros((), device=zeros[0].device)
    flags = torch.stack([none if bad is None else bad.to(none) for bad in failed])
    flags, *whole = summed([flags, *made])
    return whole, list(flags.bool())
