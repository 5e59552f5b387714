"""Tables and a picture of a study of your own task (`own_task.py`).

Each arm with a base is compared with it by ratios paired by seed (`claims.py`). Three are claimed
and corrected together, over all pairs: the rollout measure after the last step, the same at equal
loss over the losses that both runs passed (`matched.py`), and how much that ratio grows from the
shortest horizon to the longest. The others only describe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowdopr.compare.claims import Claim, claim, holm, log_ratios
from flowdopr.compare.formats import mean_sd, number
from flowdopr.compare.matched import loss_curve, over_shared_losses
from flowdopr.compare.own_task import ArmRuns, OwnTask, Run
from flowdopr.compare.results import Evaluation
from flowdopr.compare.statistics import Spread
from flowdopr.disk import replacing, write_text

Measured = Mapping[int, Sequence[float | None]]


def write_report(task: OwnTask, arms: Sequence[ArmRuns], folder: Path) -> str:
    """Write the tables and the picture as `<task's name>.md` and `.png` into `folder`, and return
    the text of the tables."""
    tables = [measures_table(task, arms), claims_table(task, arms)]
    text = "\n".join(["\n".join(table) + "\n" for table in tables])
    write_text(folder / f"{task.name}.md", text)
    figure = draw(task, arms)
    with replacing(folder / f"{task.name}.png") as part:
        figure.savefig(part, dpi=110, format="png")
    return text


def claims_of(task: OwnTask, arms: Sequence[ArmRuns]) -> dict[tuple[str, str], Claim]:
    """The ratios of each arm to its base, by the arm's name and the ratio's."""
    found = {one.arm.name: one for one in arms}
    claimed, described = [], []
    for one in arms:
        if one.arm.base not in found:
            continue
        for place, (name, logs) in enumerate(_ratios(task, one, found[one.arm.base]).items()):
            made = claim(name, one.arm.name, one.arm.base, logs)
            if made is not None:
                (claimed if place < CLAIMED else described).append(made)
    return {(one.first, one.measure): one for one in (*holm(claimed), *described)}


CLAIMED = 3


def _ratios(task: OwnTask, one: ArmRuns, base: ArmRuns) -> dict[str, Mapping[int, list[float]]]:
    """Log ratios by seed, by name; the first CLAIMED are claims."""

    def ratio(measure: str) -> Mapping[int, list[float]]:
        first, second = (_by_seed(arm, lambda run: run.last(measure)) for arm in (one, base))
        return {seed: [*logs] for seed, logs in log_ratios(first, second).items()}

    by_horizon = {name: ratio(name) for name in task.horizons}
    growth = {}
    if len(task.horizons) > 1:
        short, long = by_horizon[task.horizons[0]], by_horizon[task.horizons[-1]]
        growth = {seed: [long[seed][0] - short[seed][0]] for seed in short.keys() & long.keys()}
    return {
        f"{task.rollout}, same steps": ratio(task.rollout),
        f"{task.rollout}, same loss": _at_equal_loss(task, one, base),
        "longest over shortest": growth,
        f"{task.loss}, same steps": ratio(task.loss),
        **by_horizon,
    }


def _by_seed(arm: ArmRuns, measure: Callable[[Run], float]) -> Measured:
    """The measure of each reported run; None where it diverged."""
    values = {seed: measure(run) for seed, run in arm.reported.items()}
    return {seed: [value if math.isfinite(value) else None] for seed, value in values.items()}


def _at_equal_loss(task: OwnTask, one: ArmRuns, base: ArmRuns) -> dict[int, list[float]]:
    found = {}
    for seed in one.reported.keys() & base.reported.keys():
        curves = [
            loss_curve(
                [
                    (
                        Evaluation(int(p["step"]), one_step_loss=p[task.loss], fd=p[task.rollout]),
                        None,
                    )
                    for p in arm.reported[seed].curve
                ]
            )
            for arm in (one, base)
        ]
        value = over_shared_losses(*curves)
        if value is not None:
            found[seed] = [value]
    return found


def rows(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def measures_table(task: OwnTask, arms: Sequence[ArmRuns]) -> Iterator[str]:
    """Mean ± sd over seeds of every measure after the last step."""
    points = [run.curve[-1] for arm in arms for run in arm.reported.values() if run.curve]
    names = [name for name in (points[0] if points else {}) if name != "step"]
    yield rows("optimizer", "learning rate", "seeds", *names)
    yield rows(*["---"] * (len(names) + 3))
    for arm in arms:
        ended = [run for run in arm.reported.values() if math.isfinite(run.last(task.loss))]
        cells = [mean_sd(_spread([run.last(name) for run in ended]), 3) for name in names]
        yield rows(arm.arm.name, _rate(arm), f"{len(ended)} of {len(arm.reported)}", *cells)


def _rate(arm: ArmRuns) -> str:
    """The learning rate, and whether it is at the edge of those tried."""
    edges = {min(arm.arm.lrs): " (lowest)", max(arm.arm.lrs): " (highest)"}
    return f"{arm.lr:g}" + (edges.get(arm.lr, "") if len(edges) > 1 else "")


def _spread(values: list[float]) -> Spread | None:
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), sd, len(values))


def claims_table(task: OwnTask, arms: Sequence[ArmRuns]) -> Iterator[str]:
    """Ratios with 95 % intervals, below 1 where the first is lower; bold ones are shown after
    Holm's correction."""
    claims = claims_of(task, arms)
    names = list(dict.fromkeys(name for _, name in claims))
    yield rows("ratio", *names)
    yield rows(*["---"] * (len(names) + 1))
    for one in (arm.arm for arm in arms if arm.arm.base):
        cells = (_ratio(claims.get((one.name, name))) for name in names)
        yield rows(f"{one.name} / {one.base}", *cells)


