"""Latents on disk: a data set that an autoencoder encoded once, read row by row.

    latents.json                   what was encoded, by what, and the shards; written last
    train-00000000.safetensors, train-00008192.safetensors, ...  (by their first image)
    held_out-00000000.safetensors, ...     mean, std `(n, L, h, w)`, mirrored_mean, mirrored_std,
                                           labels `(n,)`

Means and deviations are stored shifted and scaled, so that a latent is mean + std * normal. With
kept "mean" there is no std, and without mirrored copies there are no mirrored_* tensors.

Shapes: latents float32 `(B, L, h, w)`, labels int64 `(B,)`.
"""

import bisect
import json
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowdopr.config import Config, DataConfig
from flowdopr.config.own import naming
from flowdopr.config.schema import USED_BY
from flowdopr.data import build_image_datasets
from flowdopr.data.info import DatasetInfo, Datasets
from flowdopr.data.memory import Batch, ImageDataset, Picks
from flowdopr.data.sources import shown, why
from flowdopr.disk import parse_json
from flowdopr.latents.notes import NOTES, SPLITS, Notes, Shard, read_notes


def build_datasets(config: Config) -> Datasets:
    """The data set that `config.data` names: latents, or images.

    Raises:
        ValueError: as `open_latents` and `data.build_image_datasets`.
    """
    data = config.data
    return open_latents(data) if data.name == "latents" else build_image_datasets(data)


def build_pixel_datasets(config: Config) -> Datasets:
    """The images of the config's data set; for latents, the images that were encoded.

    Raises:
        ValueError: as `data.build_image_datasets`; other images than were encoded.
    """
    data = config.data
    if data.name != "latents":
        return build_image_datasets(data)
    notes = read_notes(data.root)
    moved = {"root": data.source_root, "held_out_root": data.held_out_root}
    moved = {key: place for key, place in moved.items() if place}
    kind = notes.source.data.get("name")
    used = [key for key in ("download", "num_workers") if kind in USED_BY[key]]
    here = {key: getattr(data, key) for key in used}
    try:
        source = parse_json(DataConfig, json.dumps(notes.source.data | moved | here))
    except ValueError as error:
        raise ValueError(
            f"data.root: 'source' in '{Path(data.root) / NOTES}' is no section data ({error})"
        ) from None
    with naming(Path(data.root) / NOTES):
        datasets = build_image_datasets(source)
    if datasets.info.fingerprint != notes.source.info.fingerprint:
        raise ValueError(
            f"data.source_root: the images in '{source.root}' are not those that were encoded into "
            f"'{data.root}'; give the folder of those"
        )
    return datasets


def open_latents(data: DataConfig) -> Datasets:
    """The two splits in `data.root`; the means and deviations stay on disk.

    Raises:
        ValueError: no latents there, a shard that is missing or cut, or no mirrored copies though
            `data.horizontal_flip` asks for them.
    """
    notes = read_notes(data.root)
    if data.horizontal_flip and not notes.mirrored:
        raise ValueError(
            f"data.horizontal_flip: '{data.root}' holds no mirrored copies; set it false, or "
            "encode again with data.horizontal_flip=true"
        )
    train, held_out = (LatentShards(Path(data.root), split, notes) for split in SPLITS)
    moved = {"name": data.autoencoder} if data.autoencoder else {}
    source = notes.source.info
    info = DatasetInfo(
        name=f"latents of {source.name}",
        image_shape=notes.image_shape,
        num_classes=source.num_classes,
        class_names=source.class_names,
        num_train=len(train),
        num_held_out=len(held_out),
        fingerprint=notes.fingerprint(),
        autoencoder=notes.autoencoder.model_dump() | moved,
    )
    return Datasets(train, held_out, info)


class LatentShards(ImageDataset):
    """One split. `batch` returns one fixed draw of each latent, `drawn` a new one in each epoch.

    Each process maps a shard into memory when it first reads from it.
    """

    def __init__(self, root: Path, split: str, notes: Notes):
        shards: list[Shard] = getattr(notes.shards, split)
        self.paths = [root / shard.file for shard in shards]
        for path, shard in zip(self.paths, shards, strict=True):
            _check_size(path, shard.bytes)
        self.starts = [0, *accumulate(shard.images for shard in shards)]
        self.shape, self.random = notes.image_shape, notes.kept == "posterior"
        self.tensors = [notes.tensors(shard.images) for shard in shards]
        self._opened: tuple[int, dict[int, Any]] = (os.getpid(), {})
        parts = [self._shard(number).get_tensor("labels") for number in range(len(shards))]
        for path, labels in zip(self.paths, parts, strict=True):
            if labels.min() < 0 or labels.max() >= max(notes.source.info.num_classes, 1):
                raise _damaged(path, "its labels are not those of the classes")
        self.labels = torch.cat(parts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        latents, labels = self.batch(torch.tensor([index]))
        return latents[0], int(labels[0])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": (0, {})}

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """float32 latents `(B, L, h, w)`, never mirrored, and labels `(B,)`."""
        keys = [(0, 0, 3, index) for index in indices.tolist()]
        return self._latents(indices, torch.zeros(len(indices)), keys), self.labels[indices]

    def drawn(self, picks: Picks, seed: int) -> Batch:
        pairs = zip(picks.epochs.tolist(), picks.indices.tolist(), strict=True)
        keys = [(seed, epoch, 2, index) for epoch, index in pairs]
        latents = self._latents(picks.indices, picks.mirrored, keys)
        return Batch(latents, self.labels[picks.indices])

    def _latents(self, indices: Tensor, mirrored: Tensor, keys: Sequence[tuple]) -> Tensor:
        prefixes = ["mirrored_" if flag else "" for flag in mirrored.tolist()]
        mean = self._rows(indices, [prefix + "mean" for prefix in prefixes])
        if not self.random:
            return mean
        std = self._rows(indices, [prefix + "std" for prefix in prefixes])
        noise = [np.random.default_rng(key).standard_normal(self.shape, np.float32) for key in keys]
        return mean + std * torch.from_numpy(np.stack(noise))

    def _rows(self, indices: Tensor, names: Sequence[str]) -> Tensor:
        """Row `indices[i]` of the tensors `names[i]`, as float32."""
        rows = []
        for index, name in zip(indices.tolist(), names, strict=True):
            number = bisect.bisect_right(self.starts, index) - 1
            row = index - self.starts[number]
            rows.append(self._shard(number).get_slice(name)[row : row + 1])
        return torch.cat(rows).float()

    def _shard(self, number: int) -> Any:
        if self._opened[0] != os.getpid():
            self._opened = (os.getpid(), {})
        opened = self._opened[1]
        if number not in opened:
            path = self.paths[number]
            try:
                file = safe_open(path, framework="pt")
                names = file.keys()
                parts = {name: file.get_slice(name) for name in names}
            except (SafetensorError, OSError) as error:
                raise _damaged(path, why(error)) from None
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
            if found != self.tensors[number]:
                raise _damaged(path, f"its tensors are not those that {NOTES} tells")
            opened[number] = file
        return opened[number]


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise _damaged(path, "it is missing")
    if (found := path.stat().st_size) != expected:
        raise _damaged(path, f"{found} of {expected} bytes")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"data.root: the shard '{shown(path)}' cannot be used ({reason}); delete it and run "
        "the same flowdopr encode command again"
    )
