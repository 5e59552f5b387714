"""Files that are whole or not there: written beside their place and renamed into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
