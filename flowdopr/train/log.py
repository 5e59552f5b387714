"""The log of a run: log.txt gets every line, the terminal all but the long ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowdopr.disk import WriteError, writing
from flowdopr.optim import format_roles, parameter_roles
from flowdopr.terminal import print_line
from flowdopr.train.meter import PARTS

logger = logging.getLogger("flowdopr")
FILE_ONLY = {"file_only": True}  # the logging argument `extra` of a message for log.txt alone


class TerminalHandler(logging.Handler):
    """Prints messages above a running progress bar, except those marked FILE_ONLY."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            print_line(self.format(record))


class RunFileHandler(logging.FileHandler):
    """Appends to log.txt; on a full disk, for example, one line says so and training goes on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        try:
            with writing(Path(self.baseFilename)):
                raise  # the error that `emit` caught
        except WriteError as error:
            if not self.failed:
                print_line(f"{error.what}; training goes on")
            self.failed = True


@contextmanager
def run_log(path: Path | None) -> Iterator[logging.Logger]:
    """Send the messages of all loggers below "flowdopr" to stderr and append them to `path`.

    `path` is None in every process but the first, which then prints warnings and errors alone.
    """
    handlers: list[logging.Handler] = [TerminalHandler()]
    if path is not None:
        file = RunFileHandler(path, encoding="utf-8")
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
            with suppress(OSError):  # a full disk, which a line says already
                handler.close()


def log_roles(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Log the table of all parameters' roles to log.txt alone, and their counts to both.

    Args:
        path: of log.txt, which the message on the terminal names.

    Raises:
        ValueError: the optimizer does not have a parameter, or has one twice.
    """
    log = logger.getChild("train")
    log.info("%s\n%s", name, format_roles(model, optimizer), extra=FILE_ONLY)
    log.info("%s: %s; each is listed in %s", name, role_counts(model, optimizer), path)


def role_counts(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The number of parameters of each role and, under DoPr, of each mode of preconditioning."""
    ap_of = {name: mode.split()[0] for name, _, mode, _ in getattr(optimizer, "roles", list)()}
    modes: dict[str, Counter[str]] = {}
    for role in parameter_roles(model):
        modes.setdefault(role.kind, Counter())[ap_of.get(role.name, "none")] += 1
    found = []
    for kind, counts in modes.items():
        shown = ", ".join(f"{count} {mode}" for mode, count in counts.most_common())
        found.append(f"{counts.total()} {kind}" + (f" (AP: {shown})" if ap_of else ""))
    return ", ".join(found)


def shown_line(line: Mapping[str, Any], steps: int) -> str:
    """A line of metrics.jsonl for the terminal, with the total number of `steps` and without the
    shares of time, which `flowdopr status` shows."""
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else str(value)
        for key, value in line.items()
        if key not in PARTS
    }
    shown["step"] += f"/{steps}"
    return " ".join(f"{key} {value}" for key, value in shown.items())
