"""metrics.jsonl: one line of JSON for each log and validation, each with a checksum."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowdopr.disk import CHECKSUM, parse_sealed, reading, sealed, to_json, writing
from flowdopr.runs.contents import MetricsLine

log = logging.getLogger("flowdopr.runs")


class MetricsFile:
    """The file, and in a run that is trained also its lines, which outlast a full disk."""

    def __init__(self, path: Path):
        self.path = path
        self._lines: list[str] = []
        self._written = 0
        """How many of `_lines` are in the file: fewer while it cannot be written."""

    def text(self) -> str:
        """All lines of a run that is trained."""
        return "".join(self._lines)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to the file, after those that could not be written before.

        Raises:
            WriteError: it cannot be written now. It is not lost: the next call tries again, and the
                next checkpoint has it.
        """
        self._lines.append(to_json(sealed(line), indent=None))
        content = "".join(self._lines[self._written :]).encode()
        with writing(self.path), open(self.path, "ab", buffering=0) as handle:
            before = handle.seek(0, os.SEEK_END)
            if handle.write(content) < len(content):
                handle.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._written = len(self._lines)

    def read(self, kept: Sequence[str], remedy: str) -> list[dict[str, Any]]:
        """The lines in order, without a last line that a crash cut short.

        Args:
            kept: lines that must be there: those that the newest checkpoint has.

        Raises:
            ValueError: a line is damaged or missing; the message ends with `remedy`.
        """
        lines, found = self._whole_lines(), []
        for number, line in enumerate(lines, 1):
            with reading(f"{self.path}, line {number}", f"{remedy}, or delete the line"):
                parse_sealed(MetricsLine, line)
                found.append(_without_checksum(line))  # in the order of the file
        if missing := len(set(kept) - {line.decode() + "\n" for line in lines}):
            what = f"{missing} lines of the newest checkpoint are missing"
            raise ValueError(f"{self.path}: is damaged: {what}; {remedy}")
        return found

    def go_on(self, step: int, kept: Sequence[str]) -> None:
        """Take the lines up to `step`, from which training goes on; they are not written yet.

        Lines that the checkpoint has, `kept`, are taken from there, later ones from the file, if
        they are sound: a held-out loss that is missing is measured again.
        """
        later = []
        for number, line in enumerate(self._whole_lines() if step else [], 1):
            try:
                with reading(f"{self.path}, line {number}", "it is left out"):
                    if parse_sealed(MetricsLine, line)["step"] <= step:
                        later.append(line.decode() + "\n")
            except ValueError as error:
                log.warning("%s", error)
        if restored := len(set(kept) - set(later)):
            log.warning("%s: %d lines are restored from checkpoint %d", self.path, restored, step)
        self._lines = [*kept, *(line for line in later if line not in set(kept))]
        self._written = len(self._lines)

    def _whole_lines(self) -> list[bytes]:
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []


def _without_checksum(line: bytes) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key != CHECKSUM}
