"""The exit code of a command, and the one line that explains an error."""

from __future__ import annotations

import os
import sys
from typing import Any

from typer.core import TyperGroup

KEPT = {
    "train": "steps after the newest checkpoint are lost; go on with --resume",
    "sample": "complete batches are kept; the same command goes on",
    "evaluate": "no card is written, others stay as they were; the same command starts anew",
    "compare": "finished runs are kept; the same command goes on",
    "check": "nothing is kept of it; the same command starts anew",
    "encode": "complete files are kept; the same command goes on",
}
"""What remains of each command's work after Ctrl-C stops it at once."""


class Stopped(Exception):
    """Ctrl-C stopped a command at once."""

    exit_code = 130


class Commands(TyperGroup):
    """Commands that on Ctrl-C raise `Stopped`, which one line explains."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            name = ctx.invoked_subcommand
            raise Stopped(f"{name} stopped; {KEPT[name]}") from None


def exit_code(error: Any) -> int | None:
    """The exit code of an error that its message explains; None for a bug."""
    if hasattr(error, "exit_code"):  # a wrong option, Interrupted, TrainingFailed, a failed study
        return int(error.exit_code)
    return 2 if isinstance(error, ValueError | OSError) else None


def one_line(error: Any) -> str:
    """The message of the error, without line breaks."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split())


def end(message: str, code: int) -> int:
    """Print `message`, once for all processes of a launch, and return `code`."""
    if os.environ.get("RANK", "0") == "0":
        print(f"flowdopr: {message}", file=sys.stderr)
    return code
