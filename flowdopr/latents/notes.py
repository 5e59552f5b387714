"""`latents.json`: what was encoded, by what, and in which shards. It is written last."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from flowdopr.data.info import DatasetInfo
from flowdopr.data.sources import shown
from flowdopr.disk import parse_json

NOTES = "latents.json"
SPLITS = ("train", "held_out")

Count = Annotated[int, Field(ge=1)]


class Shard(BaseModel):
    """One file of latents."""

    file: Annotated[str, Field(pattern=r"^[\w-]+\.safetensors$")]
    images: Count
    bytes: Count
    sha256: str


class Shards(BaseModel):
    """The files of each split, in the order of its images."""

    train: Annotated[list[Shard], Field(min_length=1)]
    held_out: Annotated[list[Shard], Field(min_length=1)]


class Source(BaseModel):
    """The settings of section `data` that were encoded, and the data set that they named."""

    data: dict[str, Any]
    info: DatasetInfo


class AutoencoderRecord(BaseModel):
    """See `Autoencoder.record`."""

    name: str
    weights_sha256: str
    scale: float
    shift: float


class Notes(BaseModel):
    """The content of latents.json; `image_shape` is that of latents, (L, h, w)."""

    source: Source
    autoencoder: AutoencoderRecord
    image_shape: tuple[Count, Count, Count]
    kept: Literal["posterior", "mean"]
    dtype: Literal["float16", "float32"]
    mirrored: bool
    shards: Shards

    def fingerprint(self) -> str:
        """sha256 over all shards, the source and the autoencoder, independent of their paths."""
        parts = self.model_dump(include={"kept", "dtype", "mirrored", "shards"})
        parts["source"] = self.source.info.fingerprint
        parts["autoencoder"] = self.autoencoder.model_dump(exclude={"name"})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def tensors(self, images: int) -> dict[str, tuple[str, list[int]]]:
        """Type, as safetensors names it, and shape of each tensor in a shard of `images`."""
        kinds = ("mean", "std") if self.kept == "posterior" else ("mean",)
        names = [
            prefix + kind for prefix in ("", "mirrored_")[: 1 + self.mirrored] for kind in kinds
        ]
        latents = ({"float16": "F16", "float32": "F32"}[self.dtype], [images, *self.image_shape])
        return dict.fromkeys(names, latents) | {"labels": ("I64", [images])}


def read_notes(root: str | Path) -> Notes:
    """The `latents.json` in `root`.

    Raises:
        ValueError: there is none, because encoding into `root` has not begun or not finished; or it
            is damaged.
    """
    path, place = Path(root) / NOTES, shown(root)
    if not path.is_file():
        cut = any(Path(root).glob("*.safetensors"))
        remedy = (
            "encoding was cut: the same command goes on with it"
            if cut
            else f"write it by: flowdopr encode CONFIG --autoencoder NAME --out {place}"
        )
        raise ValueError(f"data.root: '{place}' has no {NOTES}; {remedy}")
    try:
        return parse_json(Notes, path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"data.root: '{shown(path)}' is damaged ({error}); run the same flowdopr encode "
            "command again, which keeps complete shards"
        ) from None
