"""How a command ends: its exit code, and the one line that says why."""

from __future__ import annotations

import os
import sys
from typing import Any

from typer.core import TyperGroup

KEPT = {
    "train": "what came after the newest checkpoint is lost; go on with --resume",
    "sample": "nothing is written; the same command starts anew",
    "evaluate": "no card is written, others stay as they were; the same command measures anew",
    "compare": "what is done is kept; the same command goes on",
    "encode": "files that are whole are kept; the same command goes on",
}
"""What a Ctrl-C leaves behind, of commands that it ends at once."""


class Stopped(Exception):
    """Ctrl-C ended a command at once."""

    exit_code = 130


class Commands(TyperGroup):
    """Commands that end in one line on Ctrl-C, too."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            name = ctx.invoked_subcommand
            raise Stopped(f"{name} stopped; {KEPT[name]}") from None


def exit_code(error: Any) -> int | None:
    """The exit code of an error that one line explains, None for a fault of ours."""
    if hasattr(error, "exit_code"):  # a wrong option, Interrupted, TrainingFailed, a failed study
        return int(error.exit_code)
    return 2 if isinstance(error, ValueError | OSError) else None


def one_line(error: Any) -> str:
    """What the error says, without line breaks."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split())


def end(message: str, code: int) -> int:
    """Say `message`, once for all processes of a launch, and return `code`."""
    if os.environ.get("RANK", "0") == "0":
        print(f"flowdopr: {message}", file=sys.stderr)
    return code
