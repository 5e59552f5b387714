"""The files in ZIP and tar archives, read in place: nothing is extracted.

    {000000..000012}.tar    shards, as webdataset writes them
        a/000.jpg           an image; its key is `a/000`, up to the first dot of the name
        a/000.cls           its label, a whole number
        a/000.json          or its label as {"label": 3}; other entries do not count

Archives that were made on Windows may have `\\` in their names.
"""

import bz2
import os
import posixpath
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from flowdopr.data.listing import LABEL_FILE, Listing, Place, Stamps, list_files, suffix
from flowdopr.data.pixels import suffixes
from flowdopr.data.sources import LARGEST_FILE, Source, shown, stamp, why
from flowdopr.disk import parse_json
from flowdopr.terminal import counting

MOST_OPEN = 256 if hasattr(os, "pread") else 0  # files that one process keeps open
LOCAL_HEADER, NAME_AND_EXTRA = struct.Struct("<26xHH"), 160  # bytes that follow it, at a guess
STORED, DEFLATED, BZIP2, ENCRYPTED = 0, 8, 12, -1
RANGE = re.compile(r"\{(\d{1,7})\.\.(\d{1,7})\}")
LABEL_KINDS, LABEL_BYTES = ("cls", "json"), 2**20  # a larger file is not looked into
BLOCK, PADDING = 512, 2**20  # bytes at the end of a tar: at least a block of zeros

Label = Annotated[int, Field(ge=0, lt=10**6, strict=True)]


class Labelled(BaseModel):
    """What counts in the JSON of an image in a shard."""

    label: Label | None = None


class Pieces:
    """Reads pieces of files, which stay open.

    Threads and forked loader workers may share it, as no position in a file is moved.
    """

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return Pieces, ()

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Up to `size` bytes, fewer at the end of the file."""
        kept = self._files.get(path)
        if kept is None and len(self._files) < MOST_OPEN:
            opened: Any = open(path, "rb", buffering=0)  # noqa: SIM115
            kept = self._files.setdefault(path, opened)
            if kept is not opened:  # another thread was faster
                opened.close()
        if kept is not None:
            return os.pread(kept.fileno(), size, offset)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)


class Archive(Source):
    """The files in a ZIP archive.

    Raises:
        ValueError: there is no such file, or it is no ZIP archive.
    """

    kind = "zip"

    def __init__(self, root: str | Path, setting: str = "data.root", *, afresh: bool = False):
        place = Path(root)
        if not place.is_file():
            folder = place.is_dir()
            remedy = "set data.name=folder for a folder" if folder else "give the archive itself"
            raise ValueError(f"{setting}: there is no ZIP file '{shown(root)}'; {remedy}")
        self._pieces = Pieces()
        super().__init__(place, setting, afresh=afresh)

    def where(self, path: str) -> str:
        return f"{shown(self.root)}:{shown(path)}"

    def crcs(self) -> np.ndarray:
        """Those of the archive's own directory."""
        return self.listing.places[:, 1]

    def _bytes(self, path: str, place: Sequence[int]) -> bytes:
        size, crc, offset, packed, method = place
        if packed > LARGEST_FILE or offset < 0:
            raise ValueError("its entry in the archive's directory is damaged")
        guess = LOCAL_HEADER.size + NAME_AND_EXTRA + packed
        found = self._pieces.read(self.root, offset, guess)
        if len(found) < LOCAL_HEADER.size or not found.startswith(b"PK\3\4"):
            raise ValueError("its header is damaged")
        start = LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack_from(found))
        if start + packed > guess:
            found, start = self._pieces.read(self.root, offset + start, packed), 0
        content = _unpacked(found[start : start + packed], method, size)
        if zlib.crc32(content) != crc:
            raise ValueError("Bad CRC-32")
        return content

    def _stamps(self, of: Stamps) -> Stamps:
        return {"": stamp(self.root)}

    def _listed(self) -> Listing:
        try:
            stamps = self._stamps({})
            with zipfile.ZipFile(self.root) as opened:
                return list_files(map(_entry, opened.infolist()), stamps)
        except Exception as error:  # zipfile fails in many ways on damaged bytes
            raise ValueError(
                f"{self.setting}: '{shown(self.root)}' cannot be read as a ZIP: {why(error)}; copy "
                "or download it again"
            ) from None


def _entry(entry: zipfile.ZipInfo) -> tuple[str, Place]:
    method = ENCRYPTED if entry.flag_bits & 1 else entry.compress_type
    place = (entry.file_size, entry.CRC, entry.header_offset, entry.compress_size, method)
    return _plain(entry.filename), place


def _unpacked(packed: bytes, method: int, size: int) -> bytes:
    """At most `size` + 1 bytes of what was packed, whatever it would expand to."""
    if method == STORED:
        return packed
    if method == DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
    if method == BZIP2:
        return bz2.BZ2Decompressor().decompress(packed, size + 1)
    what = "it is encrypted" if method == ENCRYPTED else f"its compression {method} is not read"
    raise ValueError(f"{what}; pack the archive anew, stored or deflated")


