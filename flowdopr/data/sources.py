"""The files of a data set, listed and read, but not decoded; those of a folder here.

Links are followed. Hidden files and macOS's `__MACOSX` are not listed.
"""

import hashlib
import os
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from flowdopr.data.listing import (
    Listing,
    Paths,
    Place,
    Stamps,
    index_file,
    list_files,
    read_index,
    write_index,
)
from flowdopr.exits import reason
from flowdopr.terminal import print_line

CHECKSUM_LIMIT = 2**30  # bytes; a larger folder is fingerprinted by names and sizes alone
LARGEST_FILE = 2**30  # bytes of one image, unpacked; more than that is no image


class Source:
    """The files under `root`. Paths are relative to it, with `/`.

    A long list of files is kept in an index, see `listing`.

    Attributes:
        setting: the setting that gave `root`, for messages.
        listing: the images and all else; the first column of its places is the image's size.
        broken: images that are left out of it, and what is wrong with each.
        checked: whether those are all that are broken.
    """

    kind = ""

    def __init__(self, root: Path, setting: str, *, afresh: bool = False):
        """`afresh`: do not look for an index."""
        self.root, self.setting = root, setting
        self.broken: dict[str, str] = {}
        self.checked = False
        self._began, real = time.time_ns(), os.path.realpath(root)
        self._index = index_file(self.kind, real)
        known = None if afresh else read_index(self._index)
        if known and self._stamps(known.stamps) != known.stamps:
            print_line(f"{shown(root)}: changed since it was indexed; its files are listed again")
            known = None
        self.listing = known or self._listed()
        if not known:
            write_index(self._index, self.listing, self._began)

    @property
    def names(self) -> Paths:
        """Sorted paths of the images."""
        return self.listing.paths

    def read(self, number: int) -> bytes:
        """The bytes of the image `names[number]`."""
        place = self.listing.places[number].tolist()
        if place[0] > LARGEST_FILE:
            raise ValueError(f"{place[0]:,} bytes, more than {LARGEST_FILE:,}")
        return self._bytes(self.names[number], place)

    def read_labels(self, path: str) -> bytes:
        """The bytes of one of `listing.label_files`."""
        return self._bytes(path, self.listing.label_files[path])

    def where(self, path: str) -> str:
        """The place of a file, for messages."""
        raise NotImplementedError

    def labels(self) -> Tensor | None:
        """`(N,)` int64 where the source itself says the label of each image."""
        return None

    def class_folder(self, folder: str) -> str:
        """The part of a folder's path that may tell a class."""
        return folder

    def crcs(self) -> np.ndarray:
        """`(N,)` CRC-32 of each image; 0 for every one if all together exceed 1 GiB.

        Raises:
            ValueError: an image cannot be read.
        """
        if self.listing.crcs is not None:
            return self.listing.crcs
        sizes = self.listing.places[:, 0]
        crcs = np.zeros(len(sizes), np.int64)
        if sizes.sum() <= CHECKSUM_LIMIT:
            crcs[:] = [self._crc(number) for number in range(len(sizes))]
        self.listing = replace(self.listing, crcs=crcs)
        write_index(self._index, self.listing, self._began)
        return crcs

    def state(self) -> str:
        """A sha256 that changes whenever an image is written anew."""
        archives = {path: at for path, at in self.listing.stamps.items() if at[0]}
        digest = hashlib.sha256(repr((os.path.realpath(self.root), archives)).encode())
        for part in (self.names.text, self.names.ends, self.listing.places):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def leave_out(self, broken: Mapping[str, str]) -> None:
        """Take the images `broken` out of the listing; all others were found whole."""
        self.crcs()  # the index is that of all images
        rows = [number for number, name in enumerate(self.names) if name in broken]
        self.listing = self.listing.without(rows)
        self.broken, self.checked = dict(broken), True

    def remarks(self) -> list[str]:
        """What is not used, and why."""
        kinds = sorted(self.listing.skipped.items(), key=lambda item: (-item[1], item[0]))
        found = ", ".join(f"{count} {shown(kind)}" for kind, count in kinds[:5])
        remarks = [f"skipped as no images: {found}"] if kinds else []
        if climbing := self.listing.climbing:
            what = f"{len(climbing):,} that lead out of '{shown(self.root)}'"
            remarks.append(f"skipped by their names: {what}, the first is '{shown(climbing[0])}'")
        if self.broken:
            name, reason = next(iter(self.broken.items()))
            first = f"the first is {self.where(name)} ({reason})"
            remarks.append(f"skipped as broken: {len(self.broken):,}, {first}")
        return remarks

    def _bytes(self, path: str, place: Sequence[int]) -> bytes:
        raise NotImplementedError

    def _stamps(self, of: Stamps) -> Stamps:
        """The stamps of now, where those of a listing are `of`."""
        raise NotImplementedError

    def _listed(self) -> Listing:
        raise NotImplementedError

    def _crc(self, number: int) -> int:
        try:
            return zlib.crc32(self.read(number))
        except Exception as error:
            place = self.where(self.names[number])
            raise ValueError(
                f"{self.setting}: cannot read the image '{place}' ({why(error)}); put it back, "
                "make it readable or remove it"
            ) from None


