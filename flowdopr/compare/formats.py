"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from flowdopr.compare.statistics import Spread, TrialSummary

NONE = "–"


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, never in powers of ten between 1e-4 and 1e6."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return str(value)
    shown = f",.{_decimals(value, digits)}f" if _plain(value) else f".{digits - 1}e"
    return format(value, shown).replace("-", "−")


def mean_sd(spread: Spread | None, digits: int = 4) -> str:
    """`12.34 ± 0.56`: the deviation to as many decimals as the mean; alone when n is 1."""
    if spread is None:
        return NONE
    if spread.sd is None or not math.isfinite(spread.sd) or not _plain(spread.mean):
        return number(spread.mean, digits)
    return f"{number(spread.mean, digits)} ± {spread.sd:,.{_decimals(spread.mean, digits)}f}"


def percent(spread: Spread | None) -> str:
    if spread is None:
        return NONE
    deviation = "" if spread.sd is None else f" ± {100 * spread.sd:.1f}"
    return f"{100 * spread.mean:.1f}{deviation} %"


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def memory(value: float | None) -> str:
    """Bytes as MiB or GiB."""
    if value is None:
        return NONE
    mebibytes = value / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def tried(trial: TrialSummary) -> str:
    """The settings of a trial, the learning rate first: `0.02, damping 1`."""
    searched = [f"{key.rpartition('.')[2]} {value}" for key, value in trial.plan.searched.items()]
    return ", ".join([learning_rate(trial.lr) if trial.runs else NONE, *searched])


def learning_rate(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


def count(number: int, thing: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def when(time: str) -> str:
    """An ISO time in UTC to the minute: `2026-03-14 15:09 UTC`."""
    return f"{time[:16].replace('T', ' ')} UTC"


def distinct(values: Iterable[str]) -> str:
    """The one value of all runs, or the different ones side by side."""
    return " | ".join(dict.fromkeys(value for value in values if value))


def listing(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def _plain(value: float) -> bool:
    return value == 0 or 1e-4 <= abs(value) < 1e6


def _decimals(value: float, digits: int) -> int:
    leading = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value
    return max(0, digits - 1 - leading)
