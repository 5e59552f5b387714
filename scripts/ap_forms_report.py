"""Tables and a figure of the runs of scripts/ap_forms.py.

    python scripts/ap_forms_report.py ap-forms/runs.jsonl

Prints a Markdown table for each optimizer, at the learning rate with most variants, and writes the
figure beside the results. Ratios are to the optimizer alone, paired by seed, with the intervals of
flowdopr/compare/claims.py. "At equal loss" divides by the power of the losses' ratio that fits all
runs of the optimizer, of every variant and learning rate: FD = c loss^slope.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from ap_forms import VARIANTS
from scipy import stats

from flowdopr.compare.claims import claim
from flowdopr.disk import replacing

Run = dict[str, Any]
ALONE = "no AP"


def logs(run: Run) -> tuple[float, float]:
    """The logarithms of loss and FD."""
    return math.log(run["one_step_loss"]), math.log(run["fd"])


def ratio(logs_by_seed: dict[int, float]) -> str:
    """The ratio of which these are the logarithms, with its interval where there are two seeds."""
    found = claim("", "", ALONE, {seed: [value] for seed, value in logs_by_seed.items()})
    if found is None:
        return ""
    low_high = "" if found.interval is None else " ({:.3f} to {:.3f})".format(*found.interval)
    return f"{found.ratio:.3f}{low_high}"


def slope(runs: list[Run]) -> float:
    """Of log FD on log loss over runs."""
    return float(stats.linregress(*np.array([logs(run) for run in runs]).T).slope)


def table(runs: list[Run]) -> str:
    """All variants of one optimizer at one learning rate."""
    rates = Counter(run["plan"]["lr"] for run in runs)
    lr, power = max(rates, key=lambda rate: rates[rate]), slope(runs)
    by_variant: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        if run["plan"]["lr"] == lr:
            by_variant[run["plan"]["variant"]][run["plan"]["seed"]] = run
    alone = by_variant[ALONE]
    lines = [
        f"{runs[0]['plan']['gp']}, learning rate {lr:g}; FD = c loss^{power:.2f}",
        "",
        "| variant | seeds | FD | FD / alone | loss / alone | FD / alone at equal loss |",
        "|---|---|---|---|---|---|",
    ]
    in_order = dict.fromkeys([*VARIANTS, *by_variant])  # a record may have variants of the past
    for name in (name for name in in_order if name in by_variant):
        of_seed = by_variant[name]
        seeds = sorted(of_seed.keys() & alone.keys())
        loss = {seed: logs(of_seed[seed])[0] - logs(alone[seed])[0] for seed in seeds}
        fd = {seed: logs(of_seed[seed])[1] - logs(alone[seed])[1] for seed in seeds}
        equal = {seed: fd[seed] - power * loss[seed] for seed in seeds}
        mean = np.mean([run["fd"] for run in of_seed.values()])
        cells = [name, str(len(seeds)), f"{mean:.0f}", *map(ratio, (fd, loss, equal))]
        lines.append(
            "| " + " | ".join(cells if name != ALONE else [*cells[:3], "1", "1", "1"]) + " |"
        )
    return "\n".join(lines)


def draw(by_gp: dict[str, list[Run]], path: Path) -> None:
    """FD against loss, a panel for each optimizer, a point for each run."""
    figure, panels = plt.subplots(
        1, len(by_gp), figsize=(6.5 * len(by_gp), 4.5), layout="constrained", squeeze=False
    )
    for axes, (gp, runs) in zip(panels[0], by_gp.items(), strict=True):
        for alone in (False, True):
            some = [run for run in runs if (run["plan"]["variant"] == ALONE) == alone]
            label = f"{gp} alone" if alone else "with a form of AP"
            color, marker = ("C3", "s") if alone else ("C0", "o")
            x = [run["one_step_loss"] for run in some]
            y = [run["fd"] for run in some]
            axes.scatter(x, y, s=22, color=color, marker=marker, label=label, alpha=0.7)
        axes.set(xlabel="one-step loss of held-out images", ylabel="FD", title=gp)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as part:
        figure.savefig(part, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="runs.jsonl of ap_forms.py")
    options = parser.parse_args()
    by_gp: dict[str, list[Run]] = defaultdict(list)
    for path in options.results:
        for run in map(json.loads, path.read_text().splitlines()):
            if run["fd"] is not None:
                by_gp[run["plan"]["gp"]].append(run)
    for runs in by_gp.values():
        print(table(runs) + "\n")
    draw(by_gp, options.results[0].with_suffix(".png"))


if __name__ == "__main__":
    main()
