"""The plots of a study. Each function returns a figure, or None if it has no numbers to draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, NullLocator, ScalarFormatter

from flowdopr.compare.formats import learning_rate
from flowdopr.compare.results import Evaluation, RunResult
from flowdopr.compare.study import Study

WIDTH, HEIGHT, DPI = 5.4, 3.8, 180

Series = list[tuple[float, float]]


def draw_all(study: Study) -> dict[str, Figure]:
    """Every plot that the study has numbers for, by file name without its ending."""
    figures = {
        "scatter": scatter(study),
        "nfe": by_nfe(study),
        "training": training(study),
        "spectrum": spectrum(study),
        "loss-by-time": loss_by_time(study),
        "learning-rate": by_learning_rate(study),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def scatter(study: Study) -> Figure | None:
    """FD against one-step loss: a marker for each run, hollow if it is not reported, and a line for
    the training of each reported run."""
    figure, (axes,) = _figure(1)
    drawn = False
    for arm in study.arms:
        style = study.styles[arm.name]
        for trial in arm.every_trial:
            face = style.colour if trial == arm.tuned else "none"
            points = _series([run.final for run in trial.runs if run.final], "one_step_loss", "fd")
            x, y = _columns(points)
            axes.plot(x, y, style.marker, color=style.colour, markerfacecolor=face, markersize=8)
            drawn = drawn or bool(points)
        for run in arm.reported.runs:
            x, y = _columns(_series(run.curve, "one_step_loss", "fd"))
            axes.plot(x, y, color=style.colour, linewidth=0.8, alpha=0.45)
    rollouts = f"{study.metric} of the rollouts (lower is better)"
    _label(axes, "held-out one-step loss (lower is better)", rollouts)
    _legend(axes, study, lines=False)
    return figure if drawn else None


def training(study: Study) -> Figure | None:
    """One-step loss and FD over training: each arm's mean at its tuned rate, seeds thin."""
    figure, (left, right) = _figure(2)
    losses = _draw_arms(left, study, lambda run: _series(run.curve, "step", "one_step_loss"))
    distances = _draw_arms(right, study, lambda run: _series(run.curve, "step", "fd"))
    _label(left, "optimizer steps", "held-out one-step loss")
    _label(right, "optimizer steps", f"{study.metric} of the rollouts")
    _legend(left, study)
    return figure if max(losses, distances) > 1 else None


def by_nfe(study: Study) -> Figure | None:
    """FD of the last checkpoint against model calls per image, a panel for each solver."""
    every = [one for arm in study.arms for run in arm.reported.runs for one in run.by_nfe]
    solvers = list(dict.fromkeys(one.solver for one in every))
    calls = sorted({one.nfe for one in every if one.nfe is not None})
    if len(calls) < 2:
        return None
    figure, panels = _figure(len(solvers))
    for axes, solver in zip(panels, solvers, strict=True):
        _draw_arms(axes, study, lambda run, solver=solver: _of_solver(run, solver))
        axes.set_xscale("log")
        _ticks_at(axes, calls, [f"{nfe:g}" for nfe in calls])
        _label(axes, "NFE: model calls per image", f"{study.metric} of the rollouts")
        if len(solvers) > 1:
            axes.set_title(solver, fontsize="medium")
    _legend(panels[0], study)
    return figure


def _of_solver(run: RunResult, solver: str) -> Series:
    return _series([one for one in run.by_nfe if one.solver == solver], "nfe", "fd")


def spectrum(study: Study) -> Figure | None:
    """Variance of the rollouts over the data's along groups of principal directions."""
    figure, (axes,) = _figure(1)
    most = _draw_arms(axes, study, lambda run: _numbered(run.final.spectrum if run.final else ()))
    floor = next((run.floor for run in study.runs if run.floor and run.floor.spectrum), None)
    if floor is not None:
        axes.plot(*_columns(_numbered(floor.spectrum)), ":", color="#52606d", label="real images")
    axes.axhline(1, color="#9aa5b1", linewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.6)))
    axes.set_xlabel("groups of principal directions, by falling variance of the data")
    axes.set_ylabel("variance of rollouts / of data")
    _legend(axes, study)
    return figure if most > 1 else None


