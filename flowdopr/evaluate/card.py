"""The card that goes with every number: what was measured, of what, against what, and how.

run, step, weights, checkpoint {step, sha256}, settings {...}, metrics {...}, proxy,
sampling {solver {name, ...}, guidance, nfe, num_images, labels, seed, ...},
extractor {name, space, weights_sha256, held_out_accuracy}, one_step {times, seed},
reference {name, fingerprint, num_images}, uint8, versions, commit, seconds

`settings` are those that decide the numbers, for telling whether a card answers a question;
`sampling` repeats those of the rollouts with what came of them.
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
from flowdopr.disk import write_text
from flowdopr.evaluate.classifier import RECIPE
from flowdopr.flow import BATCH_DEPENDENT_SOLVERS
from flowdopr.models.weights import weights_sha256
from flowdopr.runs.folder import RunFolder
from flowdopr.runs.guide import Guide
from flowdopr.runs.provenance import commit, versions


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


def sampling_settings(config: Config) -> dict[str, Any]:
    """What decides the rollouts: section `sample` without the number of images, and without the
    batch size where images do not depend on it."""
    ignored = {"num_images"}
    if config.sample.solver.name not in BATCH_DEPENDENT_SOLVERS:
        ignored |= {"batch_size"}
    return config.sample.model_dump(mode="json", exclude=ignored)


def guide_record(guide: Guide) -> dict[str, Any]:
    """Which weights guided the rollouts, for a card's `sampling`; empty if none did."""
    if guide.model is None:
        return {}
    return {"guide": (guide.origin or {}) | {"sha256": weights_sha256(guide.model)}}


def card_settings(config: Config, dataset: DatasetInfo, *, processes: int = 1) -> dict[str, Any]:
    """Every setting that the numbers of a card depend on, as plain JSON values.

    Args:
        processes: that share the rollouts; it matters to solvers that depend on the batch alone.
    """
    chosen = config.evaluate
    sampling = sampling_settings(config)
    if "batch_size" in sampling:
        sampling["processes"] = processes
    sampling["num_images"] = chosen.fid_num_images
    conditional = config.model.class_conditional and dataset.num_classes > 0
    sampling["labels"] = chosen.labels if conditional else None
    sampling["seed"] = chosen.seed
    extractor = chosen.extractor.model_dump(mode="json")
    if chosen.extractor.name == "classifier":
        extractor["recipe"] = RECIPE
    settings = {
        "weights": chosen.weights,
        "sampling": sampling,
        "metrics": sorted(chosen.metrics),
        "extractor": extractor,
        "reference": dataset.fingerprint,
    }
    if chosen.bpd is not None:
        # Its solver is adaptive whatever the rollouts' is, so the batch size counts.
        batch = {"batch_size": config.sample.batch_size}
        settings["bpd"] = chosen.bpd.model_dump(mode="json") | batch
    if chosen.excess is not None:
        settings["excess"] = chosen.excess.model_dump(mode="json")
    return settings


def answers(card: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether `card` was made with `settings` (`card_settings`); it may hold further metrics."""
    made = card.get("settings", {})
    same = all(made.get(key) == value for key, value in settings.items() if key != "metrics")
    return same and set(settings["metrics"]) <= set(made.get("metrics", ()))


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
    write_text(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
