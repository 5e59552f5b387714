"""The plots of a study. Each function returns a figure, or None if it has no numbers to draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from flowdopr.compare.formats import learning_rate
from flowdopr.compare.matched import points_of, shared_losses
from flowdopr.compare.results import Evaluation, RunResult
from flowdopr.compare.statistics import ArmSummary, matched_pairs
from flowdopr.compare.study import Study

WIDTH, HEIGHT, DPI = 5.4, 3.8, 180
LEGEND_ROW = 0.2  # inches

Series = list[tuple[float, float]]


def draw_all(study: Study) -> dict[str, Figure]:
    """Every plot that the study has numbers for, by file name without its ending."""
    figures = {
        "scatter": scatter(study),
        **by_nfe(study),
        **training(study),
        "fd-by-images": by_images(study),
        "spectrum": spectrum(study),
        "loss-by-time": loss_by_time(study),
        "learning-rate": by_learning_rate(study),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def scatter(study: Study) -> Figure | None:
    """FD against one-step loss: a marker for each run, hollow if it is not reported, and a line for
    the training of each reported run. Below, for each pair, the losses that both reached."""
    figure, axes = _figure()
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
            x, y = _columns(_series(_over_training(run), "one_step_loss", "fd"))
            axes.plot(x, y, style.line, color=style.colour, linewidth=0.8, alpha=0.6)
    rollouts = f"{study.metric} of the rollouts (lower is better)"
    _label(axes, "held-out one-step loss (lower is better)", rollouts)
    _legend(axes, study, lines=False)
    _mark_shared_losses(figure, axes, study)
    return figure if drawn else None


def _mark_shared_losses(figure: Figure, axes: Axes, study: Study) -> None:
    """A strip below `axes` with a bar for each pair of arms, from the lowest to the highest loss
    over which their ratio at equal loss is averaged (the mean over seeds)."""
    pairs = [(*pair, span) for pair in matched_pairs(study.arms) if (span := _shared(*pair))]
    if not pairs:
        return
    height = 0.2 * (len(pairs) + 1)  # inches
    figure.set_figheight(figure.get_figheight() + height)
    grid = figure.add_gridspec(2, 1, height_ratios=[HEIGHT - 0.3, height])
    axes.set_subplotspec(grid[0])
    strip = figure.add_subplot(grid[1], sharex=axes)
    strip.axis("off")
    strip.set_title("losses that both arms of a pair reached", fontsize="small", color="#3e4c59")
    strip.set_ylim(len(pairs) - 0.4, -0.6)
    for row, (first, second, span) in enumerate(pairs):
        strip.plot(span, (row, row), color="#52606d", linewidth=1.5, zorder=1)
        for arm, loss in zip((first, second), span, strict=True):
            style = study.styles[arm.name]
            strip.plot(loss, row, style.marker, color=style.colour, markersize=6)
        label = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        strip.annotate(f"{first.name}, {second.name}", (span[1], row), fontsize="x-small", **label)


def _shared(first: ArmSummary, second: ArmSummary) -> tuple[float, float] | None:
    """The mean over seeds of the losses between which the runs of two arms are compared."""
    others = {run.plan.seed: run for run in second.reported.runs}
    pairs = [(run, others.get(run.plan.seed)) for run in first.reported.runs]
    spans = [span for one, other in pairs if other and (span := shared_losses(one, other))]
    low, high = np.mean(spans, axis=0) if spans else (0.0, 0.0)
    return (float(low), float(high)) if spans else None


def training(study: Study) -> dict[str, Figure]:
    """FD and one-step loss over steps and over seconds: each arm's mean at its tuned trial, seeds
    thin."""
    figures = {}
    fields = {"fd": f"{study.metric} of the rollouts", "one_step_loss": "held-out one-step loss"}
    for field, title in fields.items():
        for unit, x in {"steps": "optimizer steps", "seconds": "seconds of training"}.items():
            figure, axes = _figure()
            timed = unit == "seconds"
            longest = _draw_arms(
                axes,
                study,
                lambda run, field=field: _series(_over_training(run), "step", field),
                timed=timed,
            )
            _label(axes, x, title)
            _legend(axes, study)
            if longest > 1:
                figures[f"{field}-by-{unit}".replace("_", "-")] = figure
    return figures


def _over_training(run: RunResult) -> list[Evaluation]:
    """The evaluations by which runs are compared at equal loss: of a run's checkpoints or, where it
    is repeated with fewer steps, of the ends of these runs."""
    return [evaluation for evaluation, _ in points_of(run)]


def by_nfe(study: Study) -> dict[str, Figure]:
    """FD of the last checkpoint against model calls per image, a figure for each solver."""
    every = [one for arm in study.arms for run in arm.reported.runs for one in run.by_nfe]
    solvers = list(dict.fromkeys(one.solver for one in every))
    calls = sorted({one.nfe for one in every if one.nfe is not None})
    figures = {}
    for solver in solvers if len(calls) > 1 else ():
        figure, axes = _figure()
        _draw_arms(axes, study, lambda run, solver=solver: _of_solver(run, solver))
        axes.set_xscale("log")
        _ticks_at(axes, calls, [f"{nfe:g}" for nfe in calls])
        _label(axes, f"NFE: model calls per image, {solver}", f"{study.metric} of the rollouts")
        _legend(axes, study)
        figures["nfe" if solver == solvers[0] else f"nfe-{solver}"] = figure
    return figures


def _of_solver(run: RunResult, solver: str) -> Series:
    return _series([one for one in run.by_nfe if one.solver == solver], "nfe", "fd")


def by_images(study: Study) -> Figure | None:
    """FD against 1 / number of images, where its bias is a straight line, to infinitely many."""
    figure, axes = _figure()
    longest = _draw_arms(axes, study, lambda run: _over_images(run.final))
    if longest < 2:
        return None
    floor = next((series for run in study.runs if (series := _over_images(run.floor))), [])
    axes.plot(*_columns(floor), "*:", color="#52606d")
    runs = [run.final for arm in study.arms for run in arm.reported.runs if run.final]
    numbers = sorted({number for one in runs for number, _ in one.fd_by_images}, reverse=True)
    ticks = [1 / number for number in numbers]
    _ticks_at(axes, [0, *ticks], ["∞", *(f"{number:,}" for number in numbers)])
    axes.tick_params(axis="x", rotation=45)
    _label(axes, "generated images", f"{study.metric} of the rollouts")
    _legend(axes, study)
    return figure


def _over_images(one: Evaluation | None) -> Series:
    """FD by 1 / number of images; at 0, that of infinitely many."""
    if one is None:
        return []
    found = [(1 / number, fd) for number, fd in one.fd_by_images if fd is not None]
    return [*found, (0.0, one.fd_infinity)] if one.fd_infinity is not None else found


def spectrum(study: Study) -> Figure | None:
    """Variance of the rollouts over the data's along groups of principal directions."""
    figure, axes = _figure()
    most = _draw_arms(axes, study, lambda run: _numbered(run.final.spectrum if run.final else ()))
    floor = next((run.floor for run in study.runs if run.floor and run.floor.spectrum), None)
    if floor is not None:
        axes.plot(*_columns(_numbered(floor.spectrum)), ":", color="#52606d")
    axes.axhline(1, color="#9aa5b1", linewidth=0.8)
    log_scale(axes)
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
    figure, axes = _figure()
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
    figure, axes = _figure()
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


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#9aa5b1")
    axes.tick_params(color="#9aa5b1", labelcolor="#3e4c59")
    return figure, axes


