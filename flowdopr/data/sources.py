"""The files of a folder or of a ZIP archive, listed and read, but not decoded.

Links are followed. Hidden files and macOS's `__MACOSX` are not listed. Archives are read without
extracting them; an archive that was made on Windows may have `\\` in its names.
"""

import hashlib
import os
import posixpath
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from flowdopr.data.pixels import suffixes
from flowdopr.exits import reason

CHECKSUM_LIMIT = 2**30  # bytes; a larger folder is fingerprinted by names and sizes alone
LABEL_FILE = "dataset.json"


class Source:
    """The files under `root`. Paths are relative to it, with `/`.

    Attributes:
        setting: the setting that gave `root`, for messages.
        names: sorted paths of the images.
        others: sorted paths of all else; those of folders end with `/`.
        broken: images that are left out of `names`, and what is wrong with each.
        checked: whether those are all that are broken.
    """

    def __init__(self, root: Path, setting: str, listed: Iterable[tuple[str, bool]]):
        """`listed` are paths, and whether each is a file."""
        self.root, self.setting = root, setting
        self.names, self.others = [], []
        self.broken: dict[str, str] = {}
        self.checked = False
        for path, is_file in listed:
            if not any(part.startswith((".", "__MACOSX")) for part in path.split("/")):
                image = is_file and suffix(path) in suffixes()
                (self.names if image else self.others).append(path)
        self.names.sort()
        self.others.sort()

    def read(self, path: str) -> bytes:
        raise NotImplementedError

    def where(self, path: str) -> str:
        """The place of a file, for messages."""
        raise NotImplementedError

    def stamps(self) -> list[tuple[int, int]]:
        """(size, CRC-32) of each image."""
        raise NotImplementedError

    def state(self) -> str:
        """A sha256 that changes whenever a file of `names` is written anew."""
        raise NotImplementedError

    def leave_out(self, broken: Mapping[str, str]) -> None:
        """Take the images `broken` out of `names`; all others were found whole."""
        self.names = [name for name in self.names if name not in broken]
        self.broken, self.checked = dict(broken), True

    def remarks(self) -> list[str]:
        """What is not used, and why."""
        kinds: Counter[str] = Counter()
        for path in self.others:
            if not path.endswith("/") and posixpath.basename(path) != LABEL_FILE:
                # What has the suffix of an image and is not one of `names` is no regular file.
                kind = "links to nothing" if suffix(path) in suffixes() else suffix(path)
                kinds[kind or "without suffix"] += 1
        found = ", ".join(f"{count} {shown(kind)}" for kind, count in kinds.most_common(5))
        remarks = [f"skipped as no images: {found}"] if kinds else []
        if self.broken:
            name, reason = next(iter(self.broken.items()))
            first = f"the first is {self.where(name)} ({reason})"
            remarks.append(f"skipped as broken: {len(self.broken):,}, {first}")
        return remarks


class Folder(Source):
    """The files under a folder.

    Raises:
        ValueError: there is no such folder, or it or one below it cannot be listed, or a link leads
            back to a folder that holds the link.
    """

    def __init__(self, root: str | Path, setting: str = "data.root"):
        place = Path(root)
        if not place.is_dir():
            archive = place.is_file() and zipfile.is_zipfile(place)
            remedy = "set data.name=zip for an archive" if archive else "give the folder of images"
            raise ValueError(f"{setting}: there is no folder '{shown(root)}'; {remedy}")
        above = frozenset(map(str, Path(os.path.realpath(place)).parents))
        try:
            super().__init__(place, setting, _below(os.fspath(place), above))
        except OSError as error:
            what = f"cannot list '{shown(error.filename)}' ({error.strerror}); make it readable"
            raise ValueError(f"{setting}: {what}, or move it away") from None
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from None

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def where(self, path: str) -> str:
        return shown(self.root / path)

    def stamps(self) -> list[tuple[int, int]]:
        """(size, CRC-32) of each image; 0 for every CRC where the folder exceeds 1 GiB."""
        sizes = [(self.root / name).stat().st_size for name in self.names]
        read = sum(sizes) <= CHECKSUM_LIMIT
        return [
            (size, zlib.crc32(self.read(name)) if read else 0)
            for name, size in zip(self.names, sizes, strict=True)
        ]

    def state(self) -> str:
        stats = [(self.root / name).stat() for name in self.names]
        return _digest(
            [os.path.realpath(self.root)], self.names, [(s.st_size, s.st_mtime_ns) for s in stats]
        )