class Shards(Source):
    """The images in one or several uncompressed tar archives, in the order of their names.

    Raises:
        ValueError: there are no such files, one is damaged, or has a label that is none.
    """

    kind = "tar"

    def __init__(self, root: str | Path, setting: str = "data.root", *, afresh: bool = False):
        self.files = _shard_files(str(root), setting)
        self._pieces = Pieces()
        super().__init__(Path(root), setting, afresh=afresh)
        labels = self.listing.places[:, -1]
        if labels.size and labels.max() >= 0 > labels.min():
            bare = self.where(self.names[int(labels.argmin())])
            raise ValueError(
                f"{setting}: '{bare}' has no label, and others have; give each image a .cls, or "
                "none"
            )

    def where(self, path: str) -> str:
        shard, _, member = path.partition("/")
        return f"{shown(self.files[shard])}:{shown(member)}"

    def labels(self) -> Tensor | None:
        labels = self.listing.places[:, -1]
        return torch.from_numpy(labels.copy()) if labels.max() >= 0 else None

    def class_folder(self, folder: str) -> str:
        """The shard tells no class."""
        return folder.partition("/")[2]

    def _bytes(self, path: str, place: Sequence[int]) -> bytes:
        size, offset, _ = place
        content = self._pieces.read(self.files[path.partition("/")[0]], offset, size)
        if len(content) != size:
            raise ValueError(f"{len(content):,} of {size:,} bytes")
        return content

    def _stamps(self, of: Stamps) -> Stamps:
        return {name: stamp(file) for name, file in self.files.items()}

    def _listed(self) -> Listing:
        return list_files(self._entries(), self._stamps({}))

    def _entries(self) -> Iterator[tuple[str, Place | None]]:
        with counting("listing shards", len(self.files)) as progress:
            for shard, file in self.files.items():
                try:
                    yield from self._members(shard, file)
                except Exception as error:  # tarfile fails in many ways on damaged bytes
                    raise ValueError(
                        f"{self.setting}: '{shown(file)}' cannot be read as an uncompressed tar: "
                        f"{why(error)}; mend it, or copy or download it again"
                    ) from None
                progress()

    def _members(self, shard: str, file: Path) -> Iterator[tuple[str, Place | None]]:
        """The files of one shard: (size, offset, label) of the regular ones, -1 for no label."""
        images: dict[str, list[tuple[str, int, int]]] = {}
        labels: dict[str, int] = {}
        for member in _headers(file):
            path = _plain(member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                yield f"{shard}/{path}", None
                continue
            folder, name = posixpath.split(path)
            if name == LABEL_FILE:
                raise ValueError(f"'{shown(path)}' is not read; give each image a .cls of its own")
            key, _, kind = name.partition(".")
            key = posixpath.join(folder, key)
            if kind.lower() in LABEL_KINDS and member.size <= LABEL_BYTES:
                content = self._pieces.read(file, member.offset_data, member.size)
                label = _label(content, kind.lower(), path)
                if label is not None and (kind.lower() == "cls" or key not in labels):
                    labels[key] = label
                    continue
            images.setdefault(key, []).append((path, member.size, member.offset_data))
        for key, files in images.items():
            pictures = [path for path, *_ in files if suffix(path) in suffixes()]
            if key in labels and len(pictures) > 1:
                first, second = map(shown, pictures[:2])
                raise ValueError(f"'{first}' and '{second}' have one label; keep one of them")
            for path, size, offset in files:
                yield f"{shard}/{path}", (size, offset, labels.get(key, -1))


def _shard_files(root: str, setting: str) -> dict[str, Path]:
    """The archives that `root` means, by their names, in order.

    It is one file, a folder of `.tar` files, or a pattern such as `train-{000..012}.tar`.
    """
    place, span = Path(root), RANGE.search(Path(root).name)
    if span and not place.exists():
        first, last = span.groups()
        names = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        before, after = place.name[: span.start()], place.name[span.end() :]
        files = [place.with_name(before + name + after) for name in names]
    elif place.is_dir():
        files = sorted(file for file in place.glob("*.tar") if not file.name.startswith("."))
    else:
        files = [place]
    lost = [file for file in files if not file.is_file()]
    if lost or not files:
        raise ValueError(
            f"{setting}: there is no tar archive '{shown(lost[0] if lost else root)}'; give one, a "
            "folder of them, or a pattern such as 'train-{000..012}.tar'"
        )
    return {file.name: file for file in files}


def _headers(file: Path) -> Iterator[tarfile.TarInfo]:
    """All members of a tar archive.

    Raises:
        ValueError: it does not end as a tar does; tarfile takes a damaged header for the end.
    """
    end, size = 0, file.stat().st_size
    with tarfile.open(file, "r:") as archive:
        for member in archive:
            if archive.offset <= end:  # with a negative size, tarfile would go round for ever
                raise ValueError(f"a negative size at byte {member.offset:,}")
            end = archive.offset
            yield member
        end = archive.offset
    with open(file, "rb") as opened:
        opened.seek(end)
        rest = opened.read(PADDING + 1)
    if not BLOCK <= len(rest) <= PADDING or rest.strip(b"\0"):
        raise ValueError(f"no header and no end at byte {end:,} of {size:,}")


def _label(content: bytes, kind: str, path: str) -> int | None:
    """The label in a `.cls` or `.json`; None if the latter has none."""
    try:
        if kind == "cls":
            return parse_json(Label, content.strip())
        return parse_json(Labelled, content).label
    except ValueError as error:
        raise ValueError(f"'{shown(path)}' holds no label: {shown(error)}") from None


def _plain(path: str) -> str:
    """`cat/1.png` of `.\\cat\\1.png`, as some programs write it into archives."""
    return path.replace("\\", "/").removeprefix("./").lstrip("/")
