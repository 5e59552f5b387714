"""The progress of a study: bars in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import TaskID

from flowdopr.compare.cards import wanted_cards
from flowdopr.compare.plan import RunPlan
from flowdopr.disk import parse_sealed
from flowdopr.runs.contents import MetricsLine
from flowdopr.terminal import print_line, progress_bars, time_left

TRAINING_SHARE = 0.8
"""Part of a run's bar that stands for training; the rest is evaluation."""


def progress_of(plan: RunPlan) -> tuple[float, str]:
    """The completed fraction of the run, and what it does now.

    Called several times a second, so it counts the cards without reading them.
    """
    step, steps = last_step(plan.path), plan.config.train.steps
    wanted = len(wanted_cards(plan).all())
    cards = min(wanted, len(list((plan.path / "evaluation").glob("*.json"))))
    fraction = TRAINING_SHARE * step / steps + (1 - TRAINING_SHARE) * cards / wanted
    if step >= steps:
        return fraction, f"evaluation {cards} of {wanted}"
    logged = [line for line in newest_lines(plan.path) if line.get("loss")][-1:]
    numbers = (f", loss {x['loss']:.4f}, {x['images_per_second']:,.0f} images/s" for x in logged)
    return fraction, f"step {step:,} of {steps:,}{''.join(numbers)}"


def last_step(run: Path) -> int:
    """The step of the newest line in metrics.jsonl; 0 where there is none yet, or it is damaged."""
    return max((line["step"] for line in newest_lines(run)[-1:]), default=0)


def newest_lines(run: Path) -> list[dict[str, Any]]:
    """The lines in the last 4 KiB of metrics.jsonl; none where it is missing or damaged."""
    try:
        with open(run / "metrics.jsonl", "rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - 4096))
            lines = handle.read().split(b"\n")[size > 4096 : -1]  # the first one may be cut
        return [parse_sealed(MetricsLine, line) for line in lines]
    except (OSError, ValueError):
        return []


class Display:
    """Progress of a study, on stderr. Use as a context manager.

    Args:
        total: number of runs in the study.
        done: number of runs that were finished before.
    """

    def __init__(self, total: int, done: int):
        self.total, self.done = total, done
        self._began = time.monotonic()
        self._notes: dict[str, str] = {}  # what the running runs do, by name
        self._tasks: dict[str, TaskID] = {}
        self._bar = progress_bars()
        self._overall = self._bar.add_task("study", total=total, note="")

    def __enter__(self) -> Display:
        self._bar.start()
        self.update([])
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __str__(self) -> str:
        runs = "; ".join(f"{name}: {note}" for name, note in self._notes.items())
        left = time_left(self._bar.tasks[self._overall])
        return f"[{self.done}/{self.total}] {', '.join(filter(None, (left, runs)))}"

    def started(self, name: str) -> None:
        self._tasks[name] = self._bar.add_task(name, total=1.0, note="starting")

    def update(self, running: Sequence[RunPlan]) -> None:
        """Read and show the progress of the runs that are running."""
        completed, notes = float(self.done), {}
        for plan in running:
            fraction, note = progress_of(plan)
            completed += fraction
            self._bar.update(self._tasks[plan.name], completed=fraction, note=note)
            notes[plan.name] = note
        self._notes = notes  # whole, as the thread that prints it may read it at any moment
        note = f"{self.done} of {self.total} runs"
        self._bar.update(self._overall, completed=completed, note=note)

    def ended(self, name: str, how: str, *, stopped: bool = False) -> None:
        """Print how a run ended. A stopped run will be continued, so it is not counted as done."""
        self.done += not stopped
        self._bar.remove_task(self._tasks.pop(name))
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        print_line(f"[{self.done}/{self.total}, {minutes}:{seconds:02d}] {name}: {how}")
