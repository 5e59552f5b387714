"""The card that goes with every number: what was measured, of what, against what, and how.

run, step, weights, checkpoint {step, sha256}, settings {...}, metrics {...}, proxy,
sampling {solver {name, ...}, guidance, nfe, num_images, labels, seed, ...},
extractor {name, space, weights_sha256, held_out_accuracy, chance, warning} or {} if no metric needs
one, one_step {times, seed},
reference {name, fingerprint, num_images}, or {name, sha256} of a file of statistics,
uint8, versions, commit, seconds,
gallery {file, num_images, nearest_ratio} if there is one

`settings` holds every setting that decides the numbers; a card with the same settings need not be
made again. `sampling` repeats those that decide the images, and adds the NFE and the guide.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from flowdopr.config import Config
from flowdopr.data import DatasetInfo
from flowdopr.disk import known_json, to_json
from flowdopr.evaluate.classifier import RECIPE
from flowdopr.evaluate.moments import file_record
from flowdopr.flow import BATCH_DEPENDENT_SOLVERS
from flowdopr.runs.same import flat


class _Checked(BaseModel, strict=True, allow_inf_nan=False):
    pass


Numbers = list[float | None]
Points = list[Annotated[tuple[int, float | None], Field(strict=False)]]


class _Metrics(_Checked):
    fd: float | None = None
    fid: float | None = None
    fd_by_images: Points = []
    fid_by_images: Points = []
    fd_infinity: float | None = None
    fid_infinity: float | None = None
    kid_mean: float | None = None
    precision: float | None = None
    recall: float | None = None
    spectrum_error: float | None = None
    spectrum: Numbers = []
    one_step_loss: float | None = None
    one_step_loss_by_time: Numbers = []
    one_step_loss_by_time_se: Numbers = []
    label_accuracy: float | None = None
    num_images: int | None = None


class _Sampling(_Checked):
    nfe: float
    num_images: int


class _Extractor(_Checked):
    name: str = "none"
    space: str = "none"
    held_out_accuracy: float | None = None
    warning: str | None = None


class _Reference(_Checked):
    name: str


class _Gallery(_Checked):
    file: str
    num_images: int
    nearest_ratio: float | None


class _Card(_Checked):
    """The fields of a card that `evaluate` and `compare` read."""

    step: int
    weights: str
    checkpoint: dict[str, Any]
    settings: dict[str, Any]
    metrics: _Metrics
    floor: _Metrics = _Metrics()
    sampling: _Sampling
    extractor: _Extractor
    reference: _Reference
    gallery: _Gallery | None = None


def autoencoder_record(dataset: DatasetInfo, config: Config) -> dict[str, Any] | None:
    """The autoencoder of a data set of latents, at `data.autoencoder` if that is set; None for
    pixels."""
    if dataset.autoencoder is None:
        return None
    moved = {"name": config.data.autoencoder} if config.data.autoencoder else {}
    return dataset.autoencoder | moved


def sampling_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the images: section `sample` without the number of images, and
    without the batch size unless the solver's steps depend on it."""
    ignored = {"num_images"}
    if config.sample.solver.name not in BATCH_DEPENDENT_SOLVERS:
        ignored |= {"batch_size"}
    return config.sample.model_dump(mode="json", exclude=ignored)


def card_settings(config: Config, dataset: DatasetInfo) -> dict[str, Any]:
    """Every setting that the numbers of a card depend on, as plain JSON values."""
    chosen = config.evaluate
    conditional = config.model.class_conditional and dataset.num_classes > 0
    sampling = sampling_settings(config) | {
        "num_images": chosen.fid_num_images,
        "labels": chosen.labels if conditional else None,
        "seed": chosen.seed,
    }
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
    if chosen.reference is not None:
        settings["statistics"] = file_record(Path(chosen.reference))["sha256"]
    if chosen.bpd is not None:
        # The likelihood's solver is always adaptive, so its steps depend on the batch.
        batch = {"batch_size": config.sample.batch_size}
        settings["bpd"] = chosen.bpd.model_dump(mode="json") | batch
    if chosen.excess is not None:
        settings["excess"] = chosen.excess.model_dump(mode="json")
    if chosen.drift is not None:
        settings["drift"] = chosen.drift.model_dump(mode="json")
    return settings


def answers(card: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether `card` was made with `settings` (`card_settings`); it may hold further metrics."""
    made, metrics = card["settings"], card["settings"].get("metrics")
    same = all(made.get(key) == value for key, value in settings.items() if key != "metrics")
    return same and isinstance(metrics, list) and all(one in metrics for one in settings["metrics"])


def card_path(folder: Path, step: int, settings: Mapping[str, Any]) -> Path:
    """`step-00000500-<hash of the settings>.json`: same settings, same name."""
    text = json.dumps(settings, sort_keys=True)
    return folder / f"step-{step:08d}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def read_card(path: Path) -> dict[str, Any] | None:
    """The card of an evaluation; None if it is damaged, so that it is made again."""
    card = known_json(path)
    try:
        _Card.model_validate(card)
    except ValidationError:
        return None
    return card


def first_difference(old: Any, new: Any, ignored: str = "") -> str | None:
    """The first dotted key whose values differ, with both; None if `old` and `new` are equal."""
    before, now = flat(old), flat(json.loads(to_json(new)))
    for key in sorted(before.keys() | now.keys()):
        if key != ignored and before.get(key) != now.get(key):
            return f"{key} was {before.get(key)}, now {now.get(key)}"
    return None
