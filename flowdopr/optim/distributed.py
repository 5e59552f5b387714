"""What DoPr needs of several processes: one sum of everything, in one fixed order.

Every rank puts every statistic into the bucket, zeros where a layer did not run there, so that
the collective is the same on all ranks whatever gradients are present.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from flowdopr.optim.statistics import Pile, Statistic


def world_size() -> int:
    """Number of processes that share the training; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_piles(statistics: list[Statistic], piles: list[Pile]) -> None:
    """Add sums and counts over all ranks, in place, with one all-reduce."""
    if world_size() == 1 or not statistics:
        return
    device = statistics[0].device
    dtype = max((s.dtype for s in statistics), key=lambda kind: torch.finfo(kind).bits)
    parts = [torch.tensor([pile.count for pile in piles], dtype=dtype, device=device)]
    for statistic, pile in zip(statistics, piles, strict=True):
        if pile.sums is None:
            pile.sums = torch.zeros(
                statistic.case.shape, dtype=statistic.dtype, device=statistic.device
            )
        parts.append(pile.sums.flatten().to(device, dtype))
    bucket = torch.cat(parts)
    dist.all_reduce(bucket)
    counts, *sums = bucket.split([len(piles)] + [part.numel() for part in parts[1:]])
    for pile, count, total in zip(piles, counts.tolist(), sums, strict=True):
        assert pile.sums is not None
        pile.sums.copy_(total.view_as(pile.sums))
        pile.count = int(count)
        if pile.count == 0:
            pile.sums = None


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor (DTensor) that this process holds; others unchanged."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
