"""`evaluate`: one checkpoint of a run, measured into a card."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor, nn

from flowdopr.config import Config, ConfigError, apply_overrides
from flowdopr.data import (
    Datasets,
    ImageTensor,
    plain_batches,
)
from flowdopr.evaluate.card import (
    card_path,
    card_settings,
    decoder_record,
    guide_record,
    origin,
    read_card,
    write_card,
)
from flowdopr.evaluate.classifier import load_classifier, predict
from flowdopr.evaluate.exact import Measured, check_exact, excess, likelihood
from flowdopr.evaluate.extractors import (
    CLASSIFIER,
    Extractor,
    classifier_extractor,
    inception_extractor,
)
from flowdopr.evaluate.fidelity import fidelity
from flowdopr.evaluate.generate import (
    balanced_labels,
    generate_images,
    labels_like_data,
)
from flowdopr.flow import (
    ONE_STEP_BATCH,
    build_objective,
    build_sampling,
    one_step_loss,
    rollout_span,
)
from flowdopr.flow.objective import num_classes_of
from flowdopr.latents import build_datasets, build_pixel_datasets, load_decoder
from flowdopr.linalg import full_float32
from flowdopr.processes import device_of, this_process
from flowdopr.runs.folder import RunFolder
from flowdopr.runs.guide import Guide, load_guide

CLAIM = 50_000  # generated images below which a Frechet distance is a proxy
PLACES = ("root", "held_out_root", "download", "num_workers", "autoencoder", "source_root")
CHANGEABLE = ("sample.", "evaluate.", *(f"data.{key}=" for key in PLACES))


def build_extractor(config: Config, datasets: Datasets) -> Extractor:
    """The feature space that `evaluate.extractor` names.

    Raises:
        ValueError: no classes to train a classifier on, or no Inception weights.
    """
    extractor = config.evaluate.extractor
    if extractor.name == "inception":
        return inception_extractor(extractor.weights)
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
    `accelerate launch` the rollouts are shared out over the processes.

    Args:
        overrides: `a.b=value` for the sections sample and evaluate, and where the data lies.

    Raises:
        ConfigError, ValueError: no such run or checkpoint, other data than the run's, settings that
            cannot be used, missing Inception weights; one line each.
    """
    started, state = time.perf_counter(), this_process()
    folder = RunFolder.open(run)
    config = _changed(folder.config, overrides)
    weights = config.evaluate.weights
    model, step = folder.load_model(step, weights, device_of(state))
    made_of = origin(folder, model, step, weights)
    guide = load_guide(config, folder.dataset, device_of(state))
    settings = card_settings(config, folder.dataset, processes=state.num_processes)
    guided = guide_record(guide)
    path = card_path(folder.path / "evaluation", step, settings | guided)
    known = None if force else read_card(path)
    if known is not None and known["checkpoint"] == made_of["checkpoint"]:
        return path
    with state.main_process_first():
        datasets = build_datasets(config)
        if datasets.info.fingerprint != folder.dataset.fingerprint:
            raise ConfigError(
                f"{folder.path}: the images in data.root={config.data.root} are not those it was "
                "trained on; give data.root=FOLDER_OF_THOSE"
            )
        check_exact(config, datasets)
        pixels = build_pixel_datasets(config) if datasets.info.autoencoder else datasets
        extractor = build_extractor(config, pixels)
    measurement = Measurement(config, model, datasets, pixels, extractor, guide, state)
    images, labels, nfe = measurement.images()
    if state.is_main_process:
        measured = measurement.card(images, labels)
        sampled = {"sampling": settings["sampling"] | guided | {"nfe": nfe}}
        seconds = {"seconds": round(time.perf_counter() - started, 3)}
        write_card(path, made_of | {"settings": settings} | sampled | measured | seconds)
    state.wait_for_everyone()
    return path


