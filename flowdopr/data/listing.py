"""The list of a data set's files in a few arrays, and the index that keeps it from start to start.

As strings and objects, a million paths take hundreds of megabytes, and each loader worker ends up
with a copy. Arrays take a tenth, which forked workers share.

An index is a safetensors file in the cache folder, with a checksum. It holds the sizes and times of
what was listed; who reads it compares them with those of now.
"""

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from flowdopr.data.pixels import suffixes
from flowdopr.disk import cache_folder, replacing_shared, write_tensors

LABEL_FILE = "dataset.json"
INDEXED = 10_000  # images from which on reading an index takes less time than listing
SETTLED = 2 * 10**9  # ns; what changed later than that before it was listed may change unnoticed

Place = tuple[int, ...]
"""Where the bytes of a file are; each kind of source has columns of its own."""
Stamps = dict[str, list[int]]
"""Size and time in ns of each folder or archive that was listed, by its path."""


class Paths(Sequence[str]):
    """Paths as their bytes, one after the other, and the end of each."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> "Paths":
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)[1:]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(len(self)))]
        number = range(len(self))[key]
        start = int(self.ends[number - 1]) if number else 0
        return bytes(self.text[start : self.ends[number]]).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        whole, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield whole[start:end].decode("utf-8", "surrogateescape")
            start = end


@dataclass(frozen=True)
class Listing:
    """What lies under a root. Paths are relative to it, with `/`.

    Attributes:
        paths: of the N images, sorted.
        places: `(N, K)` int64.
        folder_of: `(N,)` int32, the number of the image's folder.
        folders: of all images and of none; without the last `/`.
        label_files: the place of each dataset.json.
        skipped: how many files of each kind are no images.
        climbing: paths that lead out of the root.
        stamps: sizes and times by which a change is noticed.
        crcs: `(N,)` int64, the CRC-32 of each image, once it is known.
    """

    paths: Paths
    places: NDArray[np.int64]
    folder_of: NDArray[np.int32]
    folders: list[str]
    label_files: dict[str, list[int]]
    skipped: dict[str, int]
    climbing: list[str]
    stamps: Stamps
    crcs: NDArray[np.int64] | None = None

    def without(self, rows: Sequence[int]) -> "Listing":
        """The listing of all other images."""
        keep = np.delete(np.arange(len(self.paths)), rows)
        names = list(self.paths)
        crcs = None if self.crcs is None else self.crcs[keep]
        return replace(
            self,
            paths=Paths.of(names[number] for number in keep.tolist()),
            places=self.places[keep],
            folder_of=self.folder_of[keep],
            crcs=crcs,
        )


def list_files(entries: Iterable[tuple[str, Place | None]], stamps: Stamps) -> Listing:
    """The listing of `entries`: each a path, of a folder with `/` at its end, and the file's place,
    None for what is no regular file. Of equal paths the last one counts."""
    known = suffixes()
    images: dict[str, Place] = {}
    label_files, climbing = {}, []
    folders: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    for path, place in entries:
        parts = path.split("/")
        kind = suffix(path)
        if ".." in parts:
            climbing.append(path)
        elif any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        elif path.endswith("/"):
            folders.setdefault(path[:-1], len(folders))
        elif place is not None and kind in known:
            images[path] = place
        elif place is not None and parts[-1] == LABEL_FILE:
            label_files[path] = list(place)
        else:  # what has the suffix of an image and is none is no regular file
            skipped["links to nothing" if kind in known else kind or "without suffix"] += 1
    paths = sorted(images)
    holding = (path.rpartition("/")[0] for path in paths)
    folder_of = [folders.setdefault(folder, len(folders)) for folder in holding]
    columns = len(next(iter(images.values()), (0,)))
    return Listing(
        paths=Paths.of(paths),
        places=np.array([images[path] for path in paths], np.int64).reshape(len(paths), columns),
        folder_of=np.array(folder_of, dtype=np.int32),
        folders=list(folders),
        label_files=label_files,
        skipped=dict(skipped),
        climbing=climbing,
        stamps=stamps,
    )


def index_file(kind: str, root: str) -> Path:
    """Where the index of the source of a `kind` at the real path `root` is."""
    name = hashlib.sha256(f"1\0{kind}\0{root}".encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / f"index-{name[:24]}.safetensors"


def write_index(file: Path, listing: Listing, began: int) -> None:
    """Keep a long `listing` in `file`, unless something that it lists changed just before `began`,
    in ns since 1970: a second change at the same time would not be noticed."""
    if len(listing.paths) < INDEXED:
        return
    if any(changed > began - SETTLED for _, changed in listing.stamps.values()):
        return
    arrays = {
        "text": listing.paths.text,
        "ends": listing.paths.ends,
        "places": listing.places,
        "folder_of": listing.folder_of,
    }
    if listing.crcs is not None:
        arrays["crcs"] = listing.crcs
    keys = ("folders", "label_files", "skipped", "climbing", "stamps")
    notes = json.dumps({key: getattr(listing, key) for key in keys})
    notes = {"notes": notes, "sha256": _checksum(arrays, notes)}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    with suppress(OSError), replacing_shared(file) as part:  # else it is listed again
        write_tensors(part, tensors, notes)


def read_index(file: Path) -> Listing | None:
    """The listing in `file`; None if there is none, or it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            found: dict[str, str] = opened.metadata()
            names = opened.keys()
            # Copies: another machine may replace the file, and what was mapped would be gone.
            arrays = {name: opened.get_tensor(name).numpy().copy() for name in names}
        if _checksum(arrays, found["notes"]) != found["sha256"]:
            return None
    except Exception:  # damaged files fail in many ways
        return None
    paths = Paths(arrays.pop("text"), arrays.pop("ends"))
    return Listing(paths, **arrays, **json.loads(found["notes"]))


def _checksum(arrays: dict[str, Any], notes: str) -> str:
    digest = hashlib.sha256(notes.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


def suffix(path: str) -> str:
    """`.png` of `cat/1.PNG`."""
    return posixpath.splitext(path)[1].lower()
