"""The results table, one row for each arm at its tuned trial, and the study as plain JSON.

`rows` holds numbers, for table.csv and results.json; `shown_rows` and `shared_values` hold the text
of the report.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from flowdopr.compare.differences import differing_settings
from flowdopr.compare.formats import (
    NONE,
    distinct,
    mean_sd,
    memory,
    number,
    percent,
    seconds,
    tried,
)
from flowdopr.compare.results import Metric, RunResult
from flowdopr.compare.statistics import (
    ArmSummary,
    Spread,
    TrialSummary,
    rank_correlations,
    spread,
)
from flowdopr.compare.study import Study

Row = dict[str, Any]


class Cell(NamedTuple):
    """A cell of the report's table, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A metric in the report's table."""

    metric: Metric
    title: str
    digits: int = 3
    rises: bool = False
    """Whether more is better."""

    def of(self, arm: ArmSummary) -> Spread | None:
        return arm.reported.spread(self.metric)

    def titled(self, study: Study) -> str:
        title = study.metric + self.title if self.metric.startswith("fd") else self.title
        return f"{title} {'↑' if self.rises else '↓'}"

    def text(self, values: Spread | None) -> str:
        return percent(values) if self.metric in SHARES else mean_sd(values, self.digits)

    def best(self, arms: Sequence[ArmSummary]) -> set[str]:
        """The arms of the best mean, where several have one; all of those that are level."""
        means = {arm.name: values.mean for arm in arms if (values := self.of(arm))}
        if len(means) < 2:
            return set()
        best = (max if self.rises else min)(means.values())
        return {name for name, mean in means.items() if mean == best}


TEX = {letter: f"\\{letter}" for letter in "%_&#$"}
TEX |= {
    "↓": "$\\downarrow$",
    "↑": "$\\uparrow$",
    "±": "$\\pm$",
    "−": "$-$",
    "∞": "$\\infty$",
    "–": "--",
}
"""Letters of the table in LaTeX, where that writes them otherwise."""
SCHEMA = 2
"""Version of results.json; docs/compare.md lists its fields."""
SHARES = ("precision", "recall", "label_accuracy")
COLUMNS = (
    Column("fd", ""),
    Column("fd_infinity", "∞"),
    Column("one_step_loss", "one-step loss", digits=4),
    Column("label_accuracy", "label accuracy", rises=True),
    Column("kid_mean", "KID"),
    Column("precision", "precision", rises=True),
    Column("recall", "recall", rises=True),
    Column("spectrum_error", "spectrum error"),
)


def rows(study: Study) -> list[Row]:
    """The numbers of each arm; an arm without a finished run has only its name and its grid."""
    return [_row(study.metric, arm) for arm in study.arms]


def _row(metric: str, arm: ArmSummary) -> Row:
    trial = arm.reported
    first = trial.runs[0] if trial.runs else None
    final = first.final if first else None
    speeds = [run.seconds_per_step for run in trial.runs if run.seconds_per_step is not None]
    memories = [run.peak_memory_bytes for run in trial.runs if run.peak_memory_bytes is not None]
    return {
        "arm": arm.name,
        "optimizer": arm.plan.optimizer,
        "dopr": arm.plan.dopr,
        "lr": trial.lr if first else None,
        "trial": trial.trial if first else None,
        "trials": len(arm.trials),
        "trial_by_one_step_loss": arm.tuned_by_loss.trial if arm.tuned_by_loss else None,
        "metric": metric,
        **{key: value for one in COLUMNS for key, value in _mean_and_sd(trial, one.metric).items()},
        "seeds": len(trial.runs),
        "seeds_failed": trial.failed,
        "fd_images": final.num_images if final else None,
        "nfe": final.nfe if final else None,
        "images_seen": first.images_seen if first else None,
        "seconds_per_step": median(speeds) if speeds else None,
        "peak_memory_bytes": max(memories, default=None),
        "global_batch_size": first.global_batch_size if first else None,
        "hardware": distinct(run.hardware for run in trial.runs),
        "commit": distinct(one for run in trial.runs for one in run.commit.split(" | ")),
        "config": str(first.plan.path / "config.yaml") if first else None,
    }


def _mean_and_sd(trial: TrialSummary, metric: Metric) -> Row:
    values = trial.spread(metric)
    mean, sd = (values.mean, values.sd) if values else (None, None)
    return {f"{metric}_mean": mean, f"{metric}_sd": sd}


def to_csv(table: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def shown_rows(study: Study, table: Sequence[Row]) -> list[dict[str, Cell]]:
    """The cells of the report's table by column title: a row for each arm, and one for real images
    where they were measured. A metric that no arm has gets no column."""
    columns = [one for one in COLUMNS if any(one.of(arm) for arm in study.arms)]
    best = {one.metric: one.best(study.arms) for one in columns}
    shown = []
    for arm, row in zip(study.arms, table, strict=True):
        failed = f", {row['seeds_failed']} failed" * (row["seeds_failed"] > 0)
        cells = {"optimizer": Cell(arm.name)}
        cells["learning rate"] = Cell(f"{tried(arm.reported)} (of {len(arm.trials)})")
        for one in columns:
            cells[one.titled(study)] = Cell(one.text(one.of(arm)), arm.name in best[one.metric])
        cells["seeds"] = Cell(f"{row['seeds']}{failed}")
        cells["a step"] = Cell(seconds(row["seconds_per_step"]))
        cells["peak memory"] = Cell(memory(row["peak_memory_bytes"]))
        shown.append(cells)
    floor = next((run.floor for run in study.runs if run.floor and run.floor.fd is not None), None)
    if floor is not None:
        cells = dict.fromkeys(shown[0], Cell(""))
        cells["optimizer"] = Cell(f"{floor.num_images:,} real held-out images")
        for one in columns:
            cells[one.titled(study)] = Cell(one.text(spread([getattr(floor, one.metric)])))
        shown.append(cells)
    return shown


def to_tex(shown: Sequence[dict[str, Cell]]) -> str:
    """The report's table for LaTeX with the package booktabs; the best of each column is bold."""
    titles = " & ".join(map(_tex, shown[0]))
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(shown[0]) - 1)}}}", "\\toprule"]
    lines += [f"{titles} \\\\", "\\midrule"]
    for row in shown:
        cells = (
            f"\\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text)
            for cell in row.values()
        )
        lines.append(f"{' & '.join(cells)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in text)


def shared_values(study: Study, table: Sequence[Row]) -> dict[str, str]:
    """Values that are usually the same for every arm; different ones side by side."""

    def shared(key: str, show: Callable[[Any], str] = str) -> str:
        values = [show(row[key]) for row in table if row[key] is not None]
        return distinct(one for value in values for one in value.split(" | ")) or NONE

    return {
        "generated images": shared("fd_images", "{:,}".format),
        "NFE": shared("nfe", lambda nfe: number(nfe) if nfe % 1 else f"{nfe:g}"),
        "images seen": shared("images_seen", "{:,}".format),
        "global batch": shared("global_batch_size"),
        "hardware": shared("hardware"),
        "commit": re.sub(r"([0-9a-f]{12})[0-9a-f]{28}", r"\1", shared("commit")),
    }


def to_results(study: Study, table: Sequence[Row]) -> Row:
    """Everything the report says, as plain values for results.json."""
    claims = [asdict(one) | {"shown": one.shown} for one in study.comparisons.all()]
    return {
        "schema": SCHEMA,
        "study": study.name,
        "metric": study.metric,
        "dataset": study.dataset.to_dict() if study.dataset else None,
        "verdict": asdict(study.verdict),
        "differing_settings": differing_settings(study.arms),
        "arms": table,
        "claims": claims,
        "rank_correlations": rank_correlations(study.arms),
        "runs": [_plain_run(run) for run in study.runs],
    }


def _plain_run(run: RunResult) -> Row:
    plan, numbers = run.plan, asdict(run)
    del numbers["plan"], numbers["dataset"]
    del numbers["shorter"]  # a shorter run is in the list itself
    return {
        "arm": plan.arm,
        "lr": plan.lr,
        "searched": dict(plan.searched),
        "tuning": plan.tuning,
        "shorter": plan.shorter,
        "seed": plan.seed,
        "name": plan.name,
        "path": str(plan.path),
        "optimizer": plan.optimizer,
        "dopr": plan.dopr,
        **numbers,
        "sample_grid": str(run.sample_grid) if run.sample_grid else None,
        "gallery": str(run.gallery) if run.gallery else None,
    }