@dataclass
class Measurement:
    """Everything one evaluation works with; `images` on all processes, `card` on the main one.

    `pixels` are the real images; `datasets` what the model saw of them, the same or latents."""

    config: Config
    model: nn.Module
    datasets: Datasets
    pixels: Datasets
    extractor: Extractor
    guide: Guide
    state: PartialState

    def images(self) -> tuple[Tensor, Tensor | None, float]:
        """Generated images uint8 (N, C, H, W), their labels (N,) or None, and the NFE an image."""
        settings, num = self.config.evaluate, self.config.evaluate.fid_num_images
        labels, num_classes = None, num_classes_of(self.model)
        if num_classes and settings.labels == "balanced":
            labels = balanced_labels(num, num_classes)
        elif num_classes:
            labels = labels_like_data(num, self.datasets.train.labels)
        decoder = decoder_record(self.datasets.info, self.config)
        images, nfe = generate_images(
            self.model,
            labels,
            num,
            sampling=build_sampling(self.config),
            seed=settings.seed,
            batch_size=self.config.sample.batch_size,
            state=self.state,
            guide_model=self.guide.model,
            decode=load_decoder(decoder, device_of(self.state)),
        )
        return images, labels, nfe

    def card(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """All that is measured, and against what."""
        info, settings = self.pixels.info, self.config.evaluate
        metrics, how = self._one_step()
        metrics |= fidelity(
            ImageTensor(images, self.datasets.train.labels.new_zeros(len(images))),
            self.pixels.reference,
            self.extractor,
            settings.metrics,
            reference_fingerprint=info.fingerprint,
            device=device_of(self.state),
        )
        if labels is not None and settings.labels == "balanced":
            metrics |= self._label_accuracy(images, labels)
        exact, how_exact = self._exact()
        how |= how_exact
        decoder = decoder_record(self.datasets.info, self.config)
        how |= {"autoencoder": decoder} if decoder else {}
        return how | {
            "metrics": metrics | exact,
            "proxy": settings.fid_num_images < CLAIM,
            "extractor": self.extractor.to_dict(),
            "reference": {
                "name": f"{info.name} train",
                "fingerprint": info.fingerprint,
                "num_images": info.num_train,
            },
        }

    def _one_step(self) -> Measured:
        """The held-out one-step loss, and the span of its times, which the prediction decides."""
        held_out = plain_batches(self.datasets.held_out, ONE_STEP_BATCH, device_of(self.state))
        objective, seed = build_objective(self.config), self.config.evaluate.seed
        with full_float32():
            result = one_step_loss(objective, self.model, held_out, seed=seed)
        metrics = {"one_step_loss": result.mean, "one_step_loss_by_time": result.by_time}
        start, end = rollout_span(objective.path, objective.prediction)
        times = {"distribution": "uniform", "start": start, "end": end}
        return Measured(metrics, {"one_step": {"times": times, "seed": seed}})

    def _exact(self) -> Measured:
        """Bits per dimension and excess error, where asked for."""
        metrics, how = {}, {}
        for place, wanted, measure in (
            ("likelihood", self.config.evaluate.bpd, likelihood),
            ("oracle", self.config.evaluate.excess, excess),
        ):
            if wanted is not None:
                found = measure(self.config, self.model, self.datasets, device_of(self.state))
                metrics |= found.metrics
                how[place] = found.settings
        return Measured(metrics, how)

    def _label_accuracy(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of images that the classifier takes for what they were meant to be."""
        if self.extractor.name != CLASSIFIER:
            return {}
        found = predict(load_classifier(self.extractor.weights), images)
        return {"label_accuracy": (found == labels).double().mean().item()}


def _changed(config: Config, overrides: Iterable[str]) -> Config:
    """The run's config with `overrides`, which may not touch what the weights depend on."""
    overrides = list(overrides)
    for override in overrides:
        if not override.startswith(CHANGEABLE):
            raise ConfigError(
                f"override '{override}': the run is trained; only sample.*, evaluate.* and data."
                f"{{{', '.join(PLACES)}}} can still change"
            )
    return apply_overrides(config, overrides)
