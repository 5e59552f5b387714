"""`sample`: images of a run as files."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from flowdopr.config import Config, ConfigError, apply_overrides
from flowdopr.evaluate.card import autoencoder_record, sampling_settings, write_card
from flowdopr.evaluate.generate import ImageSampler, balanced_labels, repeated_labels
from flowdopr.runs import RunFolder

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
    """Draw `num` images into the folder `out`, which is returned and appears whole or not at all.

    `out` holds 000000.png, ..., grid.png (the first 100), sampling.json and, if `npz`, samples.npz
    (arr_0: uint8 (N, H, W, C); labels (N,) where there are any). Image i depends on (`seed`, i),
    its label and the settings alone; with an adaptive solver or implicit Adams, which choose their
    steps for a batch as a whole, it is the same only up to their tolerance.

    Args:
        overrides: `sample.key=value`, such as `sample.solver=dopri5`.
        labels: repeated over the images; None: all classes in turn.
        weights: "ema", "raw" or any other that `RunFolder.load_weights` knows.
        autoencoder: the new place of the autoencoder of a run on latents, if it was moved.

    Raises:
        ConfigError, ValueError: `out` holds files, no such run or checkpoint, unknown labels,
            settings that cannot be used.
    """
    out = Path(out)
    _check(num, out)
    folder = RunFolder.open(run)
    config = _changed(folder.config, overrides, autoencoder)
    record = autoencoder_record(folder.dataset, config)
    sampler = ImageSampler.load(folder, config, step, weights)
    y = _labels(num, labels, sampler.num_classes)
    images, nfe = sampler.draw(num, y, seed=seed, autoencoder=record)
    if sampler.state.is_main_process:
        used = list(labels) if labels else None if y is None else "balanced"
        drawn = {"nfe": nfe, "num_images": num, "seed": seed, "labels": used}
        sampling = sampling_settings(config) | sampler.guide_record() | drawn
        card = sampler.origin() | {"sampling": sampling}
        card |= {"autoencoder": record} if record else {}
        _write_folder(out, images, y, card, npz=npz)
    sampler.state.wait_for_everyone()
    return out


def _check(num: int, out: Path) -> None:
    if num < 1:
        raise ValueError(f"num={num}: at least one image must be asked for")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: holds files already; give a new or an empty folder")


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


def _write_folder(
    out: Path, images: Tensor, labels: Tensor | None, card: Mapping[str, Any], *, npz: bool
) -> None:
    """Fill a folder beside `out`, then give it its name."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    part.chmod(0o755)  # mkdtemp lets only the owner read it
    try:
        for number, image in enumerate(images):
            to_pil_image(image).save(part / f"{number:06d}.png")
        to_pil_image(grid(images)).save(part / "grid.png")
        if npz:
            arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()}
            if labels is not None:
                arrays["labels"] = labels.numpy()
            np.savez(part / "samples.npz", allow_pickle=False, **arrays)
        write_card(part / "sampling.json", card)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # after success it has another name


def grid(images: Tensor) -> Tensor:
    """The first 100 of uint8 images (N, C, H, W) beside each other, uint8 (3, H', W')."""
    images = images[:MAX_IN_GRID]
    factor = math.ceil(SMALLEST_IN_GRID / min(images.shape[-2:]))
    if factor > 1:
        images = interpolate(images, scale_factor=factor, mode="nearest")
    return make_grid(images, nrow=math.ceil(math.sqrt(len(images))), pad_value=255)
