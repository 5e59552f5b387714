"""The card that goes with every number: what was measured, of what, against what, and how.

run, step, weights, checkpoint {step, sha256}, metrics {...}, proxy,
sampling {solver, steps | atol, rtol, ..., nfe, num_images, labels, seed},
extractor {name, space, weights_sha256, held_out_accuracy},
reference {name, fingerprint, num_images}, uint8, versions, commit, seconds
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from flowdopr.config import Config
from flowdopr.data import UINT8_RULE, DatasetInfo
from flowdopr.flow import ADAPTIVE_SOLVERS, BATCH_DEPENDENT_SOLVERS, Sampling
from flowdopr.models.weights import weights_sha256
from flowdopr.train.guide import Guide
from flowdopr.train.provenance import commit, versions
from flowdopr.train.run_folder import RunFolder, write_atomically


def origin(run: RunFolder, model: nn.Module, step: int, weights: str) -> dict[str, Any]:
    """Which weights, and which code makes images of them."""
    return {
        "run": run.config.name,
        "step": step,
        "weights": weights,
        "checkpoint": {"step": step, "sha256": weights_sha256(model)},
        "uint8": UINT8_RULE,
        "versions": versions(),
        "commit": commit(),
    }


def decoder_record(dataset: DatasetInfo, config: Config) -> dict[str, Any] | None:
    """What decodes a model's latents, where `config.data.autoencoder` says it lies; None: pixels"""
    if dataset.autoencoder is None:
        return None
    moved = {"name": config.data.autoencoder} if config.data.autoencoder else {}
    return dataset.autoencoder | moved


def sampling_settings(config: Config, sampling: Sampling, guide: Guide) -> dict[str, Any]:
    """What decides the rollouts: section `sample` without what this solver ignores."""
    settings = config.sample.model_dump(mode="json", exclude={"num_images"})
    if guide.model is not None:
        settings["guide"] = (guide.origin or {}) | {"sha256": weights_sha256(guide.model)}
    guided = ("guide_run", "guide_weights", "guide_step")
    ignored = set(guided) if guide.model is None else set()
    ignored |= {"noise_scale"} if not sampling.stochastic else set()
    if sampling.solver in ADAPTIVE_SOLVERS:
        ignored |= {"steps"}
    if sampling.solver not in BATCH_DEPENDENT_SOLVERS:
        ignored |= {"atol", "rtol", "batch_size"}
    return {key: value for key, value in settings.items() if key not in ignored}


def card_path(folder: Path, step: int, settings: Mapping[str, Any]) -> Path:
    """`step-00000500-<hash of the settings>.json`: same settings, same name."""
    text = json.dumps(settings, sort_keys=True)
    return folder / f"step-{step:08d}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def read_card(path: Path) -> dict[str, Any] | None:
    """The card at `path`, None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Write `card` whole or not at all; a number that is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(card), indent=2, allow_nan=False)
    write_atomically(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
