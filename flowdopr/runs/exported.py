"""A model of a run as one safetensors file: weights, and in the header all that sampling needs.

The header's metadata are texts: `config` (YAML), `dataset` (JSON of DatasetInfo) and `origin` (JSON
of Origin). Readers take the file for a run that has this checkpoint alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from flowdopr.config import Config, ConfigError, read_config, to_yaml
from flowdopr.config.yaml12 import parse_yaml
from flowdopr.data import DatasetInfo
from flowdopr.disk import parse_json, read_tensors, reading, to_json, write_tensors
from flowdopr.runs.folder import RunFolder
from flowdopr.runs.provenance import commit, versions

REMEDY = "give a run folder, or a file that `flowdopr export` wrote"


class Origin(TypedDict):
    """Which weights a file holds, and what it was written by."""

    run: str
    step: int
    weights: str
    versions: NotRequired[dict[str, str]]
    commit: NotRequired[str]


class ExportedRun(RunFolder):
    """A file in the place of a run: it has one model, and nothing is trained or written."""

    def __init__(self, path: Path, config: Config, dataset: DatasetInfo, origin: Origin):
        super().__init__(path, config, dataset)
        self.origin = origin

    @classmethod
    def open(cls, path: str | Path) -> ExportedRun:
        """The run in the file `path`.

        Raises:
            ValueError: it is missing or damaged, or was not written by `write_exported`.
        """
        path = Path(path)
        with reading(path, REMEDY):
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
            if not {"config", "dataset", "origin"} <= header.keys():
                raise ValueError("its header has no config, data set and origin")
            config = read_config(parse_yaml(header["config"]), follow_base=False)
            dataset = parse_json(DatasetInfo, header["dataset"])
            return cls(path, config, dataset, parse_json(Origin, header["origin"]))

    def load_model(
        self, step: int | None = None, weights: str = "ema", device: str | torch.device = "cpu"
    ) -> tuple[nn.Module, int]:
        """As `RunFolder.load_model`, for the weights that it has, which "ema" stands for."""
        own = self.origin
        if step not in (None, own["step"]) or weights not in ("ema", own["weights"]):
            raise ConfigError(
                f"{self.path}: has the weights {own['weights']} of step {own['step']} alone; name "
                "no others"
            )
        plain = self.config.model.model_copy(update={"pc": None})  # PC layers were merged
        config = self.config.model_copy(update={"model": plain})
        model = self.new_model(config)
        model.load_state_dict(read_tensors(self.path, REMEDY, model.state_dict()))
        return model.to(device).eval(), own["step"]


def open_run(path: str | Path) -> RunFolder:
    """The run in a folder, or the one that an exported file stands for.

    Raises:
        ConfigError, ValueError: neither is there, or it is damaged.
    """
    return (ExportedRun if Path(path).is_file() else RunFolder).open(path)


def write_exported(
    path: Path, run: RunFolder, model_weights: dict[str, Tensor], *, step: int, weights: str
) -> None:
    """Write `model_weights`, which are the `weights` of checkpoint `step` of `run`."""
    origin: dict[str, Any] = {"run": run.config.name, "step": step, "weights": weights}
    origin |= {"versions": versions(), "commit": commit()}
    header = {"format": "pt", "config": to_yaml(run.config), "origin": json.dumps(origin)}
    header |= {"dataset": to_json(run.dataset.to_dict(), indent=None)}
    write_tensors(path, model_weights, header)
