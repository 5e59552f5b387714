"""What DoPr needs of several processes: one sum of everything, in one fixed order.

Every rank puts every statistic into the bucket, zeros where a layer did not run there, so that
the collective is the same on all ranks whatever gradients are present.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from flowdopr.optim.statistics import Pile, Statistic
from flowdopr.optim.world import summed, world_size


def sum_piles(statistics: list[Statistic], piles: list[Pile]) -> None:
    """Add sums and counts over all ranks, in place, with one all-reduce."""
    if world_size() == 1 or not statistics:
        return
    for statistic, pile in zip(statistics, piles, strict=True):
        if pile.sums is None:
            pile.sums = torch.zeros(
                statistic.case.shape, dtype=statistic.dtype, device=statistic.device
            )
    own = [pile.sums for pile in piles if pile.sums is not None]
    counts = torch.tensor([pile.count for pile in piles], dtype=own[0].dtype, device=own[0].device)
    counts, *totals = summed([counts, *own])
    for pile, count, total in zip(piles, counts.tolist(), totals, strict=True):
        pile.count = int(count)
        pile.sums = total if pile.count else None


def gather_rows(statistics: list[Statistic], piles: list[Pile]) -> None:
    """Give every rank the rows of all ranks, in place, for layers in the dual form.

    Ranks with fewer rows than others send zeros after them, which add nothing to Z^T Z.
    """
    if world_size() == 1 or not statistics:
        return
    widths = [0 if pile.sums is None else pile.sums.shape[2] for pile in piles]
    sizes = torch.tensor([widths, [pile.count for pile in piles]], device=statistics[0].device)
    every = [torch.empty_like(sizes) for _ in range(world_size())]
    dist.all_gather(every, sizes)
    by_rank = torch.stack(every)
    most, total = by_rank[:, 0].amax(0).tolist(), by_rank[:, 1].sum(0).tolist()
    for statistic, pile, width, count in zip(statistics, piles, most, total, strict=True):
        if count == 0:
            continue
        groups, _, _, side = statistic.case.shape
        padded = torch.zeros(
            (groups, 1, width, side), dtype=statistic.dtype, device=statistic.device
        )
        if pile.sums is not None:
            padded[:, :, : pile.sums.shape[2]] = pile.sums
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
    own = set(mine)
    made = [
        s.transform
        if i in own and s.transform is not None
        else torch.zeros(s.case.transform_shape, dtype=s.dtype, device=s.device)
        for i, s in enumerate(statistics)
    ]
    for statistic, whole in zip(statistics, summed(made), strict=True):
        statistic.transform = whole
