"""A run that begins with steps of a longer one, where both are the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from flowdopr.config import Config, apply_overrides, effective
from flowdopr.disk import replacing_folder
from flowdopr.runs.begin import begin_run
from flowdopr.runs.checkpoint import MANIFEST
from flowdopr.runs.folder import KEPT_AVERAGES, RunFolder
from flowdopr.runs.same import check_same_run


def start_from(longer: RunFolder, config: Config) -> int:
    """Give the run of `config`, which has no checkpoint, one of a longer run; returns its step.

    With `train.lr_decay: cooldown`, two runs that differ in `train.steps` alone are the same bit
    for bit before the shorter one's cooldown. The newest checkpoint of these steps is taken over,
    with the lines of metrics.jsonl and the power-function averages before it. Files are linked
    where the disk allows that. Returns 0, and does nothing, if there is no such checkpoint.

    Raises:
        ConfigError: the runs differ in more than `train.steps`.
    """
    config = effective(config)  # what follows from its own number of steps is compared, too
    as_long = apply_overrides(config, [f"train.steps={longer.config.train.steps}"])
    check_same_run(longer, as_long, longer.dataset)
    constant = config.train.steps - (config.train.cooldown_steps or config.train.steps)
    shared = [step for step in longer.steps() if step <= constant]
    if not shared:
        return 0
    *earlier, step = shared
    longer.check(step)
    run = begin_run(config, longer.dataset, longer.made_by(), resume=True)
    for line in longer.metrics():
        if line["step"] <= step:
            run.append_metrics(line)
    for kept in [*map(longer.checkpoint_path, earlier), *(longer.path / KEPT_AVERAGES).glob("*")]:
        powers = list(kept.glob("power-*.safetensors"))
        if powers and kept.name <= longer.checkpoint_path(step).name:
            with replacing_folder(run.path / KEPT_AVERAGES / kept.name) as part:
                _link([*powers, *kept.glob(MANIFEST)], part)
    whole, texts = longer.checkpoint_path(step), run.texts()
    note = {"images": step * config.train.global_batch_size}
    with run.new_checkpoint(step, texts=texts, note=note) as part:
        _link((path for path in whole.iterdir() if path.name not in {MANIFEST, *texts}), part)
    return step


def _link(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        try:
            os.link(path, folder / path.name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, folder / path.name)
