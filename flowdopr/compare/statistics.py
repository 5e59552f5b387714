"""What the numbers of a study say: spreads over seeds, the tuned learning rate, paired differences.

Every number is a mean over seeds with its sample standard deviation, never a minimum. `fd` stands
for the study's rollout metric, the Frechet distance in whichever feature space (FD or FID); lower
is better, as for the one-step loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from flowdopr.compare.results import RunResult

FEWEST_SEEDS_FOR_A_CLAIM = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of n values; `sd` is None when n is 1."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Cell:
    """One arm at one learning rate: its finished runs, one a seed."""

    arm: str
    lr: float
    runs: tuple[RunResult, ...]

    def spread(self, value: Callable[[RunResult], float | None]) -> Spread | None:
        return spread(value(run) for run in self.runs)

    @property
    def fd(self) -> Spread | None:
        return self.spread(lambda run: run.fd)

    @property
    def one_step_loss(self) -> Spread | None:
        return self.spread(lambda run: run.one_step_loss)


@dataclass(frozen=True)
class ArmSummary:
    """One arm: its cells by learning rate, and the one chosen by the rollout metric."""

    arm: str
    optimizer: str
    dopr: bool
    setting: str
    cells: tuple[Cell, ...]
    tuned: Cell | None
    """The cell of the lowest mean FD among those with the most finished seeds."""
    tuned_by_loss: Cell | None
    """The cell that the mean one-step loss would have chosen instead."""


@dataclass(frozen=True)
class PairedDifference:
    """`first` minus `second` on the seeds that both finished, each at its tuned learning rate."""

    metric: str
    first: str
    second: str
    by_seed: dict[int, float]
    mean: float
    sd: float | None
    low: float | None
    """Lower end of the 95 % t-interval of the mean difference; None for a single seed."""
    high: float | None

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def enough_seeds(self) -> bool:
        return self.n >= FEWEST_SEEDS_FOR_A_CLAIM

    @property
    def shown(self) -> bool:
        """Whether there are seeds enough and the interval leaves out zero."""
        if not self.enough_seeds or self.low is None or self.high is None:
            return False
        return self.low > 0 or self.high < 0


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are there; None when none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Spread(float(np.mean(known)), sd, len(known))


def summarise(runs: Sequence[RunResult]) -> list[ArmSummary]:
    """One summary an arm, in the order in which the arms first occur in `runs`."""
    arms = dict.fromkeys(run.arm for run in runs)
    return [_summarise_arm([run for run in runs if run.arm == arm]) for arm in arms]


def _summarise_arm(runs: list[RunResult]) -> ArmSummary:
    first = runs[0]
    cells = []
    for lr in sorted({run.lr for run in runs}):
        done = tuple(run for run in runs if run.lr == lr and run.done)
        cells.append(Cell(first.arm, lr, done))
    # A learning rate at which seeds failed must not win by the seeds that survived.
    most = max(len(cell.runs) for cell in cells)
    eligible = [cell for cell in cells if cell.runs and len(cell.runs) == most]
    return ArmSummary(
        arm=first.arm,
        optimizer=first.optimizer,
        dopr=first.dopr,
        setting=first.setting,
        cells=tuple(cells),
        tuned=_lowest(eligible, lambda cell: cell.fd),
        tuned_by_loss=_lowest(eligible, lambda cell: cell.one_step_loss),
    )


def _lowest(cells: list[Cell], metric: Callable[[Cell], Spread | None]) -> Cell | None:
    known = [(value.mean, cell) for cell in cells if (value := metric(cell)) is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def paired_difference(
    metric: str, first: Cell, second: Cell, value: Callable[[RunResult], float | None]
) -> PairedDifference | None:
    """`value` of `first` minus `second` by seed; None when they share no finished seed."""
    of_first = {run.seed: value(run) for run in first.runs}
    of_second = {run.seed: value(run) for run in second.runs}
    by_seed = {}
    for seed in sorted(of_first.keys() & of_second.keys()):
        one, other = of_first[seed], of_second[seed]
        if one is not None and other is not None:
            by_seed[seed] = one - other
    found = spread(by_seed.values())
    if found is None:
        return None
    low, high = t_interval(found)
    return PairedDifference(metric, first.arm, second.arm, by_seed, found.mean, found.sd, low, high)


def t_interval(found: Spread) -> tuple[float | None, float | None]:
    """Student's t-interval of the mean at `CONFIDENCE`; (None, None) for a single value."""
    if found.sd is None:
        return None, None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, found.n - 1) * found.sd / math.sqrt(found.n)
    return found.mean - float(half), found.mean + float(half)


def matched_pairs(summaries: Sequence[ArmSummary]) -> list[tuple[ArmSummary, ArmSummary]]:
    """Each arm with activation preconditioning beside the arm of the same optimizer without.

    Two arms pair up when they have one optimizer, with DoPr and without, and share every setting
    outside the section `optimizer`.
    """
    return [
        (first, second)
        for first in summaries
        for second in summaries
        if (first.dopr, second.dopr) == (True, False)
        and (first.optimizer, first.setting) == (second.optimizer, second.setting)
    ]