class Archive(Source):
    """The files in a ZIP archive, read in place.

    Each process opens the file for itself at its first read: a file position shared with a forked
    loader worker would hand one process the other's bytes.

    Raises:
        ValueError: there is no such file, or it is no ZIP archive.
    """

    def __init__(self, root: str | Path, setting: str = "data.root"):
        self.root = Path(root)
        if not self.root.is_file():
            folder = self.root.is_dir()
            remedy = "set data.name=folder for a folder" if folder else "give the archive itself"
            raise ValueError(f"{setting}: there is no ZIP file '{shown(root)}'; {remedy}")
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        try:
            self._entries = {_plain(entry.filename): entry for entry in self._zip().infolist()}
        except Exception as error:  # zipfile fails in many ways on damaged bytes
            raise ValueError(
                f"{setting}: '{shown(root)}' cannot be read as a ZIP: {why(error)}; copy or "
                "download it again"
            ) from None
        listed = ((path, not path.endswith("/")) for path in self._entries)
        super().__init__(self.root, setting, listed)

    def _zip(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.root))
        return self._opened[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}

    def read(self, path: str) -> bytes:
        return self._zip().read(self._entries[path])

    def where(self, path: str) -> str:
        return f"{shown(self.root)}:{shown(path)}"

    def stamps(self) -> list[tuple[int, int]]:
        """(size, CRC-32) of each image, from the archive's own directory."""
        return [(self._entries[name].file_size, self._entries[name].CRC) for name in self.names]

    def state(self) -> str:
        stat = self.root.stat()
        return _digest([stat.st_size, stat.st_mtime_ns], self.names, self.stamps())


def fingerprint_files(source: Source, settings: Sequence[object]) -> str:
    """sha256 over the settings and each image's name, size and CRC-32.

    Of a folder of more than 1 GiB only names and sizes count: reading it all at every start would
    take minutes. An archive brings its CRCs along.
    """
    return _digest(settings, source.names, source.stamps())


def _digest(settings: Sequence[object], names: list[str], stamps: Sequence[object]) -> str:
    digest = hashlib.sha256(repr(tuple(settings)).encode())
    for name, stamp in zip(names, stamps, strict=True):
        digest.update(f"{name}\0{stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def shown(path: object) -> str:
    """A path on one line, with escapes for what is no UTF-8 or cannot be printed."""
    readable = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in readable)


def why(error: Exception) -> str:
    """`reason` in letters that can be printed."""
    return shown(reason(error))


def suffix(path: str) -> str:
    """`.png` of `cat/1.PNG`."""
    return posixpath.splitext(path)[1].lower()


def _plain(path: str) -> str:
    """`cat/1.png` of `.\\cat\\1.png`, as some programs write it into archives."""
    return path.replace("\\", "/").removeprefix("./").lstrip("/")


def _below(folder: str, above: frozenset[str], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """All paths below `folder`, and whether each is a file; those of folders end with `/`.

    Args:
        above: the real paths of all folders that hold this one.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(
            f"the link '{shown(folder)}' leads back to '{shown(real)}', which holds it; "
            "remove the link"
        )
    with os.scandir(folder) as entries:
        for entry in entries:
            link = entry.is_symlink()  # of a link that leads to itself, entry.is_dir() would raise
            if not (os.path.isdir(entry.path) if link else entry.is_dir()):
                yield prefix + entry.name, os.path.isfile(entry.path) if link else entry.is_file()
            elif not entry.name.startswith("."):
                path = f"{prefix}{entry.name}/"
                yield path, False
                yield from _below(entry.path, above | {real}, path)
