"""What a run says: log.txt gets all lines, the terminal the short ones and a progress bar."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from flowdopr.optim import format_roles, parameter_roles

logger = logging.getLogger("flowdopr")
console = Console(stderr=True)
FILE_ONLY = {"file_only": True}  # `extra` of a record that is too long for the terminal


class TerminalHandler(logging.Handler):
    """Prints above a running progress bar, without folding long lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
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


def log_roles(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """The table of all parameters' roles into log.txt, at `path`, and their counts everywhere.

    Raises:
        ValueError: a parameter that the optimizer does not have exactly once.
    """
    log = logger.getChild("train")
    log.info("%s\n%s", name, format_roles(model, optimizer), extra=FILE_ONLY)
    log.info("%s: %s; each is listed in %s", name, role_counts(model, optimizer), path)


def role_counts(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """How many parameters have which role and, under DoPr, which of its AP modes."""
    ap_of = {name: mode.split()[0] for name, _, mode, _ in getattr(optimizer, "roles", list)()}
    modes: dict[str, Counter[str]] = {}
    for role in parameter_roles(model):
        modes.setdefault(role.kind, Counter())[ap_of.get(role.name, "none")] += 1
    parts = []
    for kind, counts in modes.items():
        shown = ", ".join(f"{count} {mode}" for mode, count in counts.most_common())
        parts.append(f"{counts.total()} {kind}" + (f" (AP: {shown})" if ap_of else ""))
    return ", ".join(parts)


def shown_line(line: Mapping[str, Any], steps: int) -> str:
    """A line of metrics.jsonl in words, with the number of `steps` in all."""
    shown = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in line.items()}
    shown["step"] += f"/{steps}"
    return " ".join(f"{key} {value}" for key, value in shown.items())


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
