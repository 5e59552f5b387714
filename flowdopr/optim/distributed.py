"""What DoPr needs of several processes: one sum of everything, in one fixed order.

Every rank puts every statistic into the bucket, zeros where a layer did not run there, so that
the collective is the same on all ranks whatever gradients are present.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from flowdopr.optim.statistics import Pile, Statistic
from flowdopr.optim.world import world_size


def sum_piles(statistics: list[Statistic], piles: list[Pile]) -> None:
    """Add sums and counts over all ranks, in place, with one all-reduce."""
    if world_size() == 1 or not statistics:
        return
    device = statistics[0].device
    dtype = _widest([statistic.dtype for statistic in statistics])
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


def gather_rows(statistics: list[Statistic], piles: list[Pile]) -> None:
    """Give every rank the rows of all ranks, in place, for layers in the dual form.

    Ranks with fewer rows than others send zeros after them, which add nothing to Z^T Z.
    """
    if world_size() == 1 or not statistics:
        return
    counts = torch.tensor([pile.count for pile in piles], device=statistics[0].device)
    every = [torch.empty_like(counts) for _ in range(world_size())]
    dist.all_gather(every, counts)
    by_rank = torch.stack(every)
    most, total = by_rank.amax(0).tolist(), by_rank.sum(0).tolist()
    for statistic, pile, width, count in zip(statistics, piles, most, total, strict=True):
        if count == 0:
            continue
        groups, _, _, side = statistic.case.shape
        padded = torch.zeros(
            (groups, 1, width, side), dtype=statistic.dtype, device=statistic.device
        )
        if pile.sums is not None:
            padded[:, :, : pile.count] = pile.sums
        parts = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded)
        pile.sums, pile.count = torch.cat(parts, 2), count


def shares(sides: Sequence[int]) -> list[int]:
    """Which matrices, of these sides, this rank factors: every rank as many of each size."""
    by_size = sorted(range(len(sides)), key=lambda i: (sides[i], i))
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    return sorted(by_size[rank::world])


def exchange(statistics: list[Statistic], mine: Sequence[int]) -> None:
    """Give every rank the transforms that the others have made, with one all-reduce."""
    if world_size() == 1 or not statistics:
        return
    device, dtype = statistics[0].device, _widest([s.dtype for s in statistics])
    own = set(mine)
    shapes = [s.case.transform_shape for s in statistics]
    made = [
        s.transform.flatten().to(device, dtype)
        if i in own and s.transform is not None
        else torch.zeros(math.prod(shapes[i]), dtype=dtype, device=device)
        for i, s in enumerate(statistics)
    ]
    bucket = torch.cat(made)
    dist.all_reduce(bucket)
    parts = bucket.split([math.prod(shape) for shape in shapes])
    for statistic, shape, part in zip(statistics, shapes, parts, strict=True):
        statistic.transform = part.view(shape).to(statistic.device, statistic.dtype)


def _widest(kinds: Sequence[torch.dtype]) -> torch.dtype:
    return max(kinds, key=lambda kind: torch.finfo(kind).bits)
