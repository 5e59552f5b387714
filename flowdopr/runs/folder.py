"""The run folder: everything a training run leaves behind, and the only way rooms read it.

    config.yaml      the resolved config          metrics.jsonl   one line a log or validation
    dataset.json     DatasetInfo                  log.txt         what was printed
    versions.json    versions, commit, hardware   samples/        step-00000500.png
    checkpoints/step-00000500/                    evaluation/     cards
        model.safetensors, ema-0.9999.safetensors, ..., state.pt, checkpoint.json
    averages/step-00000250/    the power-function averages of a checkpoint that was dropped

A checkpoint is written beside its place and renamed into it, so whatever bears its name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowdopr.config import Config, ConfigError, load_config, to_dict, to_yaml
from flowdopr.data import DatasetInfo
from flowdopr.disk import LOCK, to_disk, write_text
from flowdopr.models import build_model
from flowdopr.runs.averages import (
    CHECKPOINTS,
    LEFT,
    averages_of,
    drop_checkpoints,
    folder_of,
    posthoc_weights,
    steps_in,
)
from flowdopr.runs.provenance import with_earlier

# Settings that may change when a run goes on: they do not change what the weights become.
FREE_ON_RESUME = (
    *("name", "output", "sample", "evaluate", "compare"),
    *("data.root", "data.held_out_root", "data.download", "data.num_workers"),
    *("data.autoencoder", "data.source_root"),
    *(f"train.{key}" for key in ("steps", "log_every", "validate_every", "sample_every")),
    *("train.checkpoint_every", "train.keep_checkpoints"),
)
# What `create` makes before config.yaml, which turns a folder into a run; a crash may leave these.
BEFORE_CONFIG = {
    *(CHECKPOINTS, "samples", "evaluation", "versions.json", "dataset.json", LOCK),
    *(f"{name}.part" for name in ("versions.json", "dataset.json", "config.yaml")),
}


class RunFolder:
    """A run on disk. `create` starts one or goes on with one, `open` reads one."""

    def __init__(self, path: Path, config: Config, dataset: DatasetInfo):
        self.path, self.config, self.dataset = path, config, dataset

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run in `path`.

        Raises:
            ConfigError: `path` is not a run folder.
        """
        path = Path(path)
        for name in ("config.yaml", "dataset.json"):
            if not (path / name).is_file():
                raise ConfigError(f"{path}: not a run folder: it has no {name}")
        info = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
        return cls(path, load_config(path / "config.yaml"), DatasetInfo.from_dict(info))

    @classmethod
    def create(
        cls, config: Config, dataset: DatasetInfo, made_by: dict[str, Any], *, resume: bool
    ) -> RunFolder:
        """The folder `<output>/<name>`, new or, with `resume`, the one that is there.

        Raises:
            ConfigError: see `check_place`.
        """
        cls.check_place(config, dataset, resume=resume)
        path = Path(config.output) / config.name
        for folder in (CHECKPOINTS, "samples", "evaluation"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        run = cls(path, config, dataset)
        if not run.steps():  # what an earlier run left of its checkpoints is none of this one
            shutil.rmtree(path / LEFT, ignore_errors=True)
        if config.train.steps not in run.steps():  # a finished run keeps what it was made by
            made_by = with_earlier(made_by, run.made_by(), max(run.steps(), default=0))
            write_text(path / "versions.json", json.dumps(made_by, indent=2) + "\n")
        write_text(path / "dataset.json", json.dumps(dataset.to_dict(), indent=2) + "\n")
        write_text(path / "config.yaml", to_yaml(config))
        return run

    @classmethod
    def check_place(cls, config: Config, dataset: DatasetInfo, *, resume: bool) -> None:
        """Refuse a folder that this run must not be written into; writes nothing.

        Raises:
            ConfigError: the folder holds a run and `resume` is off, or a run of another config, or
                something else.
        """
        path = Path(config.output) / config.name
        if (path / "config.yaml").exists():
            before = cls.open(path)
            if before.steps():  # else it stopped before its first checkpoint: nothing to lose
                if not resume:
                    raise ConfigError(
                        f"{path}: a run is here already; go on with it by --resume, "
                        "or choose another one by name=NEW"
                    )
                check_same_run(before, config, dataset)
        elif path.exists() and not {item.name for item in path.iterdir()} <= BEFORE_CONFIG:
            raise ConfigError(f"{path}: holds files that are no run; choose another by name=NEW")

    def made_by(self) -> dict[str, Any]:
        """versions.json: what made the newest part of the run, from which step on, and under
        "earlier" the same of the parts before it; {} where there is none yet."""
        path = self.path / "versions.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    # Checkpoints

    def checkpoint_path(self, step: int) -> Path:
        return self.path / CHECKPOINTS / folder_of(step)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return steps_in(self.path / CHECKPOINTS)

    def save_checkpoint(
        self,
        step: int,
        *,
        model: dict[str, Tensor],
        averages: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        note: dict[str, Any],
    ) -> Path:
        """Write one checkpoint whole, then drop those beyond `train.keep_checkpoints`.

        Args:
            model: weights by name.
            averages: for each average's name, its weights by name.
            state: the rest of what training needs to go on; tensors and plain values only.
            note: plain values for checkpoint.json.
        """
        final = self.checkpoint_path(step)
        part = final.with_name(final.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, weights in {"model": model, **averages}.items():
            whole = {key: value.contiguous() for key, value in weights.items()}
            save_file(whole, part / f"{name}.safetensors")
        torch.save(state, part / "state.pt")
        (part / "checkpoint.json").write_text(json.dumps({"step": step, **note}, indent=2) + "\n")
        for file in part.iterdir():
            to_disk(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        keep = self.config.train.keep_checkpoints
        drop_checkpoints(self.path, self.steps()[: -keep if keep else 0])
        return final

    def load_state(self, step: int) -> dict[str, Any]:
        """The training state of a checkpoint, on the CPU; no code is run from the file."""
        return torch.load(
            self.checkpoint_path(step) / "state.pt", map_location="cpu", weights_only=True
        )

    def load_weights(self, step: int, weights: str) -> dict[str, Tensor]:
        """Weights of checkpoint `step` by name.

        Args:
            weights: "raw"; "ema", the average that is sampled from; an average's own name, such as
                "ema-0.999" or "power-0.1"; "posthoc-LENGTH", made from all power-function averages
                stored up to `step`, those of dropped checkpoints too.

        Raises:
            ConfigError: this run has no such weights, or too few averages to make them.
        """
        if weights.startswith("posthoc-"):
            return posthoc_weights(self.path, self.config, step, weights)
        names = [average.name for average in averages_of(self.config)]
        files = {"raw": "model", "ema": names[0], **{name: name for name in names}}
        if weights not in files:
            raise ConfigError(
                f"{self.path}: no weights '{weights}'; there are: {', '.join(files)}"
                + (", posthoc-LENGTH" if self.config.train.ema_lengths else "")
            )
        return load_file(self.checkpoint_path(step) / f"{files[weights]}.safetensors")

    def load_model(
        self,
        step: int | None = None,
        weights: str = "ema",
        device: str | torch.device = "cpu",
    ) -> tuple[nn.Module, int]:
        """The model of checkpoint `step` (default: the newest) in evaluation mode, and its step.

        Raises:
            ConfigError: there is no such checkpoint, or it has no such `weights` (`load_weights`).
        """
        steps = self.steps()
        if not steps:
            raise ConfigError(f"{self.path}: this run has no checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise ConfigError(f"{self.path}: no checkpoint at step {step}; there are: {known}")
        model = build_model(self.config, self.dataset.image_shape, self.dataset.num_classes)
        model.load_state_dict(self.load_weights(step, weights))
        return model.to(device).eval(), step

    # Metrics

    def append_metrics(self, line: dict[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order; a last line cut by a crash is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def forget_metrics_after(self, step: int) -> None:
        """Drop what a cut run logged beyond the checkpoint it goes on from."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self.path / "metrics.jsonl", text)


def check_same_run(run: RunFolder, config: Config, dataset: DatasetInfo) -> None:
    """Refuse to go on with a run whose weights came from other settings or other data.

    Raises:
        ConfigError: names the first setting that differs, and both values.
    """
    old, new = _flat(to_dict(run.config)), _flat(to_dict(config))
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(name + ".") for name in FREE_ON_RESUME)
        if not free and old.get(key) != new.get(key):
            raise ConfigError(
                f"{run.path}: a run of another config is here: {key} was {old.get(key)}, "
                f"now {new.get(key)}; choose another folder by name=NEW"
            )
    if config.train.steps != run.config.train.steps and config.train.lr_decay != "constant":
        raise ConfigError(
            f"{run.path}: train.steps was {run.config.train.steps}, now {config.train.steps}: "
            f"it shapes the {config.train.lr_decay} learning rate, so the run cannot go on"
        )
    if dataset.fingerprint != run.dataset.fingerprint:
        raise ConfigError(f"{run.path}: the images in {config.data.root} are not this run's images")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
