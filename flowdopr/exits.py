"""How an error ends a command: its exit code, its one line, the process that prints it, and whether
too little memory caused it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType
from typing import Any

KEPT = {
    "train": "steps after the newest checkpoint are lost; go on with --resume",
    "sample": "complete batches are kept; the same command goes on",
    "evaluate": "no card is written, others stay as they were; the same command starts anew",
    "compare": "finished runs are kept; the same command goes on",
    "check": "nothing is kept of it; the same command starts anew",
    "configs": "it changes nothing",
    "status": "it changes nothing",
    "export": "nothing is kept of it; the same command starts anew",
    "encode": "complete files are kept; the same command goes on",
}
"""What remains of each command's work after Ctrl-C stops it at once."""

LESS_MEMORY = {
    "train": "raise train.accumulation_steps, lower train.global_batch_size, or use "
    "train.precision=bf16",
    "sample": "lower --batch-size",
    "evaluate": "lower sample.batch_size or evaluate.fid_num_images",
    "compare": "lower compare.workers or train.global_batch_size",
    "encode": "lower --batch-size",
    "check": "one image needs more than there is: take the largest out",
}
"""The settings of each command that decide how much memory it needs."""


FIRST = "flowdopr/first-failure"
"""The key under which the first process that fails stores its rank and line."""


class Stopped(Exception):
    """Ctrl-C stopped a command at once."""

    exit_code = 130


class OutOfMemory(Exception):
    """There was too little memory on the device or the machine."""

    exit_code = 1


class WrongInstallation(Exception):
    """Packages that are installed do not fit together."""

    exit_code = 2


@contextmanager
def importing() -> Iterator[None]:
    """Within the block, Ctrl-C prints one line and leaves at once: libraries that are interrupted
    while they are imported hide that, or fail later. Outside the main thread it does nothing.

    Raises:
        WrongInstallation: torchvision was built for another torch than the installed one.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, _leave) if main else None
    try:
        yield
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        pair = " and ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
        raise WrongInstallation(
            f"{pair} do not fit together: install them again as a pair, by pip install --upgrade "
            "--force-reinstall torch torchvision (both from the same index)"
        ) from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"flowdopr: stopped before it began\n")
    os._exit(128 + number)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had too little memory; torch has an error for each."""
    texts = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    plain = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return plain or isinstance(error, MemoryError)


def exit_code(error: Any) -> int | None:
    """The exit code of an error that its message explains; None for a bug."""
    if hasattr(error, "exit_code"):  # a wrong option, Interrupted, TrainingFailed, a failed study
        return int(error.exit_code)
    return 2 if isinstance(error, ValueError | OSError) else None


def one_line(error: Any) -> str:
    """The message of the error, without line breaks."""
    if is_out_of_memory(error):
        return "out of memory"
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split()) or type(error).__name__


def reason(error: Exception) -> str:
    """What a library's error says, on one line, for a message about the file that it read.

    Raises:
        Exception: `error` itself, if there was too little memory: no file is to blame for that.
    """
    if is_out_of_memory(error):
        raise error
    return " ".join(str(error).split()) or type(error).__name__


def end(message: str, code: int) -> int:
    """Print `message` and return `code`."""
    print(f"flowdopr: {message}", file=sys.stderr)
    return code


def end_with(error: Exception) -> int | None:
    """Print the one line of `error` and return its exit code; None for a bug, which needs more.

    Of several processes, each says its own error, with its rank, unless another one said the same.
    Those that only lost the connection to a process that failed say that.
    """
    code, line, rank = exit_code(error), one_line(error), int(os.environ.get("RANK", "0"))
    store = _store()
    if store is None:  # the processes of one machine still do and read the same
        speaks = rank == 0 or os.environ.get("LOCAL_RANK") == "0"
        return end(line, code) if speaks and code is not None else code
    if _is_lost_connection(error):
        why = "another process failed, died or hangs, see its line; FLOWDOPR_TRACEBACK=1 shows more"
        return end(f"process {rank}: stopped, because {why}", 1)
    try:
        first = store.compare_set(FIRST, "", f"{rank}: {line}").decode()
    except RuntimeError:  # the process that holds the store is gone
        first = ""
    speaker, _, said = first.partition(": ")
    speaks = speaker == str(rank) or said != line
    return end(f"process {rank}: {line}", code) if speaks and code is not None else code


def _store() -> Any:
    """What the processes of this launch share; None for one process, or before they connect."""
    distributed = sys.modules.get("torch.distributed")  # importing torch would take seconds
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective operation failed because another process is gone."""
    name = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in name or (isinstance(error, RuntimeError) and "gloo" in str(error))
