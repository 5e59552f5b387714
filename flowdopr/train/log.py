"""What a run says: log.txt and the terminal get the same lines, a progress bar the rest."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("flowdopr")
console = Console(stderr=True)


class TerminalHandler(logging.Handler):
    """Prints above a running progress bar, without folding long lines."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def run_log(path: Path | None) -> Iterator[logging.Logger]:
    """Lines of all rooms (loggers below "flowdopr") go to stderr and, appended, to `path`.

    `path` None, for every process but the first, silences all below warnings.
    """
    handlers: list[logging.Handler] = [TerminalHandler()]
    if path is not None:
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    level_before = logger.level
    logger.setLevel(logging.INFO if path is not None else logging.WARNING)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.setLevel(level_before)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


class StepProgress:
    """A bar of optimizer steps with the newest loss; silent where stderr is no terminal."""

    def __init__(self, total: int, start: int, *, shown: bool):
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("", total=total, completed=start, note="")

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self) -> None:
        self._bar.advance(self._task)

    def note(self, text: str) -> None:
        self._bar.update(self._task, note=text)
