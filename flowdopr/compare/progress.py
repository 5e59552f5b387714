"""What a study shows while it works: bars in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 10.0
TRAINING_SHARE = 0.8
"""Part of a run's bar that stands for training; the rest is evaluation."""


@dataclass(frozen=True)
class State:
    """How far a run is, as its folder tells it."""

    step: int
    steps: int
    cards: int
    wanted_cards: int

    @property
    def fraction(self) -> float:
        trained = self.step / self.steps
        evaluated = self.cards / self.wanted_cards if self.wanted_cards else 1.0
        return TRAINING_SHARE * trained + (1 - TRAINING_SHARE) * evaluated

    def __str__(self) -> str:
        if self.step < self.steps:
            return f"step {self.step:,} of {self.steps:,}"
        return f"evaluation {self.cards} of {self.wanted_cards}"


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
    """Progress of a study, on stderr. Use as a context manager."""

    def __init__(self, total: int, done: int, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, soft_wrap=True)
        self.total, self.done = total, done
        self._began = time.monotonic()
        self._lines: dict[str, float] = {}
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
        """One line above the bars."""
        self.console.print(text, markup=False, highlight=False)

    def started(self, name: str) -> None:
        self._lines[name] = time.monotonic()
        self._tasks[name] = self._bar.add_task(name, total=1.0, note="starting")

    def update(self, states: dict[str, State]) -> None:
        """Show how far the running runs are."""
        for name, state in states.items():
            self._bar.update(self._tasks[name], completed=state.fraction, note=str(state))
        share = sum(state.fraction for state in states.values())
        self._bar.update(self._overall, completed=self.done + share, note=self._overall_note())
        if not self.console.is_terminal:
            self._plain_lines(states)

    def ended(self, name: str, words: str, *, for_good: bool = True) -> None:
        """One line that a run ended; unless it did so for good, it stays in the count of open."""
        self.done += for_good
        self._bar.remove_task(self._tasks.pop(name))
        self.say(f"[{self.done}/{self.total}] {name}: {words} ({self._elapsed()})")

    def _plain_lines(self, states: dict[str, State]) -> None:
        now = time.monotonic()
        for name, state in states.items():
            if now - self._lines[name] >= SECONDS_BETWEEN_LINES:
                self._lines[name] = now
                self.say(f"[{self.done}/{self.total}] {name}: {state}")

    def _overall_note(self) -> str:
        return f"{self.done} of {self.total} runs"

    def _elapsed(self) -> str:
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        return f"{minutes}:{seconds:02d}"
