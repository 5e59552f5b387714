"""From gathered sums to the matrix T of every layer: averages, inverses, reports, state."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowdopr.optim.distributed import exchange, gather_rows, shares, sum_piles
from flowdopr.optim.dual import DualCase, dual_transform
from flowdopr.optim.inverse import Form, invert, smallest_pivot
from flowdopr.optim.moments import Pile, Statistic, records_of, store_records
from flowdopr.optim.news import News
from flowdopr.optim.record import Record, vector

MAX_TOGETHER = 2**22  # elements inverted in one call, which takes some four times their memory


class Preconditioner:
    """Owns T of every statistic.

    form: which matrix T is.
    cov_decay: decay of the average of Sigma per refresh.
    max_nonfinite: refreshes in a row with non-finite inputs of one layer before it gives up.
    news: what refreshes have to report.
    """

    def __init__(
        self, statistics: list[Statistic], form: Form, cov_decay: float, max_nonfinite: int
    ) -> None:
        self.statistics, self.form, self.cov_decay = statistics, form, cov_decay
        self.news = News(max_nonfinite)

    def refresh(self, piles: list[Pile], damping: float, strength: float) -> None:
        """Sum over ranks, fold finite sums into the averages and invert.

        The host does not wait: what the last refresh had to report is told now. Raises
        FloatingPointError if that was the last of `max_nonfinite` skips in a row.
        """
        self.news.tell_and_stop()
        own = [(s, p) for s, p in zip(self.statistics, piles, strict=True) if s.twin is None]
        plain, dual = ([pair for pair in own if pair[0].is_dual == rows] for rows in (False, True))
        self._fold(*sum_piles(*_unzip(plain)), self.cov_decay)
        self._fold(*gather_rows(*_unzip(dual)), 0.0)
        known = self._known()
        if known:
            now = records_of(known)
            store_records(known, now._replace(damping=now.least_damping.clamp_min(damping)))
            self.invert(strength, share=True)
            self.news.send(known)

    def _fold(
        self, statistics: list[Statistic], sums: list[Tensor], counts: Tensor, cov_decay: float
    ) -> None:
        """Fold sums of (n,) `counts` rows into the averages, but for those that are not finite.

        At a layer's refresh k, from 0, the decay is min(cov_decay, (1 + k) / (10 + k)): inputs
        change fastest at the start of training, and a long memory of them would mislead.
        """
        if not statistics:
            return
        old = records_of(statistics)
        traces = [s.case.trace(x).to(old.weight) for s, x in zip(statistics, sums, strict=True)]
        ran = counts > 0
        good = ran & torch.stack(traces).isfinite()
        decay = ((1 + old.refreshes) / (10 + old.refreshes)).clamp_max(cov_decay)
        keep, share = torch.where(good, decay, 1.0), torch.where(good, 1 - decay, 0.0)
        kept = [s.can_keep(x) for s, x in zip(statistics, sums, strict=True)]
        if not all(kept):
            keep = keep * vector(kept, keep.device, keep.dtype)
        parts = zip(good, keep, share, counts.clamp_min(1), strict=True)
        for statistic, batch, part in zip(statistics, sums, parts, strict=True):
            statistic.take(batch, *(number.to(batch.device) for number in part))
        now = old._replace(
            weight=keep * old.weight + share,
            refreshes=old.refreshes + good,
            skipped=old.skipped + (ran & ~good),
            in_a_row=torch.where(good, 0.0, old.in_a_row + ran),
        )
        store_records(statistics, now)

    def _known(self) -> list[Statistic]:
        """Those with an average, be it of nothing, the dual ones last."""
        known = [statistic for statistic in self.statistics if statistic.sigma is not None]
        return sorted(known, key=lambda statistic: statistic.is_dual)

    def invert(self, strength: float, *, share: bool) -> None:
        """Make T from the averages and dampings as they are; `share` the work among ranks, or do
        it all. T of an average of nothing is the identity."""
        known = self._known()
        dual = [statistic for statistic in known if statistic.is_dual]
        ready = [statistic for statistic in known if not statistic.is_dual]
        if not known:
            return
        mine = shares([s.case.shape[-1] for s in ready]) if share else list(range(len(ready)))
        failed: list[Tensor | None] = [None] * len(ready)
        for part in _portions(mine, [math.prod(s.case.shape) for s in ready]):
            flags = self._invert([ready[i] for i in part], strength)
            for i, flag in zip(part, flags, strict=True):
                failed[i] = flag
        found = [
            *(exchange(ready, failed) if share else failed),
            *self._invert_dual(dual, strength),
        ]
        now = records_of(known)
        bad = torch.stack([flag.to(now.weight.device) for flag in found if flag is not None])
        more = (10 * now.damping).clamp_min(smallest_pivot(now.damping.dtype))
        raised = torch.where(bad, more, now.least_damping)
        store_records(known, now._replace(least_damping=raised))

    def _invert(self, part: list[Statistic], strength: float) -> list[Tensor]:
        weights, gammas = _weights_and_dampings(part)
        stacks = [
            s.case.stack(s.sigma / weight.to(s.sigma.device))
            for s, weight in zip(part, weights, strict=True)
            if s.sigma is not None
        ]
        scales = [s.case.mean_eigenvalue(stack) for s, stack in zip(part, stacks, strict=True)]
        transforms, failed = invert(stacks, scales, gammas, self.form, strength)
        for statistic, transform in zip(part, transforms, strict=True):
            statistic.transform = transform
        return failed

    def _invert_dual(self, part: list[Statistic], strength: float) -> list[Tensor]:
        """On every rank: a few small matrices are sooner factored than sent."""
        failed = []
        _, gammas = _weights_and_dampings(part) if part else ((), ())
        for statistic, gamma in zip(part, gammas, strict=True):
            rows = statistic.sigma
            assert rows is not None
            assert isinstance(statistic.case, DualCase)
            statistic.transform, bad = dual_transform(
                statistic.case, rows, gamma.to(rows), self.form, strength
            )
            failed.append(bad)
        return failed

    def records(self) -> dict[str, Record]:
        """Layer name -> its numbers now, on the host, which waits for them."""
        kept = {s.name: s.record for s in self.statistics if s.record is not None}
        return {name: Record(*numbers.tolist()) for name, numbers in kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """ "averages": layer name -> lower triangles of the average of Sigma (dual form: the rows)
        and the numbers of its Record;
        "twins": layer name -> name of the layer whose average it uses."""
        self.news.tell()
        averages, records = {}, self.records()
        for statistic in self.statistics:
            numbers = records.get(statistic.name)
            if statistic.sigma is None or numbers is None:
                continue
            if numbers.weight or numbers.skipped:  # else it ran on no rank
                sigma = statistic.sigma if statistic.is_dual else _pack(statistic.sigma)
                averages[statistic.name] = {"sigma": sigma, **numbers._asdict()}
        twins = {s.name: s.twin.name for s in self.statistics if s.twin is not None}
        return {"averages": averages, "twins": twins}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the averages. Raises ValueError for a layer or a shape that is not here."""
        known = {statistic.name: statistic for statistic in self.statistics}
        averages, twins = saved["averages"], saved["twins"]
        for name in (*averages, *twins, *twins.values()):
            fits = name in known and (name not in averages or _fits(averages[name], known[name]))
            if not fits:
                raise ValueError(
                    f"the optimizer state has statistics of layer {name!r}, which this model lacks "
                    "or treats in another mode: load it into the model, the rules and the "
                    "version of flowdopr that it was saved with"
                )
        for statistic in self.statistics:
            entry, twin = averages.get(statistic.name), twins.get(statistic.name)
            statistic.twin = None if twin is None else known[twin]
            statistic.close()
            statistic.transform = None
            statistic.sigma = None if entry is None else _unpack(entry["sigma"], statistic)
            statistic.record = None
            if entry is not None:
                numbers = [entry[field] for field in Record._fields]
                statistic.record = torch.tensor(
                    numbers, dtype=statistic.dtype, device=statistic.device
                )
        self.news.start_from(self.records())