def _draw_arms(
    axes: Axes, study: Study, series_of: Callable[[RunResult], Series], *, timed: bool = False
) -> int:
    """Draw each arm's seeds thinly and their mean boldly; returns the longest series' length.

    Args:
        timed: x is the step in the series, and the seconds of training until then in the plot.
    """
    longest = 0
    for arm in study.arms:
        style = study.styles[arm.name]
        runs = [(series_of(run), _seconds(run)) for run in arm.reported.runs]
        if timed:
            runs = [([one for one in series if one[0] in clock], clock) for series, clock in runs]
        runs = [(series, clock) for series, clock in runs if series]
        for series, clock in runs:
            thin = _at_seconds(series, [clock]) if timed else series
            axes.plot(*_columns(thin), color=style.colour, linewidth=0.8, alpha=0.45)
        mean = _mean([series for series, _ in runs])
        bold = _at_seconds(mean, [clock for _, clock in runs]) if timed else mean
        look = {"color": style.colour, "marker": style.marker, "linewidth": 2, "markersize": 5}
        axes.plot(*_columns(bold), style.line, **look)
        longest = max(longest, len(mean))
    return longest


def _seconds(run: RunResult) -> dict[float, float]:
    """The seconds of training before each step of `_over_training`, as far as they are known."""
    return {one.step: seconds for one, seconds in points_of(run) if seconds}


def _at_seconds(series: Series, clocks: Sequence[dict[float, float]]) -> Series:
    """The points (step, y) at the mean over `clocks` of the seconds until the step."""
    return [(float(np.mean([clock[step] for clock in clocks])), y) for step, y in series]


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
        log_scale(axes)


def log_scale(axes: Axes, name: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 times powers of ten, or closer."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    near = high < 5 * low
    axis.set_major_locator(MaxNLocator(5) if near else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _ticks_at(axes: Axes, positions: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xticks(positions, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes, study: Study, lines: bool = True) -> None:
    """The arms above the plot, in as many columns as fit; the figure grows by their rows."""
    handles = []
    for arm, style in study.styles.items():
        line = {"linestyle": style.line if lines else "none", "linewidth": 2}
        handles.append(Line2D([], [], color=style.colour, marker=style.marker, label=arm, **line))
    columns = max(1, int(WIDTH / (0.5 + 0.075 * max(map(len, study.styles)))))
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(handles) // columns))
    place = {"loc": "outside upper left", "ncols": columns}
    figure.legend(handles=handles, frameon=False, fontsize="small", **place)
