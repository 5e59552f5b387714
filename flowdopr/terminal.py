"""Progress bars and lines on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

# One console for everything: rich can print a line above a bar only if both use the same console.
console = Console(stderr=True)


def print_line(text: str) -> None:
    """Print `text` above a running bar, without wrapping or styling it."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


class Counter:
    """A running bar; call it with the number of items that were just completed."""

    def __init__(self, bar: Progress, task: TaskID):
        self._bar, self._task = bar, task

    def __call__(self, number: int = 1) -> None:
        self._bar.advance(self._task, number)

    def note(self, text: str) -> None:
        """Show `text` at the end of the bar."""
        self._bar.update(self._task, note=text)


@contextmanager
def counting(what: str, total: int, *, completed: int = 0, shown: bool = True) -> Iterator[Counter]:
    """A bar of `total` items within the block; nothing is drawn where stderr is no terminal."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        yield Counter(bar, bar.add_task(what, total=total, completed=completed, note=""))
