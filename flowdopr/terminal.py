"""Progress on stderr: a bar in a terminal; elsewhere a line whenever there was none for a while."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_OF_SPEED = 300.0  # over which a rate and the time that is left are estimated

# One console for everything: rich can print a line above a bar only if both use the same console.
console = Console(stderr=True)

_running: list[object] = []  # work that tells its progress by str(), the innermost last
_printed = time.monotonic()  # when the last line was printed


def print_line(text: str) -> None:
    """Print `text` above a running bar, without wrapping or styling it."""
    global _printed
    _printed = time.monotonic()
    console.print(text, soft_wrap=True, markup=False, highlight=False)


class Counter:
    """Running work; call it with the number of items that were just completed."""

    def __init__(self, what: str, bar: Progress, total: int, completed: int):
        self.what, self._bar = what, bar
        self._task = bar.add_task(what, total=total, completed=completed, note="")

    def __call__(self, number: int = 1) -> None:
        self._bar.advance(self._task, number)

    def note(self, text: str) -> None:
        """Show `text` at the end of the bar."""
        self._bar.update(self._task, note=text)

    def __str__(self) -> str:
        task = self._bar.tasks[self._task]
        done = f"{self.what}: {task.completed:,.0f} of {task.total:,.0f}"
        return ", ".join(filter(None, (done, rate(task), time_left(task), task.fields["note"])))


class RateColumn(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        return Text(rate(task))


def rate(task: Task) -> str:
    """Items a second, "" before it is known."""
    return f"{task.speed:.3g}/s" if task.speed else ""


def time_left(task: Task) -> str:
    """How long the rest of a task takes at its speed so far, "" before that is known."""
    return f"{timedelta(seconds=round(task.time_remaining))} left" if task.time_remaining else ""


def progress_bars(
    *columns: ProgressColumn, shown: bool = True, transient: bool = False
) -> Progress:
    """Bars with `columns`, the time that is left and the field `note`, in a terminal alone.

    Elsewhere nothing is printed, but the tasks count and know their speed.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        speed_estimate_period=SECONDS_OF_SPEED,
        transient=transient,
        disable=not (shown and console.is_terminal),
    )


@contextmanager
def counting(what: str, total: int, *, completed: int = 0, shown: bool = True) -> Iterator[Counter]:
    """A bar of `total` items within the block; where stderr is no terminal, see `heartbeat`."""
    columns = MofNCompleteColumn(), RateColumn()
    with progress_bars(*columns, shown=shown, transient=True) as bar:
        counter = Counter(what, bar, total, completed)
        with telling(counter):
            yield counter


@contextmanager
def telling(work: object) -> Iterator[None]:
    """Within the block, str(work) is the progress that `heartbeat` prints."""
    _running.append(work)
    try:
        yield
    finally:
        _running.remove(work)


def watching(text: Callable[[], str]) -> NoReturn:
    """Show what `text` returns, anew every two seconds, until Ctrl-C."""
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(Text(text()), refresh=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)


@contextmanager
def heartbeat(name: str) -> Iterator[None]:
    """Within the block, print a line whenever there was none for `SECONDS_BETWEEN_LINES`.

    The line is what the innermost block of `counting` or `telling` says, or else that `name` is at
    work. Only the first process of a launch prints it, and only where stderr is no terminal, which
    has bars instead.
    """
    if console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield
        return
    began, over = time.monotonic(), threading.Event()

    def beat() -> None:
        wait = SECONDS_BETWEEN_LINES
        while not over.wait(wait):
            now = time.monotonic()
            wait = max(_printed, began) + SECONDS_BETWEEN_LINES - now
            if wait <= 0:
                wait = SECONDS_BETWEEN_LINES
                print_line(
                    str(next(reversed(_running), f"{name}: at work for {now - began:.0f} s"))
                )

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
