"""`sample`: images of a run as files, which the same command goes on with after an interruption.

    000000-cat.png, ...           written batch by batch: the image's number and its class
    unfinished/sampling.json      what they are drawn with; the folder is deleted at the end
    unfinished/00000256.json      the batch that begins with image 256 is written
    grid.png                      made from the first 100 PNGs
    sampling.json                 the card, with the class of each file: all the above is there
    samples.npz                   made from the PNGs, if asked for
    trajectory.png                the way from noise to the first images, if asked for

Shapes: images uint8 (N, C, H, W), labels (N,) int64.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from flowdopr.config import Config, ConfigError, apply_overrides
from flowdopr.data import to_uint8
from flowdopr.disk import known_json, locked, reading, replacing, write_json, writing
from flowdopr.evaluate.card import (
    autoencoder_record,
    first_difference,
    sampling_settings,
)
from flowdopr.evaluate.generate import (
    ImageSampler,
    Numbers,
    balanced_labels,
    label_numbers,
    mean_nfe,
    numbers_in,
    repeated_labels,
)
from flowdopr.latents import load_decoder
from flowdopr.pictures import grid
from flowdopr.runs import open_run
from flowdopr.terminal import counting

CARD, UNFINISHED, NPZ, WAY = "sampling.json", "unfinished", "samples.npz", "trajectory.png"
PNG_END = b"IEND\xaeB`\x82"
MAX_IN_GRID = 100
SHOWN_ON_THEIR_WAY = 4  # images
Decoder = Callable[[Tensor], Tensor]

SHORT = {
    "solver": "solver",
    "steps": "solver.steps",
    "atol": "solver.atol",
    "rtol": "solver.rtol",
    "guidance_scale": "guidance.scale",
    "guide_run": "guidance.guide.run",
    "guide_weights": "guidance.guide.weights",
    "guide_step": "guidance.guide.step",
    "batch_size": "batch_size",
}
"""Options of sampling that are short for settings of the section `sample`."""


def sample_overrides(options: Mapping[str, Any]) -> list[str]:
    """Those of `options` that are short for settings and not None, as overrides."""
    given = {SHORT[name]: options[name] for name in SHORT if options.get(name) is not None}
    return [f"sample.{key}={json.dumps(value)}" for key, value in given.items()]


def sample(
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    num: int | None = None,
    numbers: str | Sequence[int] | None = None,
    out: str | Path,
    labels: str | Sequence[int | str] | None = None,
    seed: int = 0,
    step: int | None = None,
    weights: str = "ema",
    npz: bool = False,
    trajectory: bool = False,
    autoencoder: str | None = None,
) -> Path:
    """Draw images into the folder `out`, which is returned.

    Image i depends on (`seed`, i), its label and the settings alone; with an adaptive solver or
    implicit Adams, which choose their steps for a batch, within their tolerance also on its batch.
    After an interruption the same call goes on with the batches that are left, and the images
    become those of an uninterrupted call, also with another number of processes.

    Args:
        overrides: `sample.key=value`, such as `sample.solver=dopri5`.
        num: draw the images 0 to `num` - 1; by default 64.
        numbers: in place of `num`, the numbers of the images to draw, or a text such as "3,10-19":
            each is the image that a call with a large `num` draws.
        labels: class numbers and names, or a text such as "0-4,cat"; image i has label i of these,
            repeated. None: all classes in turn.
        weights: "ema", "raw" or any other that `RunFolder.load_weights` knows.
        npz: also write samples.npz, in ADM's layout: arr_0, uint8 (N, H, W, C), and where there are
            labels arr_1 (N,).
        trajectory: also write trajectory.png: x_t of the first images along t, and predicted x_1.
        autoencoder: the new place of the autoencoder of a run on latents.

    Raises:
        ConfigError, ValueError: `out` holds other files or images of other settings, no such run or
            checkpoint, unknown labels, settings that cannot be used.
        RolloutsFailed: images are not finite, or the solver failed.
    """
    out, chosen, folder = Path(out), image_numbers(num, numbers), open_run(run)
    config = changed(folder.config, overrides, autoencoder)
    record = autoencoder_record(folder.dataset, config)
    sampler = ImageSampler.load(folder, config, step, weights)
    wanted = None if labels is None else label_numbers(labels, folder.dataset.class_names)
    pictures = _pictures(out, chosen, wanted, sampler)
    card = _card(pictures, wanted, seed, sampler) | ({"autoencoder": record} if record else {})
    decode = load_decoder(record, sampler.device)
    with sampler.state.main_process_first():
        complete = _is_complete(out, card)
    if not complete:
        _draw(sampler, pictures, card, decode)
    if sampler.state.is_main_process:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        if npz and not (out / NPZ).is_file():
            _write_npz(pictures)
        if trajectory and not (out / WAY).is_file():
            _write_way(sampler, pictures, seed, decode)
    sampler.state.wait_for_everyone()
    return out


@dataclass(frozen=True)
class Pictures:
    """The PNGs of a sampling in the folder `out`.

    numbers: of the images. labels: of the images 0, 1, ...; None for an unconditional model.
    """

    out: Path
    numbers: Numbers
    labels: Tensor | None
    class_names: Sequence[str]

    def path(self, number: int) -> Path:
        """Where the image is; a class may have been named by a stranger, so its name is cut."""
        name = self._class(number)
        ending = "" if name is None else "-" + re.sub(r"[^\w-]+", "_", name)[:40]
        return self.out / f"{number:06d}{ending}.png"

    def _class(self, number: int) -> str | None:
        if self.labels is None:
            return None
        label = int(self.labels[number])
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def read(self, number: int) -> Tensor:
        """The image (C, H, W) from its file.

        Raises:
            ValueError: the file is missing or damaged.
        """
        path = self.path(number)
        with reading(path, "draw the images anew into another --out"), Image.open(path) as image:
            return pil_to_tensor(image)

    def has(self, batch: Numbers) -> bool:
        """Whether the batch is complete: its note is there, and no PNG is missing or cut."""
        return self.nfe(batch) > 0 and all(
            path.is_file() and path.read_bytes().endswith(PNG_END)
            for path in map(self.path, self.kept(batch))
        )

    def kept(self, batch: Numbers) -> list[int]:
        """The images of a batch that are to be saved."""
        return [number for number in batch if number in self.numbers]

    def note(self, batch: Numbers) -> Path:
        return self.out / UNFINISHED / f"{batch[0]:08d}.json"

    def nfe(self, batch: Numbers) -> int:
        """The NFE in the note of a batch; 0 if it is not written yet, or damaged."""
        nfe = (known_json(self.note(batch)) or {}).get("nfe")
        return nfe if isinstance(nfe, int) else 0

    def to_dict(self) -> dict[str, Any]:
        """For the card: the class number of each file."""
        if self.labels is None:
            return {}
        found = {self.path(number).name: int(self.labels[number]) for number in self.numbers}
        return {"class_names": list(self.class_names), "images": found}


def image_numbers(num: int | None, numbers: str | Sequence[int] | None = None) -> Numbers:
    """The numbers of the images to draw.

    Raises:
        ValueError: there are none, some are negative or repeated, or both arguments are given.
    """
    if numbers is None:
        num = 64 if num is None else num
        if num < 1:
            raise ValueError(f"num={num}: at least one image must be asked for")
        return range(num)
    if num is not None:
        raise ValueError(f"num={num} beside the numbers of images: give one of the two")
    found = numbers_in(numbers) if isinstance(numbers, str) else numbers
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"images {numbers}: give numbers of 0 or more, each once: 3,7,10-19")
    return tuple(found)


def changed(config: Config, overrides: Iterable[str], autoencoder: str | None = None) -> Config:
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


def _pictures(
    out: Path, numbers: Numbers, labels: Sequence[int] | None, sampler: ImageSampler
) -> Pictures:
    """The PNGs of a sampling of images with these `labels`, see `labels_of`."""
    y = labels_of(max(map(max, sampler.batches(numbers))) + 1, labels, sampler)
    return Pictures(out, numbers, y, sampler.run.dataset.class_names)


def labels_of(
    num: int, labels: str | Sequence[int | str] | None, sampler: ImageSampler
) -> Tensor | None:
    """The labels of the images 0 to `num` - 1: `labels` repeated, see `label_numbers`; without them
    all classes in turn; None for an unconditional model."""
    if labels is not None:
        found = label_numbers(labels, sampler.run.dataset.class_names)
        return repeated_labels(num, found, sampler.num_classes)
    return balanced_labels(num, sampler.num_classes) if sampler.num_classes else None


def _card(
    pictures: Pictures, labels: Sequence[int] | None, seed: int, sampler: ImageSampler
) -> dict[str, Any]:
    """What the images are drawn with."""
    config, numbers = sampler.config, pictures.numbers
    drawn = {"batch_size": config.sample.batch_size, "num_images": len(numbers), "seed": seed}
    drawn |= {"labels": labels or (None if pictures.labels is None else "balanced")}
    drawn |= {} if isinstance(numbers, range) else {"numbers": list(numbers)}
    sampling = sampling_settings(config) | sampler.guide_record() | drawn
    return sampler.origin() | {"sampling": sampling}


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
    begun = {key: begun[key] for key in begun if key not in ("class_names", "images")}
    difference = first_difference(begun, card, ignored="sampling.nfe")
    if difference:
        raise ValueError(f"{out}: holds images of other settings: {difference}; give a new folder")
    return (out / CARD).is_file()


def _draw(
    sampler: ImageSampler, pictures: Pictures, card: Mapping[str, Any], decode: Decoder
) -> None:
    """Draw the batches that are not written yet, then make the grid and the card."""
    main, out = sampler.state.is_main_process, pictures.out
    remedy = "wait for it, or give another folder"
    with locked(out / UNFINISHED, remedy) if main else nullcontext():
        if main:
            write_json(out / UNFINISHED / CARD, card)
        sampler.state.wait_for_everyone()
        batches = sampler.share(pictures.numbers)
        missing = [batch for batch in batches if not pictures.has(batch)]
        total, done = (sum(map(len, some)) for some in (batches, missing))
        with counting("sampling", total, completed=total - done, shown=main) as progress:
            for batch in missing:
                _draw_batch(sampler, pictures, batch, card["sampling"]["seed"], decode)
                progress(len(batch))
        sampler.state.wait_for_everyone()
        if main:
            _finish(pictures, card, sampler.batches(pictures.numbers))


def _draw_batch(
    sampler: ImageSampler, pictures: Pictures, batch: Numbers, seed: int, decode: Decoder
) -> None:
    images, nfe = sampler.draw(batch, pictures.labels, seed=seed, decode=decode)
    for number in pictures.kept(batch):
        _save(images[batch.index(number)], pictures.path(number))
    write_json(pictures.note(batch), {"nfe": nfe})


def _finish(pictures: Pictures, card: Mapping[str, Any], batches: Sequence[Numbers]) -> None:
    """Write the grid, and the card with the mean NFE of the batches."""
    first = torch.stack([pictures.read(number) for number in pictures.numbers[:MAX_IN_GRID]])
    _save(grid(first), pictures.out / "grid.png")
    sampling = card["sampling"] | {"nfe": mean_nfe({one: pictures.nfe(one) for one in batches})}
    write_json(pictures.out / CARD, {**card, "sampling": sampling, **pictures.to_dict()})


def _write_way(sampler: ImageSampler, pictures: Pictures, seed: int, decode: Decoder) -> None:
    """trajectory.png: a row of x_t along t for each of the first images, and below it the x_1."""
    numbers = pictures.numbers[:SHOWN_ON_THEIR_WAY]
    way = sampler.trajectory(numbers, pictures.labels, seed=seed)
    rows = torch.stack([way.x_t, way.x_1]).permute(2, 0, 1, *range(3, way.x_t.ndim + 1))
    images = to_uint8(decode(rows.flatten(0, 2)))
    _save(grid(images, columns=len(way.times)), pictures.out / WAY)


def _save(image: Tensor, path: Path) -> None:
    with writing(path):
        to_pil_image(image).save(path)


def _write_npz(pictures: Pictures) -> None:
    """samples.npz, written image by image: all of them may be more than the memory holds."""
    channels, height, width = pictures.read(pictures.numbers[0]).shape
    shape = (len(pictures.numbers), height, width, channels)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with replacing(pictures.out / NPZ) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            with counting(NPZ, shape[0]) as progress:
                for number in pictures.numbers:
                    file.write(pictures.read(number).permute(1, 2, 0).numpy().tobytes())
                    progress()
        if pictures.labels is not None:
            labels = pictures.labels[list(pictures.numbers)].numpy()
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels, allow_pickle=False)
