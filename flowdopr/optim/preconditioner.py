"""From gathered sums to the matrix T of every layer: averages, inverses, reports, state."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowdopr.optim.distributed import exchange, gather_rows, shares, sum_piles
from flowdopr.optim.dual import DualCase, dual_transform
from flowdopr.optim.inverse import Form, invert
from flowdopr.optim.statistics import Pile, Statistic

MAX_TOGETHER = 2**22  # elements inverted in one call, which takes some four times their memory
logger = logging.getLogger("flowdopr.optim")


class Preconditioner:
    """Owns T of every statistic.

    form: which matrix T is.
    cov_decay: decay of the average of Sigma per refresh.
    max_nonfinite: refreshes in a row with non-finite inputs of one layer before it gives up.
    raised_damping: layer name -> damping, where more was needed than asked.
    skipped_refreshes: layer name -> number of refreshes skipped for non-finite inputs.
    """

    def __init__(
        self, statistics: list[Statistic], form: Form, cov_decay: float, max_nonfinite: int
    ):
        self.statistics, self.form = statistics, form
        self.cov_decay, self.max_nonfinite = cov_decay, max_nonfinite
        self.raised_damping: dict[str, float] = {}
        self.skipped_refreshes: dict[str, int] = {}
        self._said: set[str] = set()

    def refresh(self, piles: list[Pile], damping: float, strength: float) -> None:
        """Sum over ranks, fold finite sums into the averages and invert.

        Raises FloatingPointError after `max_nonfinite` skips in a row. One host synchronisation
        here and one in each size of matrix.
        """
        own = [(s, p) for s, p in zip(self.statistics, piles, strict=True) if s.twin is None]
        sum_piles([s for s, _ in own if not s.is_dual], [p for s, p in own if not s.is_dual])
        gather_rows([s for s, _ in own if s.is_dual], [p for s, p in own if s.is_dual])
        ran = [(s, pile) for s, pile in own if pile.count > 0]
        traces = [s.case.trace(p.sums).float() for s, p in ran if p.sums is not None]
        finite = torch.stack([t.to(traces[0].device) for t in traces]).isfinite() if ran else None
        good = [] if finite is None else finite.tolist()
        for (statistic, pile), is_finite in zip(ran, good, strict=True):
            if is_finite:
                statistic.take(pile, self.cov_decay)
                statistic.skipped_in_a_row = 0
            else:
                self._skip(statistic)
        self.invert(damping, strength, share=True)

    def invert(self, damping: float, strength: float, *, share: bool) -> None:
        """Make T from the averages as they are; `share` the work among ranks, or do it all."""
        known = [statistic for statistic in self.statistics if statistic.sigma is not None]
        self._invert_dual([s for s in known if s.is_dual], damping, strength)
        ready = [statistic for statistic in known if not statistic.is_dual]
        mine = shares([s.case.shape[-1] for s in ready]) if share else list(range(len(ready)))
        for part in _portions(mine, [math.prod(s.case.shape) for s in ready]):
            self._invert([ready[i] for i in part], damping, strength)
        if share:
            exchange(ready, mine)

    def _invert(self, part: list[Statistic], damping: float, strength: float) -> None:
        stacks = [s.case.stack(s.sigma / s.weight) for s in part if s.sigma is not None]
        scales = [s.case.mean_eigenvalue(stack) for s, stack in zip(part, stacks, strict=True)]
        inverses = invert(stacks, scales, damping, self.form, strength)
        for i, statistic in enumerate(part):
            statistic.transform = inverses.transforms[i]
            if i in inverses.raised:
                self._report_raised(statistic.name, inverses.raised[i])

    def _invert_dual(self, part: list[Statistic], damping: float, strength: float) -> None:
        """On every rank: a few small matrices are sooner factored than sent."""
        for statistic in part:
            assert statistic.sigma is not None
            assert isinstance(statistic.case, DualCase)
            statistic.transform, used = dual_transform(
                statistic.case, statistic.sigma, damping, self.form, strength
            )
            if used > damping:
                self._report_raised(statistic.name, used)

    def report_unseen(self, name: str) -> None:
        """Say once that a layer has a gradient but no statistics."""
        self._say_once(
            name,
            "has a gradient, but no refresh has seen finite inputs; GP alone until one does, or "
            "for good if its weight is used without calling the module",
        )

    def report_thawed(self, name: str) -> None:
        """Say once that a layer that was frozen when DoPr was built has a gradient."""
        self._say_once(
            name,
            "frozen when DoPr was built, trains now; GP alone, build DoPr anew after "
            "requires_grad_(True)",
        )

    def _say_once(self, name: str, what: str) -> None:
        if name not in self._said:
            self._said.add(name)
            logger.warning("layer %s: %s", name, what)

    def state_dict(self) -> dict[str, Any]:
        """ "averages": layer name -> lower triangles of the average of Sigma (dual form: the rows),
        its weight and the number of refreshes in it;
        "twins": layer name -> name of the layer whose average it uses."""
        averages = {
            statistic.name: {
                "sigma": statistic.sigma if statistic.is_dual else _pack(statistic.sigma),
                "weight": statistic.weight,
                "refreshes": statistic.refreshes,
            }
            for statistic in self.statistics
            if statistic.sigma is not None
        }
        twins = {s.name: s.twin.name for s in self.statistics if s.twin is not None}
        return {"averages": averages, "twins": twins}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the averages. Raises ValueError for a layer or a shape that is not here."""
        known = {statistic.name: statistic for statistic in self.statistics}
        averages, twins = saved["averages"], saved["twins"]
        for name in (*averages, *twins, *twins.values()):
            fits = name in known and (
                name not in averages or _fits(averages[name]["sigma"], known[name])
            )
            if not fits:
                raise ValueError(
                    f"the optimizer state has statistics of layer {name!r}, which this model lacks "
                    "or treats in another mode: load it into the model and rules it was saved with"
                )
        for statistic in self.statistics:
            entry, twin = averages.get(statistic.name), twins.get(statistic.name)
            statistic.twin = None if twin is None else known[twin]
            statistic.close()
            statistic.transform = None
            statistic.sigma = None if entry is None else _unpack(entry["sigma"], statistic)
            statistic.weight = 0.0 if entry is None else entry["weight"]
            statistic.refreshes = 0 if entry is None else entry["refreshes"]

    def _skip(self, statistic: Statistic) -> None:
        name = statistic.name
        statistic.skipped_in_a_row += 1
        self.skipped_refreshes[name] = self.skipped_refreshes.get(name, 0) + 1
        logger.warning("layer %s: inputs are not finite, refresh skipped", name)
        if statistic.skipped_in_a_row >= self.max_nonfinite:
            raise FloatingPointError(
                f"layer {name!r}: inputs were not finite on {self.max_nonfinite} refreshes in a "
                "row; lower the learning rate or check the data"
            )

    def _report_raised(self, name: str, damping: float) -> None:
        if self.raised_damping.get(name) != damping:
            logger.warning("layer %s: damping raised to %.1e to factor Sigma", name, damping)
        self.raised_damping[name] = damping


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


def _fits(saved: Tensor, statistic: Statistic) -> bool:
    groups, blocks, _, side = statistic.case.shape
    if statistic.is_dual:
        return saved.dim() == 4 and (*saved.shape[:2], saved.shape[3]) == (groups, blocks, side)
    return saved.shape == (groups, blocks, side * (side + 1) // 2)


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
