"""Writing files atomically, the folder of cached files, and locking a folder for one process."""

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
except ImportError:  # Windows has no fcntl, so nothing is locked there
    fcntl = None

LOCK = ".lock"
"""The lock file of a folder; it names the process that locked it last."""
SECONDS_BETWEEN_TRIES = 0.2


def cache_folder() -> Path:
    """`$FLOWDOPR_CACHE`, or `flowdopr` in the user's cache folder."""
    named = os.environ.get("FLOWDOPR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "flowdopr"


@contextmanager
def replacing(path: Path, suffix: str = ".part") -> Iterator[Path]:
    """Yield a temporary file to write, and rename it to `path` at the end of the block.

    A reader sees the old file or the complete new one, even after a power cut.

    Args:
        suffix: of the temporary file; processes that may write `path` at the same time need
            different ones.
    """
    part = path.with_name(path.name + suffix)
    try:
        yield part
        to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def to_disk(path: Path) -> None:
    """Wait until the file's content is on the disk and not only in the page cache."""
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
    """Lock `folder`, which is created if needed, within the block.

    The operating system holds the lock and releases it when the process ends, however it ends;
    forked processes do not inherit it. It stops only processes that ask for it, not readers.

    Args:
        remedy: what the error message tells the user to do.
        patience: seconds to wait for another process to release the lock.

    Raises:
        ValueError: another process holds the lock.
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
    """Whether this process now holds the lock; True on file systems without locks."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