def loss_by_time(study: Study) -> Figure | None:
    """Each reported arm's one-step loss in each bin of time, over the mean of the arms there."""
    found = {}
    for arm in study.arms:
        runs = [run.final for run in arm.reported.runs if run.final]
        lists = [(run.one_step_loss_by_time, run.one_step_loss_by_time_se) for run in runs]
        values = np.array([pair for pair in lists if pair[0] and pair[1]], dtype=float)
        if len(values):
            found[arm.name] = values.mean(0)  # (2, bins)
    if not found:
        return None
    figure, (axes,) = _figure(1)
    mean = np.mean([losses for losses, _ in found.values()], axis=0)
    middles = (np.arange(len(mean)) + 0.5) / len(mean)
    for number, (name, (losses, errors)) in enumerate(found.items()):
        style, shift = study.styles[name], 0.006 * (number - (len(found) - 1) / 2)
        look: dict[str, Any] = {
            "color": style.colour,
            "marker": style.marker,
            "linestyle": style.line,
        }
        axes.errorbar(middles + shift, losses / mean, 2 * errors / mean, **look, markersize=4)
    axes.set_xlabel("time t, from noise to data")
    axes.set_ylabel("one-step loss / mean of the arms")
    _legend(axes, study)
    return figure


def by_learning_rate(study: Study) -> Figure | None:
    """FD by learning rate: the best mean at each rate as a line, each run a marker, filled in the
    chosen trial."""
    if all(len(arm.trials) < 2 for arm in study.arms):
        return None
    figure, (axes,) = _figure(1)
    for arm in study.arms:
        style, best = study.styles[arm.name], {}
        for trial in arm.trials:
            if spread := trial.spread("fd"):
                best[trial.lr] = min(spread.mean, best.get(trial.lr, spread.mean))
            face = style.colour if trial == arm.chosen else "white"
            points = [(trial.lr, fd) for run in trial.runs if (fd := run.value("fd")) is not None]
            axes.plot(*_columns(points), style.marker, color=style.colour, markerfacecolor=face)
        axes.plot(*_columns(list(best.items())), style.line, color=style.colour, linewidth=2)
    axes.set_xscale("log")
    rates = sorted({trial.lr for arm in study.arms for trial in arm.trials})
    _ticks_at(axes, rates, [learning_rate(rate) for rate in rates])
    _label(axes, "learning rate", f"{study.metric} of the rollouts")
    _legend(axes, study)
    return figure


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    width = WIDTH if columns == 1 else 0.925 * columns * WIDTH
    figure = Figure(figsize=(width, HEIGHT), dpi=DPI, layout="constrained")
    all_axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in all_axes:
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color("#9aa5b1")
        axes.tick_params(color="#9aa5b1", labelcolor="#3e4c59")
    return figure, all_axes


def _draw_arms(axes: Axes, study: Study, series_of: Callable[[RunResult], Series]) -> int:
    """Draw each arm's seeds thinly and their mean boldly; returns the longest series' length."""
    longest = 0
    for arm in study.arms:
        style = study.styles[arm.name]
        seeds = [series for run in arm.reported.runs if (series := series_of(run))]
        for series in seeds:
            axes.plot(*_columns(series), color=style.colour, linewidth=0.8, alpha=0.45)
        mean = _mean(seeds)
        bold = {"color": style.colour, "marker": style.marker, "linewidth": 2, "markersize": 5}
        axes.plot(*_columns(mean), style.line, **bold)
        longest = max(longest, len(mean))
    return longest


def _mean(seeds: Sequence[Series]) -> Series:
    """The mean over seeds at each x that all seeds have."""
    if not seeds:
        return []
    values = [dict(series) for series in seeds]
    shared = set(values[0]).intersection(*values)
    return [(x, float(np.mean([series[x] for series in values]))) for x in sorted(shared)]


def _series(evaluations: Iterable[Evaluation], x: str, y: str) -> Series:
    """The fields `x` and `y` of the evaluations that have both."""
    pairs = [(getattr(one, x), getattr(one, y)) for one in evaluations]
    return [pair for pair in pairs if None not in pair]


def _numbered(values: Iterable[float | None]) -> Series:
    return [(number, value) for number, value in enumerate(values, 1) if value is not None]


def _columns(points: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _label(axes: Axes, x: str, y: str) -> None:
    """Name the axes; y becomes logarithmic, with plain numbers, if it spans a factor of five."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [[]])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 5 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.6)))


def _ticks_at(axes: Axes, positions: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xticks(positions, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes, study: Study, lines: bool = True) -> None:
    handles = []
    for arm, style in study.styles.items():
        line = {"linestyle": style.line if lines else "none", "linewidth": 2}
        handles.append(Line2D([], [], color=style.colour, marker=style.marker, label=arm, **line))
    axes.legend(handles=handles, frameon=False, fontsize="small")
