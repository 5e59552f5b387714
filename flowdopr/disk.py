"""Files: writing atomically, reading with errors that name the file, checksums, the cache, locks.

A file that others may damage or edit carries a checksum of its own content: a JSON object under the
key `checksum`, a text in its first line.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowdopr.exits import reason

LOCK, OWNER = ".lock", ".lock.owner"
"""The lock file of a folder, and the file that names the process that locked it last: on Windows no
other process can read a locked file."""
PART = ".part"
"""Suffix of a file or folder that is being written."""
FULL = 2**20
"""A disk with fewer free bytes is called full."""
CHECKSUM = "checksum"
"""The key of a JSON object that holds the checksum of the others."""
TEXT_SEAL = "# checksum of what follows: "
EDITED = "its checksum is not that of its content, so it was edited or damaged"


class WriteError(OSError):
    """A file cannot be written; what was there before is unchanged."""

    exit_code = 1

    def __init__(self, what: str):
        super().__init__(
            f"{what}; what was written before is kept: free some space, or choose another place, "
            "and repeat the command (train: with --resume)"
        )
        self.what = what
        """The file and the reason, without a remedy."""


def cache_folder() -> Path:
    """`$FLOWDOPR_CACHE`, or `flowdopr` in the user's cache folder."""
    named = os.environ.get("FLOWDOPR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named).expanduser() if named else Path(base) / "flowdopr"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of writing `path`, of which torch and safetensors have their own, into one.

    Raises:
        WriteError: one line that names `path` and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # not torch.save's
        place = next(folder for folder in path.absolute().parents if folder.exists())
        full = shutil.disk_usage(place).free < FULL
        why = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        raise WriteError(f"{path}: cannot be written: {why}") from None


@contextmanager
def replacing(path: Path, suffix: str = PART) -> Iterator[Path]:
    """Yield a temporary file to write, and rename it to `path` at the end of the block.

    A reader sees the old file or the complete new one, even after a power cut.

    Args:
        suffix: of the temporary file; processes that may write `path` at the same time need
            different ones, see `replacing_shared`.

    Raises:
        WriteError: a full disk, for example.
    """
    part = path.with_name(path.name + suffix)
    try:
        with writing(path):
            yield part
            to_disk(part)
            os.replace(part, path)
            names_to_disk(path.parent)
    finally:
        with suppress(OSError):  # its folder may be gone, which the error in flight says
            part.unlink()


@contextmanager
def replacing_shared(path: Path) -> Iterator[Path]:
    """Like `replacing`, for a file that several processes may write at the same time, such as a
    cache; its folder is made if needed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, f".{os.getpid()}{PART}") as part:
        yield part


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Like `replacing`, for a folder: `path` appears with all its files or not at all.

    Its parent is made if needed, but not what that lies in: a disk that is gone stays so.
    """
    part = path.with_name(path.name + PART)
    try:
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
            part.mkdir()
            yield part
            for file in part.iterdir():
                to_disk(file)
            names_to_disk(part)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(part, path)
            names_to_disk(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Delete what a killed process left half written in `folder`."""
    for part in folder.glob(f"*{PART}"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `to_json` atomically, into a folder that is made if needed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json(value))


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """`value` as strict JSON and a line break; a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, not atomically, with the permissions of every other new file."""
    path.touch()
    mode = path.stat().st_mode  # safetensors makes a file that only its owner can read
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    path.chmod(mode)


def to_disk(path: Path) -> None:
    """Wait until the file's content is on the disk and not only in the page cache."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def names_to_disk(folder: Path) -> None:
    """Wait until a new or renamed file of `folder` is found there even after a power cut."""
    if os.name != "posix":  # Windows opens no folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network disks cannot do it
        if error.errno not in (errno.EBADF, errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def reading(path: Path | str, remedy: str) -> Iterator[None]:
    """Turn whatever a missing or damaged file causes within the block into one line.

    Args:
        path: of the file, or a place in it.
        remedy: what the error message tells the user to do.

    Raises:
        ValueError: one line that names `path`, what is wrong with it, and the remedy.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {_damage(error)}; {remedy}") from None


def _damage(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return f"is damaged: {reason(error)[:150]}"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` and its checksum, which `parse_sealed` checks and takes out again."""
    plain = {key: inner for key, inner in value.items() if key != CHECKSUM}
    return plain | {CHECKSUM: _checksum_of_json(plain)}


def parse_sealed(shape: Any, content: bytes) -> Any:
    """As `parse_json`, for what `sealed` returned; a value without a checksum is taken as it is.

    Raises:
        ValueError: also if the checksum is not that of the value.
    """
    value = json.loads(content.decode("utf-8"))
    if isinstance(value, dict) and CHECKSUM in value:
        if value.pop(CHECKSUM) != _checksum_of_json(value):
            raise ValueError(EDITED)
        content = to_json(value, indent=None).encode()
    return parse_json(shape, content)


def sealed_text(text: str) -> str:
    """`text` after a line with its checksum: a file that is cut short still has that line."""
    return f"{TEXT_SEAL}{_checksum(text)}\n{text}"


def check_sealed_text(path: Path, remedy: str) -> None:
    """Check the checksum of a file that `sealed_text` made, if it has one.

    Raises:
        ValueError: see `reading`; the checksum is not that of the text.
    """
    with reading(path, remedy):
        first, _, text = path.read_text(encoding="utf-8").partition("\n")
        if first.startswith(TEXT_SEAL) and first != TEXT_SEAL + _checksum(text):
            raise ValueError(EDITED)


def _checksum_of_json(value: Mapping[str, Any]) -> str:
    """That of the values, in whatever order a reader keeps them."""
    return _checksum(json.dumps(_finite(value), sort_keys=True))


def _checksum(text: str) -> str:
    """64 bits of the SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_json(path: Path, remedy: str, shape: Any = dict[str, Any]) -> Any:
    """The value in the JSON file at `path`.

    Args:
        shape: the type that the value must have, any that pydantic can check.

    Raises:
        ValueError: see `reading`; a value of another type, or with a wrong checksum.
    """
    with reading(path, remedy):
        return parse_sealed(shape, path.read_bytes())


def known_json(path: Path, shape: Any = dict[str, Any]) -> Any:
    """As `read_json`, but None if the file is missing or damaged, for what can be made again."""
    with suppress(ValueError):
        return read_json(path, "", shape)
    return None


_checker = lru_cache(TypeAdapter)  # slow to make


def parse_json(shape: Any, content: str | bytes) -> Any:
    """The value in the JSON text `content`, of the type `shape`.

    Raises:
        ValueError: it is no JSON, or not a `shape`; says where, but not in which file.
    """
    try:
        return _checker(shape).validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


def read_tensors(
    path: Path, remedy: str, wanted: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors in the safetensors file at `path`, on the CPU.

    Args:
        wanted: tensors of the names, shapes and dtypes that the file must have.

    Raises:
        ValueError: see `reading` and `check_fit`.
    """
    with reading(path, remedy):
        found = load_file(path)
    if wanted is not None:
        check_fit(found, wanted, path, remedy)
    return found


def check_fit(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, remedy: str
) -> None:
    """Check that the tensors `found` in the file at `path` have the names, shapes and dtypes of
    those `wanted`.

    Raises:
        ValueError: a tensor that is missing, not wanted or of another shape.
    """
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is not in the model" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        forms = [f"{list(t.shape)} {t.dtype}" for t in (found[name], wanted[name])]
        if forms[0] != forms[1]:
            wrong.append(f"{name} is {forms[0]}, not {forms[1]}")
    if wrong:
        some = ", ".join(sorted(wrong)[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path}: does not fit the model: {some}{more}; {remedy}")


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
    forked processes do not inherit it. It stops only processes that ask for it, not readers. What a
    killed process left half written in `folder` itself is deleted.

    Args:
        remedy: what the error message tells the user to do.
        patience: seconds to wait for another process to release the lock.

    Raises:
        ValueError: another process holds the lock.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    owner = folder / OWNER
    try:
        with FileLock(folder / LOCK, timeout=patience):
            write_text(owner, f"process {os.getpid()} on {platform.node()}")
            remove_parts(folder)
            yield
    except Timeout:
        holder = _first_line(owner) or "another process"
        raise ValueError(f"{folder}: {holder} is at work here; {remedy}") from None


def _first_line(path: Path) -> str:
    """The first 100 characters of a file that may be missing or damaged, as far as they print."""
    with suppress(OSError):
        text = path.read_bytes()[:100].decode(errors="replace")
        return "".join(letter for letter in text if letter.isprintable())
    return ""