class Folder(Source):
    """The files under a folder.

    Raises:
        ValueError: there is no such folder, or it or one below it cannot be listed, or a link leads
            back to a folder that holds the link.
    """

    kind = "folder"

    def __init__(self, root: str | Path, setting: str = "data.root", *, afresh: bool = False):
        place = Path(root)
        if not place.is_dir():
            archive = place.is_file() and zipfile.is_zipfile(place)
            remedy = "set data.name=zip for an archive" if archive else "give the folder of images"
            raise ValueError(f"{setting}: there is no folder '{shown(root)}'; {remedy}")
        self._prefix = os.path.join(place, "")
        super().__init__(place, setting, afresh=afresh)

    def where(self, path: str) -> str:
        return shown(self.root / path)

    def read_labels(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def _bytes(self, path: str, place: Sequence[int]) -> bytes:
        """Refuses a file that is not the one that was listed: its label may be another's."""
        with open(self._prefix + path, "rb", buffering=0) as file:
            now = os.fstat(file.fileno())
            if [now.st_size, now.st_mtime_ns] != list(place):
                again = f"flowdopr check {shown(self.root)}"
                raise OSError(f"changed since it was listed: {again} lists all anew")
            return file.readall()

    def _stamps(self, of: Stamps) -> Stamps:
        found = {}
        for path in of:
            try:
                found[path] = stamp(self._prefix + path)
            except OSError:
                found[path] = []
        return found

    def _listed(self) -> Listing:
        above = frozenset(map(str, Path(os.path.realpath(self.root)).parents))
        stamps: Stamps = {}
        try:
            return list_files(_below(os.fspath(self.root), above, stamps), stamps)
        except OSError as error:
            what = f"cannot list '{shown(error.filename)}' ({error.strerror}); make it readable"
            raise ValueError(f"{self.setting}: {what}, or move it away") from None
        except ValueError as error:
            raise ValueError(f"{self.setting}: {error}") from None


def fingerprint_files(source: Source, settings: Sequence[object]) -> str:
    """sha256 over the settings and each image's name, size and CRC-32.

    Of a folder of more than 1 GiB only names and sizes count: reading it all at every start would
    take minutes. A ZIP archive brings its CRCs along.
    """
    columns = (source.names, source.listing.places[:, 0].tolist(), source.crcs().tolist())
    lines = (f"{name}\0({size}, {crc})\n" for name, size, crc in zip(*columns, strict=True))
    text = repr(tuple(settings)) + "".join(lines)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def stamp(path: str | Path) -> list[int]:
    """Size and time in ns of a file; the size of a folder is left out, as disks differ in it."""
    now = os.stat(path)
    return [0 if stat.S_ISDIR(now.st_mode) else now.st_size, now.st_mtime_ns]


def shown(path: object) -> str:
    """A path on one line, with escapes for what is no UTF-8 or cannot be printed."""
    readable = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in readable)


def why(error: Exception) -> str:
    """`reason` in letters that can be printed."""
    return shown(reason(error))


def _below(
    folder: str, above: frozenset[str], stamps: Stamps, prefix: str = ""
) -> Iterator[tuple[str, Place | None]]:
    """All paths below `folder`, with sizes and times of regular files; folders end with `/`.

    Args:
        above: the real paths of all folders that hold this one.
        stamps: gets that of each folder, taken before it is listed.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(
            f"the link '{shown(folder)}' leads back to '{shown(real)}', which holds it; "
            "remove the link"
        )
    stamps[prefix] = stamp(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            link = entry.is_symlink()  # of a link that leads to itself, entry.is_dir() would raise
            if not (os.path.isdir(entry.path) if link else entry.is_dir()):
                yield prefix + entry.name, _place(entry, link)
            elif not entry.name.startswith("."):
                path = f"{prefix}{entry.name}/"
                yield path, None
                yield from _below(entry.path, above | {real}, stamps, path)


def _place(entry: os.DirEntry, link: bool) -> Place | None:
    """Size and time of a regular file that may be an image."""
    if not (os.path.isfile(entry.path) if link else entry.is_file()):
        return None
    found = entry.stat()
    return found.st_size, found.st_mtime_ns
