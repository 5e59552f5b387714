"""The command line: it runs one command and ends with its exit code.

Bad input ends with one line and exit code 2, a run that failed with 1, a signal with 128 + its
number, success with 0. This file imports little, so that Ctrl-C finds it ready at once.
"""

from __future__ import annotations

import os
import sys

from flowdopr.exits import Stopped, end_with, importing


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run_command(arguments))


def run_command(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. FLOWDOPR_TRACEBACK=1 shows tracebacks."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with importing():
            from flowdopr.commands import command
            from flowdopr.terminal import heartbeat
        arguments = arguments or ["--help"]
        with heartbeat("flowdopr"):
            return command.main(arguments, prog_name="flowdopr", standalone_mode=False) or 0
    except KeyboardInterrupt:
        error: Exception = Stopped("stopped before it began")
    except Exception as caught:
        error = caught
    code = None if os.environ.get("FLOWDOPR_TRACEBACK") else end_with(error)
    if code is None:
        raise error
    return code
