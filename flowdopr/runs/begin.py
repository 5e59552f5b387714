"""A run folder made ready for training: whether it may be written, what is cleared away first."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowdopr.config import Config, ConfigError
from flowdopr.data import DatasetInfo
from flowdopr.disk import LOCK, OWNER, PART, remove_parts
from flowdopr.runs.checkpoint import checked_file, step_name, steps_in
from flowdopr.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    DATASET,
    KEPT_AVERAGES,
    VERSIONS,
    RunFolder,
)
from flowdopr.runs.provenance import with_earlier
from flowdopr.runs.same import check_same_run

log = logging.getLogger("flowdopr.runs")

DAMAGED = ".damaged"  # suffix of a checkpoint that was found damaged; only the user deletes it
# What `begin_run` makes before config.yaml. A crash may leave these where there is no run yet.
BEFORE_CONFIG = {
    *(CHECKPOINTS, "samples", "evaluation", "log.txt", VERSIONS, DATASET, LOCK, OWNER),
    *(f"{name}{PART}" for name in (VERSIONS, DATASET, CONFIG, OWNER)),
}


def begin_run(
    config: Config,
    dataset: DatasetInfo,
    made_by: dict[str, Any],
    *,
    resume: bool,
    changed_data: bool = False,
) -> RunFolder:
    """Prepare the folder `<output>/<name>` for training, from the newest sound checkpoint.

    Checkpoints after that one are damaged, and set aside. Other files of these steps are deleted,
    as the steps are trained again.

    Args:
        made_by: what `provenance` returned, for versions.json.
        resume: allow a folder that has checkpoints of this run.
        changed_data: allow that they were trained on other images.

    Raises:
        ConfigError: see `check_place`.
    """
    check_place(config, dataset, resume=resume, changed_data=changed_data)
    run = RunFolder(Path(config.output) / config.name, config, dataset)
    for folder in (CHECKPOINTS, "samples", "evaluation"):
        (run.path / folder).mkdir(parents=True, exist_ok=True)
    for folder in (CHECKPOINTS, "samples"):
        remove_parts(run.path / folder)
    newest = _set_damaged_aside(run)
    if newest == 0:
        shutil.rmtree(run.path / KEPT_AVERAGES, ignore_errors=True)
    before = run.made_by(newest) if newest else {}
    if newest != config.train.steps:  # else nothing is trained by these versions
        before = with_earlier(made_by, before, newest)
    run.write_own_files(newest, before)
    return run


def check_place(
    config: Config, dataset: DatasetInfo, *, resume: bool, changed_data: bool = False
) -> None:
    """Check that the run of `config` may be written into its folder; writes nothing.

    Raises:
        ConfigError: the folder holds a run and `resume` is off, or a run of another config, or
            something else, or links that lead out of it.
    """
    path = Path(config.output) / config.name
    check_no_links(path)
    if steps_in(path / CHECKPOINTS):
        before = _recovered(path)
        if not resume:
            raise ConfigError(
                f"{path}: a run is here already; go on with it by --resume, "
                "or choose another folder by name=NEW"
            )
        check_same_run(before, config, dataset, changed_data=changed_data)
    elif all((path / name).exists() for name in (CONFIG, DATASET)):
        pass  # a run without a checkpoint may be overwritten
    elif path.exists() and not {item.name for item in path.iterdir()} <= BEFORE_CONFIG:
        raise ConfigError(
            f"{path}: the folder has files but is not a run; choose another by name=NEW"
        )


def check_no_links(path: Path) -> None:
    """Check that what is written into the run folder `path` stays there.

    Raises:
        ConfigError: a folder or file in it is a symbolic link; a stranger's run may have one.
    """
    for item in path.iterdir() if path.is_dir() else ():
        if item.is_symlink():
            raise ConfigError(
                f"{item}: is a link, through which files outside the run would be written; put "
                "what it leads to in its place"
            )


def _recovered(path: Path) -> RunFolder:
    """The run in `path`, which has checkpoints, also if its own files are damaged: then it is
    described by those of the newest checkpoint that has sound ones.

    Raises:
        ConfigError, ValueError: no checkpoint has them either; what is wrong with its own.
    """
    try:
        return RunFolder.open(path)
    except ValueError:
        for step in reversed(steps_in(path / CHECKPOINTS)):
            folder = path / CHECKPOINTS / step_name(step)
            with suppress(ValueError):
                for name in (CONFIG, DATASET):
                    checked_file(folder, name, "")
                found = RunFolder.open(folder)
                return RunFolder(path, found.config, found.dataset)
        raise


def _set_damaged_aside(run: RunFolder) -> int:
    """Rename the checkpoints after the newest sound one, and return the step of that."""
    newest, wrong = run.newest_sound(f"the checkpoint is set aside, with the ending {DAMAGED}")
    for step, what in wrong.items():
        aside = run.path / CHECKPOINTS / (step_name(step) + DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(run.checkpoint_path(step), aside)
        log.warning("%s", what)
    return newest
