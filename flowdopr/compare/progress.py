"""What a study shows while it works: bars in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flowdopr.compare.cards import wanted_cards
from flowdopr.compare.plan import RunPlan

SECONDS_BETWEEN_LINES = 10.0
TRAINING_SHARE = 0.8
"""Part of a run's bar that stands for training; the rest is evaluation."""


@dataclass(frozen=True)
class RunProgress:
    """How far a run is: steps trained, cards made, and how many of both there will be."""

    step: int
    steps: int
    cards: int
    wanted_cards: int

    @property
    def fraction(self) -> float:
        trained, evaluated = self.step / self.steps, self.cards / self.wanted_cards
        return TRAINING_SHARE * trained + (1 - TRAINING_SHARE) * evaluated

    def __str__(self) -> str:
        if self.step < self.steps:
            return f"step {self.step:,} of {self.steps:,}"
        return f"evaluation {self.cards} of {self.wanted_cards}"


def progress_of(plan: RunPlan) -> RunProgress:
    """How far the run is. Counts its cards without reading them: it is called several times a
    second."""
    wanted = len(wanted_cards(plan).all())
    cards = len(list((plan.path / "evaluation").glob("*.json")))
    return RunProgress(last_step(plan.path), plan.config.train.steps, min(cards, wanted), wanted)


def last_step(run: Path) -> int:
    """The step of the newest line in metrics.jsonl; 0 where there is none yet."""
    try:
        with open(run / "metrics.jsonl", "rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - 4096))
            lines = handle.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


class Display:
    """Progress of a study, on stderr. Use as a context manager.

    Args:
        total: runs of the study.
        done: runs that were finished before.
        console: default: stderr.
    """

    def __init__(self, total: int, done: int, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, soft_wrap=True)
        self.total, self.done = total, done
        self._began = time.monotonic()
        self._last_line: dict[str, float] = {}  # when a plain line was last printed, by run
        self._tasks: dict[str, TaskID] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._overall = self._bar.add_task(
            "study", total=total, completed=done, note=self._overall_note()
        )

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line above the bars."""
        self.console.print(text, markup=False, highlight=False)

    def started(self, name: str) -> None:
        self._last_line[name] = time.monotonic()
        self._tasks[name] = self._bar.add_task(name, total=1.0, note="starting")

    def update(self, progress: dict[str, RunProgress]) -> None:
        """Show the progress of the running runs, given by name."""
        for name, run in progress.items():
            self._bar.update(self._tasks[name], completed=run.fraction, note=str(run))
        running = sum(run.fraction for run in progress.values())
        self._bar.update(self._overall, completed=self.done + running, note=self._overall_note())
        if not self.console.is_terminal:
            self._plain_lines(progress)

    def ended(self, name: str, how: str, *, stopped: bool = False) -> None:
        """Say how a run ended. A run that was stopped goes on later and is not counted."""
        self.done += not stopped
        self._bar.remove_task(self._tasks.pop(name))
        self.say(f"[{self.done}/{self.total}] {name}: {how} ({self._elapsed()})")

    def _plain_lines(self, progress: dict[str, RunProgress]) -> None:
        now = time.monotonic()
        for name, run in progress.items():
            if now - self._last_line[name] >= SECONDS_BETWEEN_LINES:
                self._last_line[name] = now
                self.say(f"[{self.done}/{self.total}] {name}: {run}")

    def _overall_note(self) -> str:
        return f"{self.done} of {self.total} runs"

    def _elapsed(self) -> str:
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        return f"{minutes}:{seconds:02d}"
