"""`evaluate`: one checkpoint of a run, measured into a card."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdopr.config import Config, ConfigError, apply_overrides
from flowdopr.data import Datasets, ImageTensor
from flowdopr.evaluate.card import (
    autoencoder_record,
    card_path,
    card_settings,
    read_card,
    write_card,
)
from flowdopr.evaluate.classifier import load_classifier, predict
from flowdopr.evaluate.exact import check_exact, measure_model
from flowdopr.evaluate.extractors import (
    CLASSIFIER,
    Extractor,
    classifier_extractor,
    inception_extractor,
)
from flowdopr.evaluate.fidelity import fidelity
from flowdopr.evaluate.generate import ImageSampler, balanced_labels, labels_like_data
from flowdopr.evaluate.pretrained import NETWORKS, pretrained_extractor
from flowdopr.latents import build_datasets, build_pixel_datasets
from flowdopr.runs import RunFolder

FEWEST_FOR_FID = 50_000  # with fewer generated images, the card says that its distances are proxies
PLACES = ("root", "held_out_root", "download", "num_workers", "autoencoder", "source_root")
CHANGEABLE = ("sample.", "evaluate.", *(f"data.{key}=" for key in PLACES))


def build_extractor(config: Config, datasets: Datasets) -> Extractor:
    """The feature space that `evaluate.extractor` names.

    Raises:
        ValueError: no classes to train a classifier on, or missing weights or packages.
    """
    extractor = config.evaluate.extractor
    if extractor.name == "inception":
        return inception_extractor(extractor.weights)
    if extractor.name in NETWORKS:
        return pretrained_extractor(extractor.name, getattr(extractor, "weights", None))
    return classifier_extractor(datasets)


def evaluate(
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    step: int | None = None,
    force: bool = False,
) -> Path:
    """Measure checkpoint `step` (default: the newest) of `run` and return the path of its card.

    A card of the same settings and the same weights is not made again unless `force`. Under
    `accelerate launch` the processes share the sampling.

    Args:
        overrides: `a.b=value` for the sections sample and evaluate, and where the data lies.

    Raises:
        ConfigError, ValueError: no such run or checkpoint, other data than the run's, settings that
            cannot be used, missing Inception weights; one line each.
    """
    started = time.perf_counter()
    folder = RunFolder.open(run)
    config = _changed(folder.config, overrides)
    sampler = ImageSampler.load(folder, config, step, config.evaluate.weights)
    origin, guide = sampler.origin(), sampler.guide_record()
    settings = card_settings(config, folder.dataset, processes=sampler.state.num_processes)
    path = card_path(folder.path / "evaluation", sampler.step, settings | guide)
    if path.is_file() and not force and read_card(path)["checkpoint"] == origin["checkpoint"]:
        return path
    with sampler.state.main_process_first():
        datasets = build_datasets(config)
        if datasets.info.fingerprint != folder.dataset.fingerprint:
            raise ConfigError(
                f"{folder.path}: the images in data.root={config.data.root} are not those it was "
                "trained on; give data.root=FOLDER_OF_THOSE"
            )
        check_exact(config, datasets)
        pixels = build_pixel_datasets(config) if datasets.info.autoencoder else datasets
        extractor = build_extractor(config, pixels)
    record = autoencoder_record(datasets.info, config)
    labels = _labels(config, sampler.num_classes, datasets)
    images, nfe = sampler.draw(
        config.evaluate.fid_num_images, labels, seed=config.evaluate.seed, autoencoder=record
    )
    if sampler.state.is_main_process:
        card = origin | {"settings": settings}
        card |= {"sampling": settings["sampling"] | guide | {"nfe": nfe}}
        metrics, how = measure_model(config, sampler.model, datasets, sampler.device)
        metrics |= _measure_images(config, images, labels, pixels, extractor, sampler.device)
        card |= how | {"metrics": metrics, "proxy": len(images) < FEWEST_FOR_FID}
        card |= {"autoencoder": record} if record else {}
        card |= {"extractor": extractor.to_dict(), "reference": _reference(pixels)}
        write_card(path, card | {"seconds": round(time.perf_counter() - started, 3)})
    sampler.state.wait_for_everyone()
    return path


def _labels(config: Config, num_classes: int, datasets: Datasets) -> Tensor | None:
    """The labels of the generated images, as `evaluate.labels` says; None if unconditional."""
    if not num_classes:
        return None
    if config.evaluate.labels == "balanced":
        return balanced_labels(config.evaluate.fid_num_images, num_classes)
    return labels_like_data(config.evaluate.fid_num_images, datasets.train.labels)


def _measure_images(
    config: Config,
    images: Tensor,
    labels: Tensor | None,
    pixels: Datasets,
    extractor: Extractor,
    device: torch.device,
) -> dict[str, float]:
    """Distances of the generated images to the real ones in `pixels`, and their label accuracy."""
    metrics = fidelity(
        ImageTensor(images, torch.zeros(len(images), dtype=torch.int64)),
        pixels.reference,
        extractor,
        config.evaluate.metrics,
        reference_fingerprint=pixels.info.fingerprint,
        device=device,
    )
    balanced = labels is not None and config.evaluate.labels == "balanced"
    if balanced and extractor.name == CLASSIFIER:
        predicted = predict(load_classifier(extractor.weights), images)
        metrics["label_accuracy"] = (predicted == labels).double().mean().item()
    return metrics


def _reference(pixels: Datasets) -> dict[str, Any]:
    """The real images of the distances, for the card."""
    info = pixels.info
    return {
        "name": f"{info.name} train",
        "fingerprint": info.fingerprint,
        "num_images": info.num_train,
    }


def _changed(config: Config, overrides: Iterable[str]) -> Config:
    """The run's config with `overrides`, which may not change what the weights depend on."""
    overrides = list(overrides)
    for override in overrides:
        if not override.startswith(CHANGEABLE):
            raise ConfigError(
                f"override '{override}': the run is trained; only sample.*, evaluate.* and data."
                f"{{{', '.join(PLACES)}}} can still change"
            )
    return apply_overrides(config, overrides)
