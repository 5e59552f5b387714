"""The run folder: every file of a training run, and the functions that write and read it.

    config.yaml      the resolved config          metrics.jsonl   one line a log or validation
    dataset.json     DatasetInfo                  log.txt         the lines of the log
    versions.json    versions, commit, hardware   samples/        step-00000500.png
    checkpoints/step-00000500/                    evaluation/     cards
        model.safetensors, ema-0.9999.safetensors, power-0.1.safetensors, ...: weights
        state.pt: optimizer and all else that training needs; checkpoint.json: step, images
    averages/step-00000250/
        power-0.1.safetensors, ...: kept from a deleted checkpoint, for post-hoc averages

A checkpoint is written under another name and then renamed, so one with its final name is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from flowdopr.config import Config, ConfigError, effective, load_config, to_dict, to_yaml
from flowdopr.data import DatasetInfo
from flowdopr.disk import (
    LOCK,
    OWNER,
    PART,
    parse_json,
    read_json,
    read_tensors,
    reading,
    remove_parts,
    replacing_folder,
    to_json,
    write_json,
    write_tensors,
    write_text,
    writing,
)
from flowdopr.models import build_model
from flowdopr.runs.averages import Average, combine, file_of, posthoc_coefficients
from flowdopr.runs.contents import MadeBy, MetricsLine, State
from flowdopr.runs.provenance import with_earlier

CHECKPOINTS, KEPT_AVERAGES = "checkpoints", "averages"
DELETED = ".deleted"  # suffix of a checkpoint while it is being deleted
# Settings that may change when a run is resumed: they do not change what the weights become.
FREE_ON_RESUME = (
    *("name", "output", "sample", "evaluate", "compare"),
    *("data.root", "data.held_out_root", "data.download", "data.num_workers", "data.cache"),
    "data.on_bad_image",  # which images are left is in the fingerprint
    *("data.autoencoder", "data.source_root"),
    *(f"train.{key}" for key in ("steps", "log_every", "validate_every", "sample_every")),
    *(f"train.{key}" for key in ("checkpoint_every", "keep_checkpoints", "max_skipped_steps")),
    "train.patience",
)
# What `create` makes before config.yaml. A crash may leave these in a folder that is not a run yet.
BEFORE_CONFIG = {
    *(CHECKPOINTS, "samples", "evaluation", "versions.json", "dataset.json", LOCK, OWNER),
    *(f"{name}{PART}" for name in ("versions.json", "dataset.json", "config.yaml")),
}
RESTORE = "restore it from a copy of the run"  # the remedy for a damaged file


class RunFolder:
    """A run on disk: `create` a new one or one to be resumed, `open` one to read it."""

    def __init__(self, path: Path, config: Config, dataset: DatasetInfo):
        self.path, self.config, self.dataset = path, config, dataset

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run in the folder `path`.

        Raises:
            ConfigError: `path` is not a run folder.
        """
        path = Path(path)
        for name in ("config.yaml", "dataset.json"):
            if not (path / name).is_file():
                raise ConfigError(f"{path}: not a run folder: it has no {name}")
        info = read_json(path / "dataset.json", RESTORE, DatasetInfo)
        return cls(path, load_config(path / "config.yaml", follow_base=False), info)

    @classmethod
    def create(
        cls,
        config: Config,
        dataset: DatasetInfo,
        made_by: dict[str, Any],
        *,
        resume: bool,
        changed_data: bool = False,
    ) -> RunFolder:
        """Prepare the folder `<output>/<name>` for training, from the newest checkpoint if any.

        Files of steps after that checkpoint are deleted, as these steps are trained again.

        Args:
            made_by: what `provenance` returned, for versions.json.
            resume: allow a folder that has checkpoints of this run.
            changed_data: allow that they were trained on other images.

        Raises:
            ConfigError: see `check_place`.
        """
        cls.check_place(config, dataset, resume=resume, changed_data=changed_data)
        path = Path(config.output) / config.name
        for folder in (CHECKPOINTS, "samples", "evaluation"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        for folder in (CHECKPOINTS, "samples"):
            remove_parts(path / folder)
        run = cls(path, config, dataset)
        newest = max(run.steps(), default=0)
        if newest == 0:
            shutil.rmtree(path / KEPT_AVERAGES, ignore_errors=True)
        if config.train.steps not in run.steps():  # else nothing is trained by these versions
            made_by = with_earlier(made_by, run.made_by(), newest)
            write_json(path / "versions.json", made_by)
        write_json(path / "dataset.json", dataset.to_dict())
        write_text(path / "config.yaml", to_yaml(config))
        run._drop_metrics_after(newest)
        return run

    @classmethod
    def check_place(
        cls, config: Config, dataset: DatasetInfo, *, resume: bool, changed_data: bool = False
    ) -> None:
        """Check that this run may be written into its folder; writes nothing.

        Raises:
            ConfigError: the folder holds a run and `resume` is off, or a run of another config, or
                something else.
        """
        path = Path(config.output) / config.name
        if (path / "config.yaml").exists():
            before = cls.open(path)
            if before.steps():  # a run without a checkpoint may be overwritten
                if not resume:
                    raise ConfigError(
                        f"{path}: a run is here already; go on with it by --resume, "
                        "or choose another folder by name=NEW"
                    )
                check_same_run(before, config, dataset, changed_data=changed_data)
        elif path.exists() and not {item.name for item in path.iterdir()} <= BEFORE_CONFIG:
            raise ConfigError(
                f"{path}: the folder has files but is not a run; choose another by name=NEW"
            )

    def made_by(self) -> dict[str, Any]:
        """The content of versions.json (see `with_earlier`), or {} if there is none yet.

        Raises:
            ValueError: the file is damaged; so for every other reader of the folder.
        """
        path = self.path / "versions.json"
        if not path.exists():
            return {}
        return read_json(path, f"{RESTORE}, or delete it", MadeBy)

    # Checkpoints

    def checkpoint_path(self, step: int) -> Path:
        return self.path / CHECKPOINTS / _step_name(step)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return _steps_in(self.path / CHECKPOINTS)

    def save_checkpoint(
        self,
        step: int,
        *,
        model: dict[str, Tensor],
        averages: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        note: dict[str, Any],
    ) -> Path:
        """Write one checkpoint, then delete the oldest beyond `train.keep_checkpoints`.

        Args:
            model: the raw weights, a state dict.
            averages: for each average's name, its state dict.
            state: the rest of what resuming needs; tensors and plain values only.
            note: plain values for checkpoint.json.
        """
        final = self.checkpoint_path(step)
        with replacing_folder(final) as part:
            for name, weights in {"model": model, **averages}.items():
                write_tensors(part / f"{name}.safetensors", weights)
            torch.save(state, part / "state.pt")
            (part / "checkpoint.json").write_text(to_json({"step": step, **note}))
        keep = self.config.train.keep_checkpoints
        self._delete_checkpoints(self.steps()[: -keep if keep else 0])
        return final

    def _delete_checkpoints(self, steps: Iterable[int]) -> None:
        """Delete the checkpoints of `steps`, except for their power-function averages.

        A checkpoint is renamed before its files are deleted, so a crash cannot leave an incomplete
        one under its final name. Deletions that a crash cut short are completed first.
        """
        for deleted in (self.path / CHECKPOINTS).glob("*" + DELETED):
            self._delete_files(deleted)
        for step in steps:
            deleted = self.path / CHECKPOINTS / (_step_name(step) + DELETED)
            os.replace(self.checkpoint_path(step), deleted)
            self._delete_files(deleted)

    def _delete_files(self, deleted: Path) -> None:
        for path in deleted.iterdir():
            if not path.match("power-*.safetensors"):
                path.unlink()
        if not any(deleted.iterdir()):
            deleted.rmdir()
            return
        kept = self.path / KEPT_AVERAGES / deleted.name.removesuffix(DELETED)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        os.replace(deleted, kept)

    def reading(self, step: int, file: str) -> AbstractContextManager[None]:
        """A block whose errors are damage of a checkpoint's `file`: see `disk.reading`."""
        return reading(self.checkpoint_path(step) / file, self._remedy(step))

    def _remedy(self, step: int) -> str:
        path = self.checkpoint_path(step)
        return f"{RESTORE}, or go on from an earlier checkpoint by deleting {path}"

    def load_state(self, step: int) -> dict[str, Any]:
        """The training state of a checkpoint, on the CPU; the file cannot run code."""
        path = self.checkpoint_path(step) / "state.pt"
        with self.reading(step, path.name):
            found = torch.load(path, map_location="cpu", weights_only=True)
            return dict(TypeAdapter(State).validate_python(found))

    def load_weights(
        self, step: int, weights: str, wanted: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The state dict of checkpoint `step`.

        Args:
            wanted: the state dict of a model that they must fit.
            weights: "raw"; "ema", the average that samples are drawn with; an average's own name,
                such as "ema-0.999", "power-0.1" or "own"; or "posthoc-LENGTH", combined from all
                power-function averages up to `step`, including those of deleted checkpoints.

        Raises:
            ConfigError: this run has no such weights, or its averages do not determine them.
        """
        if weights.startswith("posthoc-"):
            return self._posthoc_weights(step, weights, wanted)
        return read_tensors(self.weights_file(step, weights), self._remedy(step), wanted)

    def weights_file(self, step: int, weights: str) -> Path:
        """The file of the weights that `load_weights` returns, if they are not combined of several.

        Raises:
            ConfigError: this run has no such weights.
        """
        try:
            name = file_of(self.config, weights)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        return self.checkpoint_path(step) / f"{name}.safetensors"

    def _posthoc_weights(
        self, step: int, weights: str, wanted: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        stored = self.config.train.ema_lengths
        if not stored:
            raise ConfigError(f"{self.path}: {weights} needs a run with train.ema_lengths")
        folders = {
            t: self.path / place / _step_name(t)
            for place in (KEPT_AVERAGES, CHECKPOINTS)
            for t in _steps_in(self.path / place)
            if t <= step
        }
        snapshots = [(t, length) for t in sorted(folders) for length in stored]
        try:
            length = float(weights.removeprefix("posthoc-"))
            coefficients = posthoc_coefficients(snapshots, step, length)
        except ValueError as error:
            raise ConfigError(f"{self.path}: weights {weights}: {error}") from None
        names = ((t, Average(length=length).name) for t, length in snapshots)
        files = (folders[t] / f"{name}.safetensors" for t, name in names)
        return combine(
            (read_tensors(file, RESTORE, wanted) for file in files), coefficients.tolist()
        )

    def chosen_step(self, step: int | None = None) -> int:
        """`step`, or that of the newest checkpoint.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise ConfigError(f"{self.path}: this run has no checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise ConfigError(f"{self.path}: no checkpoint at step {step}; there are: {known}")
        return step

    def load_model(
        self,
        step: int | None = None,
        weights: str = "ema",
        device: str | torch.device = "cpu",
    ) -> tuple[nn.Module, int]:
        """The model of checkpoint `step` (default: the newest) in evaluation mode, and the step.

        Raises:
            ConfigError: there is no such checkpoint, or it has no such weights (`load_weights`).
        """
        step = self.chosen_step(step)
        model = build_model(self.config, self.dataset.image_shape, self.dataset.num_classes)
        model.load_state_dict(self.load_weights(step, weights, model.state_dict()))
        return model.to(device).eval(), step

    def num_parameters(self) -> int:
        """Number of trained numbers in the model, which is not loaded for that."""
        with torch.device("meta"):
            model = build_model(self.config, self.dataset.image_shape, self.dataset.num_classes)
        return sum(parameter.numel() for parameter in model.parameters())

    # Metrics

    def append_metrics(self, line: dict[str, Any]) -> None:
        path = self.path / "metrics.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as handle:
            handle.write(to_json(line, indent=None))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order, without a last line that a crash cut short."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        found, lines = [], path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            with reading(f"{path}, line {number}", f"{RESTORE}, or delete the line"):
                parse_json(MetricsLine, line)
                found.append(json.loads(line))  # in the order of the file
        return found

    def _drop_metrics_after(self, step: int) -> None:
        """Delete the lines of steps after `step`."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        text = "".join(to_json(line, indent=None) for line in kept)
        write_text(self.path / "metrics.jsonl", text)


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _steps_in(folder: Path) -> list[int]:
    """Steps of the folders named `step-00000500` in `folder`, ascending."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def check_same_run(
    run: RunFolder, config: Config, dataset: DatasetInfo, *, changed_data: bool = False
) -> None:
    """Check that the weights of `run` come from the settings and the data given here.

    Args:
        changed_data: allow other images of the same shape and classes.

    Raises:
        ConfigError: names the first setting that differs, and both values.
    """
    old, new = (flat(to_dict(effective(given))) for given in (run.config, config))
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(name + ".") for name in FREE_ON_RESUME)
        if not free and old.get(key) != new.get(key):
            raise ConfigError(
                f"{run.path}: a run of another config is here: {key} was {old.get(key)}, "
                f"now {new.get(key)}; choose another folder by name=NEW"
            )
    if config.train.steps != run.config.train.steps and config.train.lr_decay != "constant":
        raise ConfigError(
            f"{run.path}: train.steps was {run.config.train.steps}, now {config.train.steps}: the "
            f"{config.train.lr_decay} learning rate depends on it, so the run cannot be resumed; "
            f"train on from its weights in a run of its own by name=NEW train.init_from={run.path}"
        )
    if dataset.fingerprint != run.dataset.fingerprint and not changed_data:
        raise ConfigError(
            f"{run.path}: the images in {config.data.root} are not those this run was trained on; "
            "give those, or go on with these by --resume --changed-data"
        )
    for key in ("image_shape", "class_names"):
        was, now = getattr(run.dataset, key), getattr(dataset, key)
        if was != now:
            raise ConfigError(
                f"{run.path}: the {key} of the data was {was}, now {now}; "
                "choose another folder by name=NEW"
            )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
