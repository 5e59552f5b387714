"""Finding the images that cannot be decoded before training meets them.

With `data.on_bad_image: skip` all are decoded once, and the result is cached under the names, sizes
and times of the files. So every process, and a run that is resumed, leaves out the same images.
"""

import hashlib
import math
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL

from flowdopr.data.files import BadImage, ImageFiles, load
from flowdopr.data.info import Datasets
from flowdopr.data.sources import Source, shown
from flowdopr.disk import cache_folder, known_json, replacing_shared, to_json
from flowdopr.terminal import counting

START_SECONDS = 10.0  # that training spends on each split
THREADS, TOGETHER = 16, 256  # enough to hide the latency of a network disk

Item = TypeVar("Item", bound=Hashable)
Fault = TypeVar("Fault", bound=ValueError)


def check_start(datasets: Datasets, seconds: float = START_SECONDS) -> list[str]:
    """Read images of both splits as training does, each for at most `seconds`, in a fixed order.

    The next start goes on where this one has stopped, so that many runs on the same images, as in
    a study, do not read the same ones again. Returns remarks on what was not looked at.

    Raises:
        ValueError: an image cannot be used.
    """
    remarks = []
    for part in (datasets.train, datasets.held_out):
        if not isinstance(part, ImageFiles):
            continue
        kept = _start_file(part)
        before = min((known_json(kept, dict[str, int]) or {}).get("read", 0), len(part))
        order = np.random.RandomState(0).permutation(len(part))[before:].tolist()
        done, found = _faults(part.__getitem__, order, seconds, ValueError)
        if found:
            more = f"; so it is with {len(found)} of the {done:,} images looked at"
            raise ValueError(f"{next(iter(found.values()))}{more if len(found) > 1 else ''}")
        if done:
            _keep(kept, {"read": before + done})
        if before + done < len(part) and not part.source.checked and _known(part.source) != {}:
            place = shown(part.source.root)
            earlier = " after those of earlier starts" if before else ""
            remarks.append(
                f"{done:,} of {len(part):,} images in '{place}' were looked at in {seconds:g} s"
                f"{earlier}; flowdopr check {place} decodes all"
            )
    return remarks


def _start_file(part: ImageFiles) -> Path:
    """Where the number of images that `check_start` has read is kept for these very files, brought
    to this very shape."""
    digest = hashlib.sha256(part.source.state().encode())
    digest.update(repr(part.image_shape).encode())
    digest.update(part.indices.numpy().tobytes())
    return cache_folder() / f"read-{digest.hexdigest()[:24]}-pillow-{PIL.__version__}.json"


def check_all(source: Source) -> dict[str, BadImage]:
    """What is wrong with each image of `source` that cannot be used, by name. Decodes all of them.

    The result is kept for `broken_images`, unless a file could not be read at all.
    """
    kept = _cache_file(source)
    _, faults = _faults(partial(load, source), range(len(source.names)), math.inf, BadImage)
    found = {source.names[number]: bad for number, bad in faults.items()}
    if all(bad.decoding for bad in found.values()):
        reasons = {name: bad.reason for name, bad in found.items()}
        _keep(kept, reasons)
    return found


def _keep(kept: Path, content: object) -> None:
    """Write a cache file; where that fails, the next one reads the images again."""
    with suppress(OSError), replacing_shared(kept) as part:
        part.write_text(to_json(content), encoding="utf-8")


def broken_images(source: Source) -> dict[str, str]:
    """The reason of each image of `source` that cannot be decoded, by name; cached.

    Raises:
        BadImage: a file could not be read at all, which another try may mend.
    """
    known = _known(source)
    if known is not None:
        return known
    found = check_all(source)
    for bad in found.values():
        if not bad.decoding:
            raise bad
    return {name: bad.reason for name, bad in found.items()}


def _known(source: Source) -> dict[str, str] | None:
    """What `check_all` found and kept for these very files; None if there is nothing."""
    return known_json(_cache_file(source), dict[str, str])


def _cache_file(source: Source) -> Path:
    return cache_folder() / f"broken-{source.state()[:24]}-pillow-{PIL.__version__}.json"


def _faults(
    read: Callable[[Item], object], items: Sequence[Item], seconds: float, kind: type[Fault]
) -> tuple[int, dict[Item, Fault]]:
    """Read `items` in order for about `seconds`: how many were read, and the errors of a `kind`."""

    def fault(item: Item) -> Fault | None:
        try:
            read(item)
        except kind as error:
            return error
        return None

    found, done, deadline = {}, 0, time.monotonic() + seconds
    with (
        ThreadPoolExecutor(THREADS) as pool,
        counting("checking images", len(items)) as progress,
    ):
        while done < len(items) and time.monotonic() < deadline:
            chunk = items[done : done + TOGETHER]
            for item, error in zip(chunk, pool.map(fault, chunk), strict=True):
                found |= {item: error} if error else {}
                progress()
            done += len(chunk)
    return done, found
