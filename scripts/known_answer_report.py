"""Tables and a figure of the study of scripts/known_answer.py.

    python scripts/known_answer_report.py known_answer/runs.jsonl

Prints tables in Markdown and writes the figure beside the results. Ratios are paired by seed, with
the intervals and Holm's correction of flowdopr/compare/claims.py; those at equal excess are means
over the excess errors that both runs reached, as in flowdopr/compare/matched.py, evenly spaced in
the logarithm, with the times of training.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from known_answer import LEARNING_RATES, TUNING_SEED, Plan, Results, score
from known_answer_task import BANDS
from matplotlib.ticker import NullFormatter

from flowdopr.compare.claims import Claim, claim, holm
from flowdopr.compare.matched import loss_curve, over_shared_losses
from flowdopr.compare.results import Evaluation

Run = dict[str, Any]
# Okabe and Ito's colours, which the colour-blind can tell apart.
STYLES = {
    "": ("#000000", "o", "alone"),
    "inverse 0.1": ("#0072B2", "s", "DoPr, inverse, damping 0.1"),
    "inverse 1": ("#D55E00", "^", "DoPr, inverse, damping 1"),
    "sandwich 1": ("#009E73", "D", "DoPr, sandwich, damping 1"),
}


@dataclass
class Arm:
    """The runs of one optimizer in one setting: those that are reported, by seed, and the tuning's
    by learning rate."""

    plan: Plan
    runs: dict[int, Run]
    tuning: dict[float, Run]

    @property
    def name(self) -> str:
        return self.plan.arm

    def rate(self) -> str:
        """The learning rate, and whether it is at the edge of those tried."""
        rates = LEARNING_RATES[self.plan.gp]
        edge = " (highest)" if self.plan.lr == rates[-1] else " (lowest)"
        return f"{self.plan.lr:g}" + (edge if self.plan.lr in (rates[0], rates[-1]) else "")

    def values(self, measure: str) -> list[float]:
        return [run["curve"][-1][measure] for run in self.runs.values()]


def arms_of(results: Results) -> dict[str, list[Arm]]:
    """The arms of each setting, at the learning rates that the tuning seed chose."""
    found: dict[str, dict[str, Arm]] = {}
    for plan, run in results.runs.items():
        if plan.seed == TUNING_SEED:
            arm = found.setdefault(plan.setting, {}).setdefault(plan.arm, Arm(plan, {}, {}))
            arm.tuning[plan.lr] = run
            if score(run) <= score(arm.tuning[arm.plan.lr]):
                arm.plan = plan
    for plan, run in results.runs.items():
        arm = found.get(plan.setting, {}).get(plan.arm)
        if arm and plan.seed != TUNING_SEED and plan.lr == arm.plan.lr and score(run) < math.inf:
            arm.runs[plan.seed] = run
    return {name: [arm for arm in arms.values() if arm.runs] for name, arms in found.items()}


def pairs(arms: list[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """Each DoPr arm with its GP, and one with moments of late times also with the same arm whose
    moments are of a batch apart."""
    known = {(arm.plan.gp, arm.plan.dopr, arm.plan.statistics): arm for arm in arms}
    for arm in arms:
        bases = [(arm.plan.gp, "", "")] if arm.plan.dopr else []
        if arm.plan.statistics == "late":
            bases.append((arm.plan.gp, arm.plan.dopr, "apart"))
        yield from ((arm, known[base]) for base in bases if base in known)


Ratio = Callable[[Run, Run], float | None]


def after(part: float, measure: str) -> Ratio:
    """log ratio of `measure` at the checkpoint after this part of the steps."""

    def ratio(run: Run, other: Run) -> float:
        step = part * run["plan"]["steps"]
        values = [
            min(one["curve"], key=lambda point: abs(point["step"] - step))[measure]
            for one in (run, other)
        ]
        return math.log(values[0] / values[1])

    return ratio


def at_equal_excess(measure: str) -> Ratio:
    def ratio(run: Run, other: Run) -> float | None:
        curves = [
            loss_curve(
                [
                    (
                        Evaluation(p["step"], one_step_loss=p["excess_trained"], fd=p[measure]),
                        None,
                    )
                    for p in one["curve"]
                ]
            )
            for one in (run, other)
        ]
        return over_shared_losses(*curves)

    return ratio


# The first four are claimed, and corrected together; the others only describe.
RATIOS: dict[str, Ratio] = {
    "lowest third, quarter of steps": after(0.25, "lowest"),
    "lowest third, same steps": after(1, "lowest"),
    "lowest third, same excess": at_equal_excess("lowest"),
    "W2, same excess": at_equal_excess("w2"),
    "excess, same steps": after(1, "excess"),
    "W2, same steps": after(1, "w2"),
}
CLAIMED = 4


def claims_of(arms: list[Arm]) -> dict[tuple[str, str, str], Claim]:
    """The ratios of all pairs, by arm, the one it is compared with, and name of the ratio."""
    found = []
    for arm, base in pairs(arms):
        shared = sorted(arm.runs.keys() & base.runs.keys())
        for name, ratio in RATIOS.items():
            logs = {seed: ratio(arm.runs[seed], base.runs[seed]) for seed in shared}
            known = {seed: [value] for seed, value in logs.items() if value is not None}
            found.append(claim(name, arm.name, base.name, known))
    known = [one for one in found if one is not None]
    claimed = holm([one for one in known if one.measure in [*RATIOS][:CLAIMED]])
    described = [one for one in known if one.measure in [*RATIOS][CLAIMED:]]
    return {(one.first, one.second, one.measure): one for one in (*claimed, *described)}


def rows(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def spread(values: list[float]) -> str:
    sd = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{sd}"


def measures_table(arms: list[Arm]) -> Iterator[str]:
    names = ("excess", "excess_trained", "spectrum", "lowest", "w2")
    yield rows(
        "optimizer",
        "learning rate",
        "seeds",
        "excess",
        "excess, trained times",
        "all directions",
        "lowest third",
        "W2",
    )
    yield rows(*["---"] * (len(names) + 3))
    for arm in arms:
        cells = (spread(arm.values(name)) for name in names)
        yield rows(arm.name, arm.rate(), len(arm.runs), *cells)


def claims_table(arms: list[Arm]) -> Iterator[str]:
    claims = claims_of(arms)
    yield rows("ratio", *RATIOS)
    yield rows(*["---"] * (len(RATIOS) + 1))
    for arm, base in pairs(arms):
        cells = []
        for name in RATIOS:
            one = claims.get((arm.name, base.name, name))
            if one is None or one.interval is None:
                cells.append("" if one is None else f"{one.ratio:.3g}")
                continue
            text = f"{one.ratio:.3g} ({one.interval[0]:.3g} to {one.interval[1]:.3g})"
            cells.append(f"**{text}**" if one.p_holm is not None and one.shown else text)
        yield rows(f"{arm.name} / {base.name}", *cells)


def layers_table(arms: list[Arm]) -> Iterator[str]:
    """Geometric means over seeds of condition numbers, and of effective ranks in brackets."""
    yield rows("optimizer", "input of", *BANDS)
    yield rows(*["---"] * (len(BANDS) + 2))
    for arm in arms:
        for layer in next(iter(arm.runs.values()))["layers"]:
            cells = []
            for band in BANDS:
                seen = [run["layers"][layer][band] for run in arm.runs.values()]
                condition, rank = np.exp(np.mean(np.log(seen), 0))
                cells.append(f"{condition:.2g} ({rank:.1f})")
            yield rows(arm.name, layer, *cells)


def plot(setting: str, arms: list[Arm], path: Path) -> None:
    """For each GP: the lowest third over steps, over the excess, and the variance of rollouts by
    direction; lines are geometric means over seeds."""
    gps = [gp for gp in LEARNING_RATES if any(arm.plan.gp == gp for arm in arms)]
    figure, axes = plt.subplots(
        3,
        len(gps),
        figsize=(3.4 * len(gps), 8.5),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for column, gp in zip(axes.T, gps, strict=True):
        for arm in arms:
            if arm.plan.gp == gp and arm.plan.dopr in STYLES and not arm.plan.statistics:
                _draw(column, arm)
        column[0].set(title=gp, xscale="log", yscale="log", xlabel="step")
        steps = [point["step"] for point in next(iter(arms[0].runs.values()))["curve"]]
        column[0].set_xticks(steps, [str(step) for step in steps])
        column[1].set(xscale="log", yscale="log", xlabel="excess error of the velocity")
        column[1].invert_xaxis()
        column[2].set(yscale="log", xlabel="groups of directions, by falling variance")
        column[2].axhline(1, color="grey", linewidth=0.8)
    for axis in axes[:2].flat:
        axis.xaxis.set_minor_formatter(NullFormatter())
    for axis in axes[:2, 0]:
        axis.set_ylabel("mean |log variance ratio|,\nlowest third")
    axes[2, 0].set_ylabel("variance of rollouts\nover the exact one")
    labels = {text: line for axis in axes[0] for line, text in zip(*_legend(axis), strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(setting)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _legend(axis: Any) -> tuple[list, list]:
    return axis.get_legend_handles_labels()


def _draw(column: np.ndarray, arm: Arm) -> None:
    color, marker, label = STYLES[arm.plan.dopr]
    style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2, "label": label}
    curves = [run["curve"] for run in arm.runs.values()]

    def mean(measure: str) -> np.ndarray:
        return np.exp(np.mean(np.log([[point[measure] for point in one] for one in curves]), 0))

    steps = [point["step"] for point in curves[0]]
    column[0].plot(steps, mean("lowest"), **style)
    column[1].plot(mean("excess_trained"), mean("lowest"), **style)
    ratios = np.exp(np.mean(np.log([one[-1]["ratio_by_direction"] for one in curves]), 0))
    column[2].plot(range(1, len(ratios) + 1), ratios, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="runs.jsonl of the study")
    options = parser.parse_args()
    settings = arms_of(Results(options.results))
    for number, (setting, arms) in enumerate(settings.items()):
        print(f"\n## {setting}\n")
        for table in (measures_table, claims_table, layers_table):
            print("\n".join(table(arms)) + "\n")
        figure = options.results.with_suffix(".png")
        if number:
            figure = figure.with_stem(f"{figure.stem}-{setting}")
        plot(setting, arms, figure)


if __name__ == "__main__":
    main()
