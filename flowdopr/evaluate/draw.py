"""`sample`: images of a run as files, which the same command goes on with after an interruption.

    000000.png, 000001.png, ...   written batch by batch
    unfinished/sampling.json      what they are drawn with; the folder is deleted at the end
    unfinished/00000256.json      the batch that begins with image 256 is written
    grid.png                      made from the PNGs
    sampling.json                 the card, which says that all the above is there
    samples.npz                   made from the PNGs, if asked for

Shapes: images uint8 (N, C, H, W), labels (N,) int64.
"""

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from flowdopr.config import Config, ConfigError, apply_overrides
from flowdopr.disk import known_json, locked, reading, replacing, write_json, writing
from flowdopr.evaluate.card import (
    autoencoder_record,
    first_difference,
    sampling_settings,
)
from flowdopr.evaluate.generate import ImageSampler, balanced_labels, mean_nfe, repeated_labels
from flowdopr.latents import load_decoder
from flowdopr.runs import RunFolder
from flowdopr.terminal import counting

CARD, UNFINISHED, NPZ = "sampling.json", "unfinished", "samples.npz"
PNG_END = b"IEND\xaeB`\x82"
MAX_IN_GRID = 100
SMALLEST_IN_GRID = 32  # pixels; smaller images are magnified


def sample(
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    num: int,
    out: str | Path,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    step: int | None = None,
    weights: str = "ema",
    npz: bool = False,
    autoencoder: str | None = None,
) -> Path:
    """Draw `num` images into the folder `out`, which is returned.

    `out` then holds 000000.png, ..., grid.png (the first 100), sampling.json and, if `npz`,
    samples.npz (arr_0: uint8 (N, H, W, C); labels (N,) where there are any). Image i depends on
    (`seed`, i), its label and the settings alone; with an adaptive solver or implicit Adams, which
    choose their steps for a batch as a whole, within their tolerance also on its batch.

    After an interruption the same call goes on: batches that are written are not drawn again, and
    the images become those of an uninterrupted call, also with another number of processes.

    Args:
        overrides: `sample.key=value`, such as `sample.solver=dopri5`.
        labels: repeated over the images; None: all classes in turn.
        weights: "ema", "raw" or any other that `RunFolder.load_weights` knows.
        autoencoder: the new place of the autoencoder of a run on latents, if it was moved.

    Raises:
        ConfigError, ValueError: `out` holds other files or images of other settings, no such run or
            checkpoint, unknown labels, settings that cannot be used.
        RolloutsFailed: images are not finite, or the solver failed.
    """
    out = Path(out)
    if num < 1:
        raise ValueError(f"num={num}: at least one image must be asked for")
    folder = RunFolder.open(run)
    config = _changed(folder.config, overrides, autoencoder)
    record = autoencoder_record(folder.dataset, config)
    sampler = ImageSampler.load(folder, config, step, weights)
    y = _labels(num, labels, sampler.num_classes)
    used = list(labels) if labels else None if y is None else "balanced"
    drawn = {"batch_size": config.sample.batch_size, "num_images": num, "seed": seed}
    sampling = sampling_settings(config) | sampler.guide_record() | drawn | {"labels": used}
    card = sampler.origin() | {"sampling": sampling}
    card |= {"autoencoder": record} if record else {}
    with sampler.state.main_process_first():
        complete = _is_complete(out, card)
    if not complete:
        _draw(sampler, out, y, card, load_decoder(record, sampler.device))
    if sampler.state.is_main_process:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        if npz and not (out / NPZ).is_file():
            _write_npz(out, num, y)
    sampler.state.wait_for_everyone()
    return out


def _changed(config: Config, overrides: Iterable[str], autoencoder: str | None) -> Config:
    """The run's config with `overrides`, which may change the section `sample` only."""
    changes = list(overrides)
    for change in changes:
        key = change.partition("=")[0]
        if not key.startswith("sample."):
            raise ConfigError(f"override '{change}': only sample.* can change what a run draws")
        if key == "sample.num_images":
            raise ConfigError(
                f"override '{change}': it sets the grids drawn in training; give --num"
            )
    if autoencoder is not None:
        changes.append(f"data.autoencoder={json.dumps(autoencoder)}")
    return apply_overrides(config, changes)


def _labels(num: int, labels: Sequence[int] | None, num_classes: int) -> Tensor | None:
    """`labels` repeated; without them all classes in turn; None for an unconditional model."""
    if labels is not None:
        return repeated_labels(num, labels, num_classes)
    return balanced_labels(num, num_classes) if num_classes else None


