"""Writing latents in shards, each atomically, so that an interrupted encoding can be continued.

Shapes: images float32 `(B, C, H, W)` in [-1, 1]; means and deviations `(B, L, h, w)`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowdopr.data.info import Datasets
from flowdopr.data.loader import span_batches
from flowdopr.disk import file_sha256, replacing, write_json, write_tensors
from flowdopr.latents.notes import NOTES, SPLITS

DTYPES = {"float16": torch.float16, "float32": torch.float32}
KEPT = ("posterior", "mean")

# Images (B, C, H, W) in [-1, 1] -> mean, std (B, L, h, w) of their latents, shifted and scaled.
Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]


class Span(NamedTuple):
    """The images of one shard: a split and a range of it."""

    split: str
    images: range

    @property
    def file(self) -> str:
        return f"{self.split}-{self.images.start:08d}.safetensors"


@dataclass(frozen=True)
class Encoding:
    """The settings of an encoding.

    Attributes:
        source: settings of the data set.
        autoencoder: name, weights_sha256, scale, shift.
        kept: "posterior" (mean and deviation) or "mean".
        dtype: a key of DTYPES.
        mirrored: also encode the mirror image of each image.
        shard_size, batch_size: numbers of images.

    Raises:
        ValueError: an unknown `kept` or `dtype`.
    """

    source: dict[str, Any]
    autoencoder: dict[str, Any]
    image_shape: tuple[int, int, int]
    kept: str = "posterior"
    dtype: str = "float16"
    mirrored: bool = False
    shard_size: int = 8192
    batch_size: int = 32
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("kept", self.kept, KEPT), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"encode: {name}={value!r}: choose one of {', '.join(known)}")

    def identity(self, datasets: Datasets, span: Span) -> str:
        """A text that is equal exactly for shards with equal content."""
        weights = {key: value for key, value in self.autoencoder.items() if key != "name"}
        parts = [datasets.info.fingerprint, weights, self.kept, self.dtype, self.mirrored]
        where = [span.split, span.images.start, span.images.stop]
        return json.dumps([*parts, *where], sort_keys=True)

    def spans(self, datasets: Datasets) -> list[Span]:
        """All shards in order."""
        sizes = (len(datasets.train), len(datasets.held_out))
        return [
            Span(split, range(first, min(first + self.shard_size, size)))
            for split, size in zip(SPLITS, sizes, strict=True)
            for first in range(0, size, self.shard_size)
        ]


def write_shards(
    out: Path,
    datasets: Datasets,
    encoder: Encoder,
    encoding: Encoding,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] = lambda number: None,
) -> None:
    """Write this process's share of the shards that do not exist yet.

    Raises:
        ValueError: a shard of another encoding exists, or a number is too large for the dtype.
    """
    out.mkdir(parents=True, exist_ok=True)
    for span in encoding.spans(datasets)[rank::world_size]:
        if not _is_there(out / span.file, encoding.identity(datasets, span)):
            tensors = _encoded(datasets, encoder, encoding, span)
            _save(out / span.file, tensors, encoding.identity(datasets, span))
        progress(len(span.images))


def write_notes(
    out: Path, datasets: Datasets, encoding: Encoding, versions: dict[str, str]
) -> Path:
    """Write latents.json, which marks the encoding as complete; returns its path."""
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for span in encoding.spans(datasets):
        path = out / span.file
        entry = {"file": span.file, "images": len(span.images), "bytes": path.stat().st_size}
        shards[span.split].append(entry | {"sha256": file_sha256(path)})
    notes = {
        "format": 1,
        "source": {"data": encoding.source, "info": datasets.info.to_dict()},
        "autoencoder": encoding.autoencoder,
        "image_shape": list(encoding.image_shape),
        "kept": encoding.kept,
        "dtype": encoding.dtype,
        "mirrored": encoding.mirrored,
        "shards": shards,
        "versions": versions,
    }
    write_json(out / NOTES, notes)
    return out / NOTES


def _is_there(path: Path, identity: str) -> bool:
    """Whether the shard exists and can be read.

    Raises:
        ValueError: it belongs to another encoding.
    """
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("flowdopr")
    except SafetensorError:
        return False
    if found != identity:
        raise ValueError(
            f"{path}: holds latents of other images, settings or another autoencoder; "
            "give --out a new folder"
        )
    return True


def _encoded(
    datasets: Datasets, encoder: Encoder, encoding: Encoding, span: Span
) -> dict[str, Tensor]:
    """The tensors of one shard."""
    rows: dict[str, list[Tensor]] = {}
    dataset = datasets.train if span.split == "train" else datasets.held_out
    for x, y in span_batches(dataset, span.images, encoding.batch_size, encoding.num_workers):
        rows.setdefault("labels", []).append(y)
        for name, value in _stored(x, encoder, encoding):
            small = value.cpu().to(DTYPES[encoding.dtype])
            if not small.isfinite().all():
                raise ValueError(
                    f"encode: {name} of {span.split} images exceeds {encoding.dtype}; "
                    "use --dtype float32"
                )
            rows.setdefault(name, []).append(small)
    return {name: torch.cat(parts).contiguous() for name, parts in rows.items()}


def _stored(x: Tensor, encoder: Encoder, encoding: Encoding) -> Iterator[tuple[str, Tensor]]:
    copies = {"": x, "mirrored_": x.flip(-1)} if encoding.mirrored else {"": x}
    for prefix, images in copies.items():
        mean, std = encoder(images)
        yield prefix + "mean", mean
        if encoding.kept == "posterior":
            yield prefix + "std", std


def _save(path: Path, tensors: dict[str, Tensor], identity: str) -> None:
    with replacing(path) as part:
        write_tensors(part, tensors, {"flowdopr": identity})
