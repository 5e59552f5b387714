"""What DoPr needs of several processes: one sum of everything, in one fixed order.

Every rank puts every statistic into the bucket, zeros where a layer did not run there, so that
the collective is the same on all ranks whatever gradients are present.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from flowdopr.optim.moments import Pile, Statistic
from flowdopr.optim.record import vector
from flowdopr.optim.world import summed, world_size

Pooled = tuple[list[Statistic], list[Tensor], Tensor]  # who, sums, and (n,) numbers of rows


def sum_piles(statistics: Sequence[Statistic], piles: Sequence[Pile]) -> Pooled:
    """Sums and numbers of rows over all ranks, with one all-reduce.

    One rank leaves out what did not run; of several, each has zeros to give for it, and none
    knows whether others have more.
    """
    if world_size() > 1 and statistics:
        for statistic, pile in zip(statistics, piles, strict=True):
            if pile.sums is None:
                shape, dtype = statistic.case.shape, statistic.dtype
                pile.sums = torch.zeros(shape, dtype=dtype, device=statistic.device)
    ran, sums, counts = _with_rows(statistics, piles)
    if ran:
        counts, *sums = summed([counts, *sums])
    return ran, sums, counts


def gather_rows(statistics: Sequence[Statistic], piles: Sequence[Pile]) -> Pooled:
    """The rows of all ranks and their numbers, for layers in the dual form.

    Ranks with fewer rows than others send zeros after them, which add nothing to Z^T Z. They wait
    to agree on how many.
    """
    if world_size() > 1 and statistics:
        widths = [0 if pile.sums is None else pile.sums.shape[2] for pile in piles]
        sizes = torch.tensor([widths, [pile.count for pile in piles]], device=statistics[0].device)
        every = [torch.empty_like(sizes) for _ in range(world_size())]
        dist.all_gather(every, sizes)
        by_rank = torch.stack(every)
        most, total = by_rank[:, 0].amax(0).tolist(), by_rank[:, 1].sum(0).tolist()
        for statistic, pile, width, count in zip(statistics, piles, most, total, strict=True):
            if count > 0:
                pile.sums, pile.count = _gathered(statistic, pile.sums, width), count
    return _with_rows(statistics, piles)


def _with_rows(statistics: Sequence[Statistic], piles: Sequence[Pile]) -> Pooled:
    ran = [(s, p, p.sums) for s, p in zip(statistics, piles, strict=True) if p.sums is not None]
    if not ran:
        return [], [], torch.empty(0)
    first = ran[0][0]
    counts = vector([pile.count for _, pile, _ in ran], first.device, first.dtype)
    return [statistic for statistic, _, _ in ran], [sums for _, _, sums in ran], counts


def _gathered(statistic: Statistic, rows: Tensor | None, width: int) -> Tensor:
    """The rows of all ranks, `width` of each."""
    groups, _, _, side = statistic.case.shape
    shape = (groups, 1, width, side)
    padded = torch.zeros(shape, dtype=statistic.dtype, device=statistic.device)
    if rows is not None:
        padded[:, :, : rows.shape[2]] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat(parts, 2)


def shares(sides: Sequence[int]) -> list[int]:
    """Which matrices, of these sides, this rank factors: every rank as many of each size."""
    by_size = sorted(range(len(sides)), key=lambda i: (sides[i], i))
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    return sorted(by_size[rank::world])


def exchange(
    statistics: Sequence[Statistic], failed: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Give every rank the transforms that the others have made, and whether these failed, with one
    all-reduce. What this rank has made has an entry in `failed`."""
    if world_size() == 1 or not statistics:
        return failed
    made = [
        torch.zeros(s.case.transform_shape, dtype=s.dtype, device=s.device)
        if bad is None or s.transform is None
        else s.transform
        for s, bad in zip(statistics, failed, strict=True)
    ]
    none = torch.zeros((), device=statistics[0].device)
    flags = torch.stack([none if bad is None else bad.to(none) for bad in failed])
    flags, *transforms = summed([flags, *made])
    for statistic, whole in zip(statistics, transforms, strict=True):
        statistic.transform = whole
    return list(flags.bool())
