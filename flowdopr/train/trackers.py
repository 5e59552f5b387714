"""TensorBoard, W&B and trackio: accelerate's trackers show the numbers, grids and config of a run.

All of it happens in the first process, and only where a line of metrics.jsonl or a grid is written.
A tracker that fails is left out from then on; metrics.jsonl and samples/ have everything anyway.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL.Image import Image

from flowdopr.config import Config, ConfigError, to_dict
from flowdopr.disk import write_text
from flowdopr.exits import one_line
from flowdopr.runs import RunFolder
from flowdopr.runs.same import flat

log = logging.getLogger("flowdopr.train")

ID = "tracker-id"
"""The file in a run folder with the id by which W&B and trackio know the run when it goes on."""


def check_trackers(config: Config) -> None:
    """Check that the packages of `train.trackers` are installed.

    Raises:
        ConfigError: one is not.
    """
    for name in config.train.trackers:
        if LoggerType(name) not in get_available_trackers():
            raise ConfigError(f"train.trackers: {name} is not installed: pip install {name}")


@contextmanager
def tracking(accelerator: Accelerator, run: RunFolder, step: int) -> Iterator[None]:
    """Within the block, the trackers of the run's config show it.

    Args:
        step: from which the run goes on; 0 if it starts.

    Raises:
        ConfigError: a tracker cannot start, such as W&B without a key.
    """
    if not (run.config.train.trackers and accelerator.is_main_process):
        yield
        return
    name = _run_id(run.path, new=step == 0)
    settings = {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in flat(to_dict(run.config)).items()
    }
    options = {
        "tensorboard": {"purge_step": step + 1},  # hides what is trained again
        "wandb": {"id": name, "name": run.config.name, "dir": str(run.path), "resume": "allow"},
        "trackio": {"name": f"{run.config.name}-{name}", "resume": "allow", "embed": False},
    }
    project = os.environ.get("WANDB_PROJECT", "flowdopr")
    try:
        with redirect_stdout(sys.stderr):
            accelerator.init_trackers(project, settings, options)
    except Exception as error:
        raise ConfigError(
            f"train.trackers: {one_line(error)}; mend it, leave this tracker out, or set "
            "WANDB_MODE=offline if W&B is not reached"
        ) from error
    try:
        yield
    finally:
        with redirect_stdout(sys.stderr):
            _each(accelerator, _finish)
        accelerator.trackers.clear()


def show_numbers(accelerator: Accelerator, line: Mapping[str, Any]) -> None:
    """Show a line of metrics.jsonl in all trackers."""
    numbers = {key: value for key, value in line.items() if key != "step"}
    _each(accelerator, lambda tracker: tracker.log(numbers, step=line["step"]))


def show_picture(accelerator: Accelerator, step: int, picture: Image) -> None:
    """Show a sample grid in all trackers."""

    def show(tracker: Any) -> None:
        pixels = np.array(picture)  # (H, W, 3)
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": [pixels]}, step=step)
        else:
            image = import_module("trackio").Image(pixels)
            tracker.log({"samples": image}, step=step)

    _each(accelerator, show)


def _finish(tracker: Any) -> None:
    if tracker.name == "trackio":  # its tracker would end the run once more when Python ends
        import_module("trackio").finish()
    else:
        tracker.finish()


def _each(accelerator: Accelerator, act: Callable[[Any], None]) -> None:
    """Let every tracker act; one that cannot is left out from then on."""
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:
            log.warning(
                "train.trackers: %s: %s; the run goes on without it", tracker.name, one_line(error)
            )
            accelerator.trackers.remove(tracker)


def _run_id(run: Path, *, new: bool) -> str:
    file = run / ID
    if not new and file.is_file():
        known = file.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[0-9a-f]{8}", known):  # a stranger's run may have anything there
            return known
    made = secrets.token_hex(4)
    write_text(file, f"{made}\n")
    return made
