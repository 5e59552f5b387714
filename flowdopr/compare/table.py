"""The results table, one row for each arm at its tuned learning rate, and the study as plain JSON.

`rows` holds numbers, for table.csv and results.json; `shown_rows` and `shared_values` hold the text
of the report.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from flowdopr.compare.formats import NONE, learning_rate, mean_sd, memory, number, percent, seconds
from flowdopr.compare.results import Metric, RunResult
from flowdopr.compare.statistics import ArmSummary, RateSummary, rank_correlations
from flowdopr.compare.study import Study

Row = dict[str, Any]


def rows(study: Study) -> list[Row]:
    """The numbers of each arm; an arm without a finished run has only its name and its grid."""
    return [_row(study.metric, arm) for arm in study.arms]


def _row(metric: str, arm: ArmSummary) -> Row:
    rate = arm.reported
    first = rate.runs[0] if rate.runs else None
    final = first.final if first else None
    speeds = [run.seconds_per_step for run in rate.runs if run.seconds_per_step is not None]
    memories = [run.peak_memory_bytes for run in rate.runs if run.peak_memory_bytes is not None]
    return {
        "arm": arm.name,
        "optimizer": arm.plan.optimizer,
        "dopr": arm.plan.dopr,
        "lr": rate.lr if first else None,
        "lr_grid_size": len(arm.rates),
        "lr_by_one_step_loss": arm.tuned_by_loss.lr if arm.tuned_by_loss else None,
        "metric": metric,
        **_mean_and_sd(rate, "fd"),
        "seeds": len(rate.runs),
        "seeds_failed": rate.failed,
        "fd_images": final.num_images if final else None,
        "nfe": final.nfe if final else None,
        **_mean_and_sd(rate, "one_step_loss"),
        **_mean_and_sd(rate, "label_accuracy"),
        "images_seen": first.images_seen if first else None,
        "seconds_per_step": median(speeds) if speeds else None,
        "peak_memory_bytes": max(memories, default=None),
        "global_batch_size": first.global_batch_size if first else None,
        "hardware": _join_distinct(run.hardware for run in rate.runs),
        "commit": _join_distinct(run.commit for run in rate.runs),
        "config": str(first.plan.path / "config.yaml") if first else None,
    }


def _mean_and_sd(rate: RateSummary, metric: Metric) -> Row:
    values = rate.spread(metric)
    mean, sd = (values.mean, values.sd) if values else (None, None)
    return {f"{metric}_mean": mean, f"{metric}_sd": sd}


def _join_distinct(values: Iterable[str]) -> str:
    """The one value of all runs, or the different ones side by side."""
    return " | ".join(dict.fromkeys(value for value in values if value))


def to_csv(table: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def shown_rows(study: Study, table: Sequence[Row]) -> list[Row]:
    """The text of the report's table, by column title."""
    return [
        {
            "optimizer": arm.name,
            "learning rate": f"{learning_rate(row['lr'])} (of {len(arm.rates)})",
            f"{study.metric} ↓": mean_sd(arm.reported.spread("fd"), 3),
            "one-step loss ↓": mean_sd(arm.reported.spread("one_step_loss")),
            "label accuracy ↑": percent(arm.reported.spread("label_accuracy")),
            "seeds": f"{row['seeds']}"
            + f", {row['seeds_failed']} failed" * (row["seeds_failed"] > 0),
            "a step": seconds(row["seconds_per_step"]),
            "peak memory": memory(row["peak_memory_bytes"]),
        }
        for arm, row in zip(study.arms, table, strict=True)
    ]


def shared_values(study: Study, table: Sequence[Row]) -> dict[str, str]:
    """Values that are usually the same for every arm; different ones side by side."""

    def shared(key: str, show: Callable[[Any], str] = str) -> str:
        return _join_distinct(show(row[key]) for row in table if row[key] is not None) or NONE

    return {
        f"{study.metric} images": shared("fd_images", "{:,}".format),
        "NFE": shared("nfe", lambda nfe: number(nfe) if nfe % 1 else f"{nfe:g}"),
        "images seen": shared("images_seen", "{:,}".format),
        "global batch": shared("global_batch_size"),
        "hardware": shared("hardware"),
        "commit": re.sub(r"([0-9a-f]{12})[0-9a-f]{28}", r"\1", shared("commit")),
    }


def to_results(study: Study, table: Sequence[Row]) -> Row:
    """Everything the report says, as plain values for results.json."""
    claims = [asdict(one) | {"shown": one.shown} for pair in study.pairs for one in pair]
    return {
        "study": study.name,
        "metric": study.metric,
        "verdict": asdict(study.verdict),
        "arms": table,
        "claims": claims,
        "rank_correlations": rank_correlations(study.arms),
        "runs": [_plain_run(run) for run in study.runs],
    }


def _plain_run(run: RunResult) -> Row:
    plan, numbers = run.plan, asdict(run)
    del numbers["plan"]
    return {
        "arm": plan.arm,
        "lr": plan.lr,
        "seed": plan.seed,
        "name": plan.name,
        "path": str(plan.path),
        "optimizer": plan.optimizer,
        "dopr": plan.dopr,
        **numbers,
        "sample_grid": str(run.sample_grid) if run.sample_grid else None,
    }
