"""The weight averages of a run: which there are, where they lie, and lengths made of them.

    checkpoints/step-00000500/power-0.1.safetensors     of a whole checkpoint
    averages/step-00000250/power-0.1.safetensors        left of a dropped one

Lengths made afterwards need averages from all over training, so a dropped checkpoint leaves its
power-function averages behind.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from flowdopr.config import Config, ConfigError
from flowdopr.train.ema import Average, combine, posthoc_coefficients

CHECKPOINTS, LEFT = "checkpoints", "averages"
DROPPED = ".dropped"


def averages_of(config: Config) -> list[Average]:
    """The weight averages that `config.train` asks for; the first is sampled from."""
    settings = config.train
    averages = [Average(decay=decay) for decay in settings.ema_decays]
    averages += [Average(length=length) for length in settings.ema_lengths]
    names = [average.name for average in averages]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"train.ema_decays, train.ema_lengths: {twice[0]} is given twice")
    return averages


def steps_in(folder: Path) -> list[int]:
    """Steps of the folders `step-00000500` in `folder`, ascending."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def folder_of(step: int) -> str:
    return f"step-{step:08d}"


def drop_checkpoints(run: Path, steps: Iterable[int]) -> None:
    """Delete the checkpoints of `steps`, but for their power-function averages.

    Each is renamed first, so that what bears a checkpoint's name stays whole; what a crash left
    half done is finished by the next call.
    """
    checkpoints = run / CHECKPOINTS
    for dropped in checkpoints.glob("*" + DROPPED):
        _finish(run, dropped)
    for step in steps:
        dropped = checkpoints / (folder_of(step) + DROPPED)
        os.replace(checkpoints / folder_of(step), dropped)
        _finish(run, dropped)


def _finish(run: Path, dropped: Path) -> None:
    kept = {path.name for path in dropped.glob("power-*.safetensors")}
    for path in dropped.iterdir():
        if path.name not in kept:
            path.unlink()
    if not kept:
        dropped.rmdir()
        return
    place = run / LEFT / dropped.name.removesuffix(DROPPED)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    os.replace(dropped, place)


def posthoc_weights(run: Path, config: Config, step: int, weights: str) -> dict[str, Tensor]:
    """The weights "posthoc-LENGTH" at `step`, of all power-function averages up to it.

    Raises:
        ConfigError: the run keeps none, or they do not determine this length.
    """
    lengths = config.train.ema_lengths
    if not lengths:
        raise ConfigError(f"{run}: {weights} needs a run with train.ema_lengths")
    places = {
        t: run / place / folder_of(t)
        for place in (LEFT, CHECKPOINTS)
        for t in steps_in(run / place)
        if t <= step
    }
    snapshots = [(t, length) for t in sorted(places) for length in lengths]
    try:
        length = float(weights.removeprefix("posthoc-"))
        coefficients = posthoc_coefficients(snapshots, step, length)
    except ValueError as error:
        raise ConfigError(f"{run}: weights {weights}: {error}") from None
    files = (places[t] / f"{Average(length=kept).name}.safetensors" for t, kept in snapshots)
    return combine(map(load_file, files), coefficients.tolist())