def _unzip(pairs: list[tuple[Statistic, Pile]]) -> tuple[list[Statistic], list[Pile]]:
    return [statistic for statistic, _ in pairs], [pile for _, pile in pairs]


def _weights_and_dampings(part: list[Statistic]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What to divide each average by, and its gamma: both 1 for an average of nothing, zeros."""
    now = records_of(part)
    some = now.weight > 0
    return (
        torch.where(some, now.weight, 1.0).unbind(),
        torch.where(some, now.damping, 1.0).unbind(),
    )


def _portions(numbers: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """`numbers` in order of their sizes, cut so that each part stays near MAX_TOGETHER."""
    part: list[int] = []
    for number in sorted(numbers, key=lambda i: (sizes[i], i)):
        if part and sum(sizes[i] for i in part) + sizes[number] > MAX_TOGETHER:
            yield part
            part = []
        part.append(number)
    if part:
        yield part


def _fits(saved: dict[str, Any], statistic: Statistic) -> bool:
    sigma, (groups, blocks, _, side) = saved["sigma"], statistic.case.shape
    if not saved.keys() >= set(Record._fields):
        return False
    if statistic.is_dual:
        return sigma.dim() == 4 and (*sigma.shape[:2], sigma.shape[3]) == (groups, blocks, side)
    return sigma.shape == (groups, blocks, side * (side + 1) // 2)


def _pack(sigma: Tensor) -> Tensor:
    """The lower triangles of (G, B, s, s), all that the inversion reads, as (G, B, s(s+1)/2)."""
    rows, columns = torch.tril_indices(*sigma.shape[-2:], device=sigma.device)
    return sigma[:, :, rows, columns]


def _unpack(packed: Tensor, statistic: Statistic) -> Tensor:
    if statistic.is_dual:
        return packed.to(statistic.device, statistic.dtype)
    sigma = torch.zeros(statistic.case.shape, dtype=statistic.dtype, device=statistic.device)
    rows, columns = torch.tril_indices(*sigma.shape[-2:], device=sigma.device)
    sigma[:, :, rows, columns] = packed.to(sigma)
    return sigma
