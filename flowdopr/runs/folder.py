"""The run folder: every file of a training run, and the functions that write and read it.

    config.yaml      the resolved config          metrics.jsonl   one line a log or validation
    dataset.json     DatasetInfo                  log.txt         the lines of the log
    versions.json    versions, commit, hardware   samples/        step-00000500.png
    checkpoints/step-00000500/                    evaluation/     cards
        see `checkpoint.py`
    averages/step-00000250/
        power-0.1.safetensors, ...: kept from a deleted checkpoint, for post-hoc averages
    tensorboard/, wandb/, tracker-id: of trackers, see `train/trackers.py`

A checkpoint has checksums of its files, and copies of config.yaml, dataset.json, versions.json and
metrics.jsonl, from which a resumed run restores its own. These carry checksums themselves, so that
whoever reads them notices damage.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from flowdopr.config import Config, ConfigError, load_config, to_yaml
from flowdopr.config.own import naming
from flowdopr.data import DatasetInfo
from flowdopr.disk import (
    WriteError,
    check_sealed_text,
    read_json,
    read_tensors,
    reading,
    sealed,
    sealed_text,
    to_json,
    write_tensors,
    write_text,
    writing,
)
from flowdopr.models import build_model, merge_pc_layers, update_spectral_norms
from flowdopr.runs.averages import Average, combine, file_of, posthoc_coefficients
from flowdopr.runs.checkpoint import (
    MANIFEST,
    checked_file,
    has_checksums,
    kept_steps,
    manifest_of,
    new_checkpoint,
    step_name,
    steps_in,
)
from flowdopr.runs.contents import MadeBy, State
from flowdopr.runs.metrics import MetricsFile
from flowdopr.runs.same import other_setting

log = logging.getLogger("flowdopr.runs")

CHECKPOINTS, KEPT_AVERAGES = "checkpoints", "averages"
CONFIG, DATASET, VERSIONS, METRICS = "config.yaml", "dataset.json", "versions.json", "metrics.jsonl"
DELETED = ".deleted"  # suffix of a checkpoint while it is being deleted
# The remedies for damaged files.
RESTORE = "restore it from a copy of the run"
RESTORE_OR_RESUME = f"{RESTORE}, or by flowdopr train with the run's config and --resume"


class RunFolder:
    """A run on disk: `open` it to read it, or `begin.begin_run` to train it."""

    def __init__(self, path: Path, config: Config, dataset: DatasetInfo):
        self.path, self.config, self.dataset = path, config, dataset
        self._texts: dict[str, str] = {}
        """The content of config.yaml, dataset.json and versions.json in a run that is trained."""
        self._metrics = MetricsFile(path / METRICS)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run in the folder `path`.

        Raises:
            ConfigError: `path` is not a run folder.
            ValueError: a file of it is damaged.
        """
        path = Path(path)
        for name in (CONFIG, DATASET):
            if not (path / name).is_file():
                raise ConfigError(f"{path}: not a run folder: it has no {name}")
        check_sealed_text(path / CONFIG, RESTORE_OR_RESUME)
        info = read_json(path / DATASET, RESTORE_OR_RESUME, DatasetInfo)
        return cls(path, load_config(path / CONFIG, follow_base=False), info)

    def write_own_files(self, step: int, made_by: dict[str, Any]) -> None:
        """Write the files that a checkpoint has copies of, as training goes on from `step` with
        them: 0 or that of a checkpoint.

        Args:
            made_by: for versions.json.
        """
        self._texts = {
            VERSIONS: to_json(sealed(made_by)),
            DATASET: to_json(sealed(self.dataset.to_dict())),
            CONFIG: sealed_text(to_yaml(self.config)),
        }
        self._metrics.go_on(step, self._kept_lines(step))
        for name, text in self.texts().items():
            write_text(self.path / name, text)

    def made_by(self, step: int = 0) -> dict[str, Any]:
        """The content of versions.json (see `with_earlier`), or {} if nothing is trained yet.

        Args:
            step: of a checkpoint whose own copy is read, if it has one.

        Raises:
            ValueError: the file is damaged; so for every other reader of the folder.
        """
        path = self._copy(step, VERSIONS) or self.path / VERSIONS
        if not path.exists() and not self.steps():
            return {}
        return read_json(path, RESTORE_OR_RESUME, MadeBy)

    def texts(self) -> dict[str, str]:
        """The content of the files that a checkpoint has copies of, in a run that is trained."""
        return self._texts | {METRICS: self._metrics.text()}

    # Checkpoints

    def checkpoint_path(self, step: int) -> Path:
        return self.path / CHECKPOINTS / step_name(step)

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return steps_in(self.path / CHECKPOINTS)

    @contextmanager
    def new_checkpoint(
        self, step: int, *, texts: Mapping[str, str], note: Mapping[str, Any]
    ) -> Iterator[Path]:
        """Yield a folder for the tensors of checkpoint `step`, which appears whole at the end.

        Args:
            texts: what the method `texts` returned at this step.
            note: plain values for checkpoint.json.
        """
        with new_checkpoint(self.checkpoint_path(step), {"step": step, **note}) as part:
            yield part
            for name, text in texts.items():
                (part / name).write_bytes(text.encode("utf-8"))

    def save_checkpoint(
        self,
        step: int,
        *,
        model: dict[str, Tensor],
        averages: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        note: Mapping[str, Any],
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Write one checkpoint, then delete those that `train.keep_...` do not keep.

        Args:
            model: the raw weights, a state dict.
            averages: for each average's name, its state dict.
            state: the rest of what resuming needs; tensors and plain values only.
            texts, note: see `new_checkpoint`; without `texts`, those of now.
        """
        texts = self.texts() if texts is None else texts
        with self.new_checkpoint(step, texts=texts, note=note) as part:
            for name, weights in {"model": model, **averages}.items():
                write_tensors(part / f"{name}.safetensors", weights)
            torch.save(state, part / "state.pt")
        steps = self.steps()
        kept = kept_steps(steps, self.config.train, texts[METRICS])
        try:
            with writing(self.path / CHECKPOINTS):
                self._delete_checkpoints(step for step in steps if step not in kept)
        except WriteError as error:  # the new one is there
            log.warning("old checkpoints stay: %s", error.what)

    def check(self, step: int, remedy: str | None = None) -> None:
        """Check that checkpoint `step` is of this run and that all its files are sound.

        Raises:
            ValueError: names the first file that is not.
        """
        folder, remedy = self.checkpoint_path(step), remedy or self._remedy(step)
        for name in manifest_of(folder, remedy).get("files", ()):
            checked_file(folder, name, remedy)
        self._check_owner(step, remedy)

    def _check_owner(self, step: int, remedy: str) -> None:
        """Check that checkpoint `step` was not copied here from a run of another config."""
        path = self._copy(step, CONFIG, remedy)
        if path is None:
            log.warning(
                "%s: of an earlier version, without checksums: its files are used unchecked",
                self.checkpoint_path(step),
            )
        elif other := other_setting(load_config(path, follow_base=False), self.config):
            raise ValueError(f"{path.parent}: is of another run: {other}; {remedy}")

    def _copy(self, step: int, name: str, remedy: str | None = None) -> Path | None:
        """The copy of the run's file `name` in checkpoint `step`; None if it has none.

        Raises:
            ValueError: it is damaged.
        """
        folder, remedy = self.checkpoint_path(step), remedy or self._remedy(step)
        if step == 0 or not has_checksums(folder, remedy):
            return None
        return checked_file(folder, name, remedy)

    def newest_sound(self, remedy: str | None = None) -> tuple[int, dict[int, str]]:
        """The step of the newest sound checkpoint, 0 if there is none, and what is wrong with each
        that is newer, by its step."""
        wrong: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                self.check(step, remedy)
            except ValueError as error:
                wrong[step] = str(error)
            else:
                return step, wrong
        return 0, wrong

    def _delete_checkpoints(self, steps: Iterable[int]) -> None:
        """Delete the checkpoints of `steps`, except for their power-function averages.

        A checkpoint is renamed before its files are deleted, so a crash cannot leave an incomplete
        one under its final name. Deletions that a crash cut short are completed first.
        """
        for deleted in (self.path / CHECKPOINTS).glob("*" + DELETED):
            self._delete_files(deleted)
        for step in steps:
            deleted = self.path / CHECKPOINTS / (step_name(step) + DELETED)
            os.replace(self.checkpoint_path(step), deleted)
            self._delete_files(deleted)

    def _delete_files(self, deleted: Path) -> None:
        powers = {path.name for path in deleted.glob("power-*.safetensors")}
        for path in deleted.iterdir():
            if path.name not in powers | {MANIFEST}:
                path.unlink()
        if not powers:
            shutil.rmtree(deleted)
            return
        kept = self.path / KEPT_AVERAGES / deleted.name.removesuffix(DELETED)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        os.replace(deleted, kept)

    def reading(self, step: int, file: str) -> AbstractContextManager[None]:
        """A block whose errors are damage of a checkpoint's `file`: see `disk.reading`."""
        return reading(self.checkpoint_path(step) / file, self._remedy(step))

    def _remedy(self, step: int) -> str:
        others = [str(other) for other in self.steps() if other != step][-3:]
        choose = f"choose another by --step ({', '.join(others)}), " if others else ""
        return f"{RESTORE}, {choose}or go on with flowdopr train --resume, which sets it aside"

    def load_state(self, step: int) -> dict[str, Any]:
        """The training state of a checkpoint, on the CPU; the file cannot run code."""
        path = checked_file(self.checkpoint_path(step), "state.pt", self._remedy(step))
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
            ValueError: the file is damaged.
        """
        try:
            name = file_of(self.config, weights)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        return checked_file(self.checkpoint_path(step), f"{name}.safetensors", self._remedy(step))

    def _posthoc_weights(
        self, step: int, weights: str, wanted: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        stored = self.config.train.ema_lengths
        if not stored:
            raise ConfigError(f"{self.path}: {weights} needs a run with train.ema_lengths")
        folders = {
            t: self.path / place / step_name(t)
            for place in (KEPT_AVERAGES, CHECKPOINTS)
            for t in steps_in(self.path / place)
            if t <= step
        }
        snapshots = [(t, length) for t in sorted(folders) for length in stored]
        try:
            length = float(weights.removeprefix("posthoc-"))
            coefficients = posthoc_coefficients(snapshots, step, length)
        except ValueError as error:
            raise ConfigError(f"{self.path}: weights {weights}: {error}") from None
        names = ((t, Average(length=length).name) for t, length in snapshots)
        files = (self._power_file(folders[t], f"{name}.safetensors") for t, name in names)
        return combine(
            (read_tensors(file, RESTORE, wanted) for file in files), coefficients.tolist()
        )

    def _power_file(self, folder: Path, name: str) -> Path:
        """A power-function average, checked unless an earlier version kept it without checksums."""
        if folder.parent.name == KEPT_AVERAGES and not (folder / MANIFEST).exists():
            return folder / name
        return checked_file(folder, name, RESTORE)

    def chosen_step(self, step: int | None = None) -> int:
        """`step`, or that of the newest checkpoint.

        Raises:
            ConfigError: there is no such checkpoint.
            ValueError: it belongs to another run.
        """
        steps = self.steps()
        if not steps:
            raise ConfigError(f"{self.path}: this run has no checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise ConfigError(f"{self.path}: no checkpoint at step {step}; there are: {known}")
        self._check_owner(step, self._remedy(step))
        return step

    def load_model(
        self,
        step: int | None = None,
        weights: str = "ema",
        device: str | torch.device = "cpu",
    ) -> tuple[nn.Module, int]:
        """The model of checkpoint `step` (default: the newest) in evaluation mode, and the step.

        It has no PC layers: f of the loaded weights is merged into them.

        Raises:
            ConfigError: there is no such checkpoint, or it has no such weights (`load_weights`).
        """
        step = self.chosen_step(step)
        model = self.new_model(self.config)
        model.load_state_dict(self.load_weights(step, weights, model.state_dict()))
        update_spectral_norms(model)
        # Before the model is moved, so that its weights are the same on every device.
        return merge_pc_layers(model).to(device).eval(), step

    def new_model(self, config: Config) -> nn.Module:
        """The model of `config`, this run's, with weights as at the start of training.

        Raises:
            ConfigError: it is of code that this process is not allowed to run.
        """
        with naming(self.path):
            return build_model(config, self.dataset.image_shape, self.dataset.num_classes)

    def num_parameters(self) -> int:
        """Number of trained numbers in the model, which is not loaded for that."""
        # The user's own code may do what needs numbers.
        with torch.device("cpu" if self.config.model.name == "own" else "meta"):
            model = self.new_model(self.config)
        return sum(parameter.numel() for parameter in model.parameters())

    # Metrics

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; see `MetricsFile.append`."""
        self._metrics.append(line)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order, without a last line that a crash cut short.

        Raises:
            ValueError: a line is damaged, or some are missing that the newest checkpoint has.
        """
        kept = self._kept_lines(max(self.steps(), default=0))
        return self._metrics.read(kept, RESTORE_OR_RESUME)

    def _kept_lines(self, step: int) -> list[str]:
        """The lines of metrics.jsonl that checkpoint `step` has; none if it has no copy."""
        path = self._copy(step, METRICS)
        return path.read_text(encoding="utf-8").splitlines(keepends=True) if path else []
