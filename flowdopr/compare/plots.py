"""The study's pictures. Each function takes the arms' summaries and gives one Figure.

An arm has one colour, marker and line everywhere: Okabe and Ito's colours, which colour-blind
readers can tell apart, and dashes for arms without activation preconditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, NullLocator, ScalarFormatter

from flowdopr.compare.formats import learning_rate
from flowdopr.compare.results import Evaluation, RunResult
from flowdopr.compare.statistics import ArmSummary, Cell

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
WIDTH, HEIGHT, DPI = 5.4, 3.8, 180

Series = list[tuple[float, float]]


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    line: Literal["-", "--"]


def looks(summaries: Sequence[ArmSummary]) -> dict[str, Look]:
    """How each arm is drawn, by arm name; beyond seven arms, marker and colour part ways."""
    found = {}
    for index, arm in enumerate(summaries):
        colour = COLOURS[index % len(COLOURS)]
        marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        found[arm.arm] = Look(colour, marker, "-" if arm.dopr else "--")
    return found


def draw_all(metric: str, summaries: Sequence[ArmSummary]) -> dict[str, Figure]:
    """Every plot that the study has numbers for, by file name without its ending."""
    figures = {
        "scatter": scatter(metric, summaries),
        "nfe": by_nfe(metric, summaries),
        "training": training(metric, summaries),
        "learning-rate": by_learning_rate(metric, summaries),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def scatter(metric: str, summaries: Sequence[ArmSummary]) -> Figure | None:
    """FD against one-step loss: one marker a run, hollow where not at the tuned learning rate."""
    figure, (axes,) = _figure(1)
    drawn = False
    for arm in summaries:
        look = looks(summaries)[arm.arm]
        for cell in arm.cells:
            face = look.colour if cell is arm.tuned else "none"
            points = [
                (run.one_step_loss, run.fd)
                for run in cell.runs
                if run.one_step_loss is not None and run.fd is not None
            ]
            for loss, fd in points:
                axes.plot(
                    loss, fd, look.marker, color=look.colour, markerfacecolor=face, markersize=8
                )
            drawn = drawn or bool(points)
    axes.set_xlabel("held-out one-step loss (lower is better)")
    axes.set_ylabel(f"{metric} of the rollouts (lower is better)")
    _log_when_wide(axes)
    _legend(axes, summaries, lines=False)
    return figure if drawn else None


def training(metric: str, summaries: Sequence[ArmSummary]) -> Figure | None:
    """One-step loss and FD over training: each arm's mean at its tuned rate, seeds thin."""
    figure, (left, right) = _figure(2)
    losses = _draw_arms(left, summaries, lambda run: _series(run.curve, _step, _loss))
    distances = _draw_arms(right, summaries, lambda run: _series(run.curve, _step, _fd))
    for axes, name in ((left, "held-out one-step loss"), (right, f"{metric} of the rollouts")):
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(name)
        _log_when_wide(axes)
    _legend(left, summaries)
    return figure if max(losses, distances) > 1 else None


def by_nfe(metric: str, summaries: Sequence[ArmSummary]) -> Figure | None:
    """FD of the last checkpoint against model calls per image."""
    figure, (axes,) = _figure(1)
    most = _draw_arms(axes, summaries, lambda run: _series(run.by_nfe, lambda e: e.nfe, _fd))
    axes.set_xscale("log")
    axes.set_xlabel("NFE: model calls per image")
    axes.set_ylabel(f"{metric} of the rollouts")
    calls = {nfe for arm in summaries for run in _runs(arm.tuned) for nfe in _calls(run)}
    _ticks_at(axes, sorted(calls), [f"{nfe:g}" for nfe in sorted(calls)])
    _log_when_wide(axes)
    _legend(axes, summaries)
    return figure if most > 1 else None


def by_learning_rate(metric: str, summaries: Sequence[ArmSummary]) -> Figure | None:
    """FD by learning rate: means as a line, each run a marker, the tuned rate filled."""
    if all(len(arm.cells) < 2 for arm in summaries):
        return None
    figure, (axes,) = _figure(1)
    for arm in summaries:
        look = looks(summaries)[arm.arm]
        means = [(cell.lr, spread.mean) for cell in arm.cells if (spread := cell.fd)]
        axes.plot(*_columns(means), look.line, color=look.colour, linewidth=2)
        for cell in arm.cells:
            face = look.colour if cell is arm.tuned else "white"
            points = [(cell.lr, run.fd) for run in cell.runs if run.fd is not None]
            axes.plot(*_columns(points), look.marker, color=look.colour, markerfacecolor=face)
    axes.set_xscale("log")
    rates = sorted({cell.lr for arm in summaries for cell in arm.cells})
    _ticks_at(axes, rates, [learning_rate(rate) for rate in rates])
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"{metric} of the rollouts")
    _log_when_wide(axes)
    _legend(axes, summaries)
    return figure


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    width = WIDTH if columns == 1 else 1.85 * WIDTH
    figure = Figure(figsize=(width, HEIGHT), dpi=DPI, layout="constrained")
    drawn = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in drawn:
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color("#9aa5b1")
        axes.tick_params(color="#9aa5b1", labelcolor="#3e4c59")
    return figure, drawn


def _draw_arms(
    axes: Axes, summaries: Sequence[ArmSummary], series_of: Callable[[RunResult], Series]
) -> int:
    """Draw each arm's seeds thinly and their mean boldly; returns the longest series' length."""
    longest = 0
    for arm in summaries:
        look = looks(summaries)[arm.arm]
        seeds = [series for run in _runs(arm.tuned) if (series := series_of(run))]
        for series in seeds:
            axes.plot(*_columns(series), color=look.colour, linewidth=0.8, alpha=0.45)
        mean = _mean(seeds)
        axes.plot(
            *_columns(mean),
            look.line,
            color=look.colour,
            marker=look.marker,
            linewidth=2,
            markersize=5,
        )
        longest = max(longest, len(mean))
    return longest


def _mean(seeds: Sequence[Series]) -> Series:
    """The mean over seeds at the places that all seeds have."""
    if not seeds:
        return []
    by_place = [dict(series) for series in seeds]
    shared = set.intersection(*(set(series) for series in by_place))
    return [(x, float(np.mean([series[x] for series in by_place]))) for x in sorted(shared)]


def _series(
    evaluations: Iterable[Evaluation],
    x: Callable[[Evaluation], float | None],
    y: Callable[[Evaluation], float | None],
) -> Series:
    pairs = [(x(evaluation), y(evaluation)) for evaluation in evaluations]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _step(evaluation: Evaluation) -> float:
    return evaluation.step


def _loss(evaluation: Evaluation) -> float | None:
    return evaluation.one_step_loss


def _fd(evaluation: Evaluation) -> float | None:
    return evaluation.fd


def _calls(run: RunResult) -> list[float]:
    return [evaluation.nfe for evaluation in run.by_nfe if evaluation.nfe is not None]


def _runs(cell: Cell | None) -> tuple[RunResult, ...]:
    return cell.runs if cell else ()


def _columns(points: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _log_when_wide(axes: Axes) -> None:
    """A logarithmic y axis, with plain numbers, when the values span a factor of five."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [[]])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 5 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.6)))


def _ticks_at(axes: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xticks(places, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes, summaries: Sequence[ArmSummary], lines: bool = True) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            linestyle=look.line if lines else "none",
            linewidth=2,
            label=arm,
        )
        for arm, look in looks(summaries).items()
    ]
    axes.legend(handles=handles, frameon=False, fontsize="small")
