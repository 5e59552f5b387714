"""The results table, one row an arm at its tuned learning rate, and the study as plain JSON.

`rows` holds numbers, for table.csv and results.json; `shown_rows` holds the words of the report.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from flowdopr.compare.formats import (
    NONE,
    learning_rate,
    mean_sd,
    memory,
    number,
    percent,
    seconds,
)
from flowdopr.compare.results import RunResult
from flowdopr.compare.statistics import ArmSummary, Cell, Spread
from flowdopr.compare.verdict import Verdict, metric_name, pair_differences

Row = dict[str, Any]


def rows(runs: Sequence[RunResult], summaries: Sequence[ArmSummary]) -> list[Row]:
    """Numbers of each arm; arms without a finished run have only their names and their grid."""
    return [_row(metric_name(runs), arm) for arm in summaries]


def _row(metric: str, arm: ArmSummary) -> Row:
    cell = arm.tuned or Cell(arm.arm, arm.cells[0].lr, ())
    first = cell.runs[0] if cell.runs else None
    final = first.final if first else None
    accuracy = cell.spread(lambda run: run.label_accuracy)
    return {
        "arm": arm.arm,
        "optimizer": arm.optimizer,
        "dopr": arm.dopr,
        "lr": cell.lr if first else None,
        "lr_grid_size": len(arm.cells),
        "lr_by_one_step_loss": arm.tuned_by_loss.lr if arm.tuned_by_loss else None,
        "metric": metric,
        **_columns("fd", cell.fd),
        "seeds": len(cell.runs),
        "fd_images": final.num_images if final else None,
        "nfe": final.nfe if final else None,
        **_columns("one_step_loss", cell.one_step_loss),
        **_columns("label_accuracy", accuracy),
        "images_seen": first.images_seen if first else None,
        "seconds_per_step": _median(run.seconds_per_step for run in cell.runs),
        "peak_memory_bytes": _highest(run.peak_memory_bytes for run in cell.runs),
        "global_batch_size": first.global_batch_size if first else None,
        "hardware": _shared(run.hardware for run in cell.runs),
        "commit": _shared(run.commit for run in cell.runs),
        "config": str(first.path / "config.yaml") if first else None,
    }


def _columns(name: str, spread: Spread | None) -> Row:
    if spread is None:
        return {f"{name}_mean": None, f"{name}_sd": None}
    return {f"{name}_mean": spread.mean, f"{name}_sd": spread.sd}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _highest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _shared(values: Iterable[str]) -> str:
    """The one value of all runs, or the different ones side by side."""
    return " | ".join(dict.fromkeys(value for value in values if value))


def to_csv(table: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def shown_rows(metric: str, table: Sequence[Row]) -> list[Row]:
    """The table in words, by column title. Columns of one value for all are in `shared_values`."""
    return [
        {
            "optimizer": row["arm"],
            "learning rate": _shown_rate(row),
            f"{metric} ↓": mean_sd(_spread(row, "fd"), 3),
            "one-step loss ↓": mean_sd(_spread(row, "one_step_loss")),
            "label accuracy ↑": percent(_spread(row, "label_accuracy")),
            "seeds": row["seeds"],
            "a step": seconds(row["seconds_per_step"]),
            "peak memory": memory(row["peak_memory_bytes"]),
        }
        for row in table
    ]


def shared_values(metric: str, table: Sequence[Row]) -> dict[str, str]:
    """Columns that hold the same for every arm, or the different values side by side."""

    def shared(key: str, show: Any = str) -> str:
        return _shared(show(row[key]) for row in table if row[key] is not None) or NONE

    return {
        f"{metric} images": shared("fd_images", lambda n: f"{n:,}"),
        "NFE": shared("nfe", lambda nfe: number(nfe) if nfe % 1 else f"{nfe:g}"),
        "images seen": shared("images_seen", lambda n: f"{n:,}"),
        "global batch": shared("global_batch_size"),
        "hardware": shared("hardware"),
        "commit": shared(
            "commit", lambda commit: re.sub(r"[0-9a-f]{40}", lambda m: m[0][:12], commit)
        ),
    }


def _shown_rate(row: Row) -> str:
    rate = NONE if row["lr"] is None else learning_rate(row["lr"])
    return f"{rate} (of {row['lr_grid_size']})"


def _spread(row: Row, name: str) -> Spread | None:
    mean = row[f"{name}_mean"]
    return None if mean is None else Spread(mean, row[f"{name}_sd"], row["seeds"])


def to_results(
    name: str, runs: Sequence[RunResult], summaries: Sequence[ArmSummary], verdict: Verdict
) -> Row:
    """Everything the report says, as plain values for results.json."""
    differences = [
        asdict(difference) | {"enough_seeds": difference.enough_seeds, "shown": difference.shown}
        for pair in pair_differences(runs, summaries)
        for difference in pair
        if difference is not None
    ]
    return {
        "study": name,
        "metric": metric_name(runs),
        "verdict": asdict(verdict),
        "arms": rows(runs, summaries),
        "paired_differences": differences,
        "runs": [_plain(asdict(run)) for run in runs],
    }


def _plain(run: Row) -> Row:
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in run.items()}
    shown.pop("setting")
    return shown