def _ratio(one: Claim | None) -> str:
    if one is None:
        return ""
    if one.interval is None:
        return number(one.ratio, 3)
    low, high = (number(end, 3) for end in one.interval)
    text = f"{number(one.ratio, 3)} ({low} to {high})"
    return f"**{text}**" if one.shown else text


COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's, which the colour-blind can tell apart; one for each optimizer and its DoPr."""


def draw(task: OwnTask, arms: Sequence[ArmRuns]) -> Any:
    """Left, the rollout measure against the loss, a line for each run; right, by horizon. DoPr arms
    are dashed and hollow. Lines on the right are geometric means over seeds."""
    from matplotlib.figure import Figure

    from flowdopr.compare.plots import log_scale

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bases = list(dict.fromkeys(one.arm.base or one.arm.name for one in arms))
    for one in arms:
        colour = COLOURS[bases.index(one.arm.base or one.arm.name) % len(COLOURS)]
        style = {"color": colour, "linestyle": "--" if one.arm.base else "-", "linewidth": 1.2}
        marker = {
            "marker": "o",
            "markersize": 5,
            "markerfacecolor": "w" if one.arm.base else colour,
        }
        for run in (run for run in one.reported.values() if run.curve):
            x, y = ([p[name] for p in run.curve] for name in (task.loss, task.rollout))
            left.plot(x, y, **style | {"linewidth": 0.7}, alpha=0.6)
            left.plot(x[-1:], y[-1:], color=colour, **marker)
        ended = [run for run in one.reported.values() if math.isfinite(run.last(task.loss))]
        logs = [[math.log(run.last(name)) for name in task.horizons] for run in ended]
        if logs:
            means = np.exp(np.mean(logs, 0))
            right.plot(range(len(means)), means, label=one.arm.name, **style, **marker)
    left.set(xlabel=task.loss, ylabel=task.rollout)
    if task.horizons:
        right.set(title=f"{task.horizons[0].partition(', ')[0]} by horizon, after the last step")
    log_scale(left, "x")
    log_scale(left)
    log_scale(right)
    right.set_xticks(range(len(task.horizons)), _short(task.horizons), rotation=30, ha="right")
    if right.lines:
        names = right.get_legend_handles_labels()
        figure.legend(*names, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _short(names: Iterable[str]) -> list[str]:
    """The last part of names such as `wrong, 5 digits`."""
    return [name.rpartition(", ")[2] for name in names]
