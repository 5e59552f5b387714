"""Files that are whole or not there, and folders that one process at a time works in."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows: there nothing is locked
    fcntl = None

LOCK = ".lock"
"""In a locked folder: the file that bears the lock, and says who took it last."""
SECONDS_BETWEEN_TRIES = 0.2


@contextmanager
def replacing(path: Path, suffix: str = ".part") -> Iterator[Path]:
    """Yields the file to write in place of `path`, and renames it when the block is through.

    A reader sees the old file or the new one, never a part, even after a power cut.

    Args:
        suffix: of the file to write; processes that may write `path` at once need different ones.
    """
    part = path.with_name(path.name + suffix)
    try:
        yield part
        to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """`content` into `path`, by `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8 into `path`, by `replacing`."""
    write_bytes(path, text.encode("utf-8"))


def to_disk(path: Path) -> None:
    """Wait until the file's content is on the disk, and not only in the machine's memory."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of the file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path, remedy: str, *, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes out of `folder`, which is made if need be, within the block.

    The lock is the operating system's and ends with the process, however it ends; forked processes
    do not inherit it. Only who asks for the lock is kept out: readers are not.

    Args:
        remedy: what to do instead, for the message.
        patience: seconds to wait for a process that is at work here.

    Raises:
        ValueError: another process is at work here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as handle:
        deadline = time.monotonic() + patience
        while not _lock(handle):
            if time.monotonic() >= deadline:
                handle.seek(0)
                raise ValueError(f"{folder}: {handle.read()} is at work here; {remedy}")
            time.sleep(SECONDS_BETWEEN_TRIES)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {platform.node()}")
        handle.flush()
        yield


def _lock(handle: IO[str]) -> bool:
    """Whether the lock is ours now; also where the file system knows no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