def _is_complete(out: Path, card: Mapping[str, Any]) -> bool:
    """Whether all images of `card` are in `out`, rather than some or none.

    Raises:
        ValueError: `out` holds images of another card, or something else.
    """
    if not out.exists() or (out.is_dir() and {item.name for item in out.iterdir()} <= {UNFINISHED}):
        return False
    begun = known_json(out / CARD) or known_json(out / UNFINISHED / CARD)
    if begun is None:
        raise ValueError(f"{out}: holds files already; give a new or an empty folder")
    difference = first_difference(begun, card, ignored="sampling.nfe")
    if difference:
        raise ValueError(f"{out}: holds images of other settings: {difference}; give a new folder")
    return (out / CARD).is_file()


def _draw(
    sampler: ImageSampler,
    out: Path,
    labels: Tensor | None,
    card: Mapping[str, Any],
    decode: Callable[[Tensor], Tensor],
) -> None:
    """Draw the batches that are not written yet, then make the grid and the card."""
    main, sampling = sampler.state.is_main_process, card["sampling"]
    remedy = "wait for it, or give another folder"
    with locked(out / UNFINISHED, remedy) if main else nullcontext():
        if main:
            write_json(out / UNFINISHED / CARD, card)
        sampler.state.wait_for_everyone()
        batches = sampler.share(sampling["num_images"])
        missing = [batch for batch in batches if not _is_written(out, batch)]
        total, done = (sum(map(len, some)) for some in (batches, missing))
        with counting("sampling", total, completed=total - done, shown=main) as progress:
            for batch in missing:
                images, nfe = sampler.draw(batch, labels, seed=sampling["seed"], decode=decode)
                for number, image in zip(batch, images, strict=True):
                    _save(image, _png(out, number))
                write_json(_note(out, batch), {"nfe": nfe})
                progress(len(batch))
        sampler.state.wait_for_everyone()
        if main:
            _finish(out, card, sampler.batches(sampling["num_images"]))


def _finish(out: Path, card: Mapping[str, Any], batches: Sequence[range]) -> None:
    """Write the grid, and the card with the mean NFE of the batches."""
    num = batches[-1].stop
    first = torch.stack([_read(out, number) for number in range(min(num, MAX_IN_GRID))])
    _save(grid(first), out / "grid.png")
    nfe = mean_nfe({batch: _nfe(out, batch) for batch in batches})
    write_json(out / CARD, {**card, "sampling": card["sampling"] | {"nfe": nfe}})


def _is_written(out: Path, batch: range) -> bool:
    """Whether the batch is complete: its note is there, and none of its PNGs is missing or cut."""
    return _nfe(out, batch) > 0 and all(
        path.is_file() and path.read_bytes().endswith(PNG_END)
        for path in (_png(out, number) for number in batch)
    )


def _png(out: Path, number: int) -> Path:
    return out / f"{number:06d}.png"


def _note(out: Path, batch: range) -> Path:
    return out / UNFINISHED / f"{batch.start:08d}.json"


def _nfe(out: Path, batch: range) -> int:
    """The NFE in the note of a batch; 0 if it is not written yet, or damaged."""
    nfe = (known_json(_note(out, batch)) or {}).get("nfe")
    return nfe if isinstance(nfe, int) else 0


def _save(image: Tensor, path: Path) -> None:
    with writing(path):
        to_pil_image(image).save(path)


def _read(out: Path, number: int) -> Tensor:
    """Image `number` (C, H, W) from its file.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = _png(out, number)
    with reading(path, "draw the images anew into another --out"), Image.open(path) as image:
        return pil_to_tensor(image)


def _write_npz(out: Path, num: int, labels: Tensor | None) -> None:
    """samples.npz, written image by image: all of them may be more than the memory holds."""
    channels, height, width = _read(out, 0).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, height, width, channels)}
    with replacing(out / NPZ) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            with counting(NPZ, num) as progress:
                for number in range(num):
                    file.write(_read(out, number).permute(1, 2, 0).numpy().tobytes())
                    progress()
        if labels is not None:
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy(), allow_pickle=False)


def grid(images: Tensor, columns: int | None = None, smallest: int = SMALLEST_IN_GRID) -> Tensor:
    """The first 100 of uint8 images (N, C, H, W) beside each other, uint8 (3, H', W').

    Args:
        columns: None: as many as there are rows.
        smallest: side in pixels below which images are magnified, without smoothing.
    """
    images = images[:MAX_IN_GRID]
    factor = math.ceil(smallest / min(images.shape[-2:]))
    if factor > 1:
        images = interpolate(images, scale_factor=factor, mode="nearest")
    columns = columns or math.ceil(math.sqrt(len(images)))
    return make_grid(images, nrow=columns, pad_value=255)
