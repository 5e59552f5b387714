"""`evaluate`: one checkpoint of a run, measured into a card."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from flowdopr.config import Config, ConfigError, apply_overrides
from flowdopr.config.schema import USED_BY
from flowdopr.data import Datasets
from flowdopr.evaluate.card import (
    autoencoder_record,
    card_path,
    card_settings,
    read_card,
    write_json,
)
from flowdopr.evaluate.exact import Measured, check_exact, measure_model
from flowdopr.evaluate.extractors import (
    CLASSIFIER,
    Extractor,
    Features,
    classifier_extractor,
    inception_extractor,
)
from flowdopr.evaluate.fidelity import check_numbers, fidelity, reference_features
from flowdopr.evaluate.generate import ImageSampler, balanced_labels, labels_like_data, mean_nfe
from flowdopr.evaluate.pretrained import NETWORKS, pretrained_extractor
from flowdopr.latents import build_datasets, build_pixel_datasets, load_decoder
from flowdopr.runs import RunFolder
from flowdopr.terminal import counting, print_line

FEWEST_FOR_FID = 50_000  # with fewer generated images, the card says that its distances are proxies
PLACES = ("root", "held_out_root", "download", "num_workers", "autoencoder", "source_root")
CHANGEABLE = ("sample.", "evaluate.", *(f"data.{key}=" for key in PLACES))


def build_extractor(config: Config, datasets: Datasets, device: torch.device) -> Extractor:
    """The feature space that `evaluate.extractor` names.

    Raises:
        ValueError: no classes to train a classifier on, or missing weights or packages.
    """
    extractor = config.evaluate.extractor
    if extractor.name == "inception":
        return inception_extractor(extractor.weights, device)
    if extractor.name in NETWORKS:
        return pretrained_extractor(extractor.name, getattr(extractor, "weights", None), device)
    return classifier_extractor(datasets, device)


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
        ConfigError, ValueError: no such run or checkpoint, other data than the run's, too few
            images, settings that cannot be used, missing Inception weights; one line each.
        RolloutsFailed: images are not finite, or the solver failed; no card is written.
    """
    started = time.perf_counter()
    folder = RunFolder.open(run)
    config = _changed(folder.config, overrides)
    sampler = ImageSampler.load(folder, config, step, config.evaluate.weights)
    origin, guide = sampler.origin(), sampler.guide_record()
    chosen, settings = config.evaluate, card_settings(config, folder.dataset)
    path = card_path(folder.path / "evaluation", sampler.step, settings | guide)
    known = read_card(path)
    if known is not None and not force and known["checkpoint"] == origin["checkpoint"]:
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
        check_numbers(chosen.metrics, chosen.fid_num_images, pixels.info.num_train)
        extractor = build_extractor(config, pixels, sampler.device)
    record = autoencoder_record(datasets.info, config)
    labels = _labels(config, sampler.num_classes, datasets)
    decode = load_decoder(record, sampler.device)
    generated, nfe = _draw_features(sampler, extractor, labels, decode)
    if sampler.state.is_main_process:
        if extractor.warning:
            print_line(f"warning: {extractor.warning}")
        metrics, how = measure_model(config, sampler.model, datasets, sampler.device)
        distances, more = _measure_images(config, generated, labels, pixels, extractor)
        card = origin | how | more | {"settings": settings, "metrics": metrics | distances}
        card |= {"sampling": settings["sampling"] | guide | {"nfe": nfe}}
        card |= {"proxy": chosen.fid_num_images < FEWEST_FOR_FID}
        card |= {"autoencoder": record} if record else {}
        card |= {"extractor": extractor.to_dict(), "reference": _reference(pixels)}
        write_json(path, card | {"seconds": round(time.perf_counter() - started, 3)})
    sampler.state.wait_for_everyone()
    return path


def _draw_features(
    sampler: ImageSampler,
    extractor: Extractor,
    labels: Tensor | None,
    decode: Callable[[Tensor], Tensor],
) -> tuple[Features, int | float]:
    """The features of the generated images, and their NFE, in every process.

    The images themselves are forgotten batch by batch: all of them may be more than memory holds.
    """
    chosen, main = sampler.config.evaluate, sampler.state.is_main_process
    batches, found = sampler.share(chosen.fid_num_images), []
    with counting("sampling", sum(map(len, batches)), shown=main) as progress:
        for batch in batches:
            images, nfe = sampler.draw(batch, labels, seed=chosen.seed, decode=decode)
            found.append((batch, extractor(images), nfe))
            progress(len(batch))
    if sampler.state.num_processes > 1:
        found = sorted(gather_object(found), key=lambda item: item[0].start)
    columns = zip(*(features for _, features, _ in found), strict=True)
    features = Features(*(torch.cat(column) for column in columns))
    return features, mean_nfe({batch: nfe for batch, _, nfe in found})


def _labels(config: Config, num_classes: int, datasets: Datasets) -> Tensor | None:
    """The labels of the generated images, as `evaluate.labels` says; None if unconditional."""
    if not num_classes:
        return None
    if config.evaluate.labels == "balanced":
        return balanced_labels(config.evaluate.fid_num_images, num_classes)
    return labels_like_data(config.evaluate.fid_num_images, datasets.train.labels)


def _measure_images(
    config: Config,
    generated: Features,
    labels: Tensor | None,
    pixels: Datasets,
    extractor: Extractor,
) -> Measured:
    """Distances of the generated images to the real ones in `pixels`, and their label accuracy."""
    metrics, how = {}, {}
    if config.evaluate.metrics:
        real = reference_features(pixels.reference, pixels.info.fingerprint, extractor)
        metrics, how = fidelity(generated, real, extractor, config.evaluate.metrics)
    balanced = labels is not None and config.evaluate.labels == "balanced"
    if balanced and extractor.name == CLASSIFIER:
        right = generated.logits.argmax(1) == labels
        metrics["label_accuracy"] = right.double().mean().item()
    return metrics, how


def _reference(pixels: Datasets) -> dict[str, Any]:
    """The real images of the distances, for the card."""
    info = pixels.info
    return {
        "name": f"{info.name} train",
        "fingerprint": info.fingerprint,
        "num_images": info.num_train,
    }


def _changed(config: Config, overrides: Iterable[str]) -> Config:
    """The run's config with `overrides`, which may not change what the weights depend on.

    The folder may be a stranger's, and a download writes to the place that its config names, so
    nothing is downloaded unless an override says so.
    """
    overrides = list(overrides)
    for override in overrides:
        if not override.startswith(CHANGEABLE):
            raise ConfigError(
                f"override '{override}': the run is trained; only sample.*, evaluate.* and data."
                f"{{{', '.join(PLACES)}}} can still change"
            )
        if override.startswith("sample.num_images="):
            raise ConfigError(
                f"override '{override}': it sets the grids drawn in training; set "
                "evaluate.fid_num_images"
            )
    if config.data.name in USED_BY["download"]:
        overrides.insert(0, "data.download=false")
    return apply_overrides(config, overrides)
