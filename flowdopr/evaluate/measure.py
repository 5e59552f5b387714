"""`evaluate`: one checkpoint of a run, measured into a card."""

import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdopr.config import Config, ConfigError, apply_overrides
from flowdopr.config.own import naming, own_code
from flowdopr.config.schema import USED_BY
from flowdopr.data import Datasets
from flowdopr.disk import sealed, write_json
from flowdopr.evaluate.card import (
    autoencoder_record,
    card_path,
    card_settings,
    read_card,
)
from flowdopr.evaluate.exact import Measured, check_exact, held_out_loss, measure_model
from flowdopr.evaluate.gallery import has_gallery
from flowdopr.evaluate.generate import ImageSampler, balanced_labels, labels_like_data
from flowdopr.evaluate.images import ImageMetrics
from flowdopr.evaluate.real import RealImages
from flowdopr.latents import build_datasets, build_pixel_datasets, load_decoder
from flowdopr.processes import device_of, this_process
from flowdopr.runs import RunFolder, check_no_links
from flowdopr.terminal import print_line

FEWEST_FOR_FID = 50_000  # with fewer generated images, the card says that its distances are proxies
PLACES = (
    *("root", "held_out_root", "download", "num_workers", "cache", "autoencoder", "source_root"),
    *("factory", "options"),
)
CHANGEABLE = ("sample.", "evaluate.", *(f"data.{key}=" for key in PLACES))


def evaluate(
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    step: int | None = None,
    force: bool = False,
) -> Path:
    """Measure checkpoint `step` (default: the newest) of `run` and return the path of its card.

    See `Evaluator.card`, which measures several without loading the images for each.
    """
    return Evaluator(run).card(overrides, step=step, force=force)


class Evaluator:
    """Measures checkpoints of one run.

    Its images, the feature space, the real images' features and the one-step loss of a checkpoint
    are loaded or computed once.

    Raises:
        ConfigError: `run` is not a run folder.
    """

    def __init__(self, run: str | Path):
        self.folder = RunFolder.open(run)
        check_no_links(self.folder.path)
        self._kept: dict[Hashable, Any] = {}

    def card(
        self, overrides: Iterable[str] = (), *, step: int | None = None, force: bool = False
    ) -> Path:
        """Measure checkpoint `step` (default: the newest) and return the path of its card.

        A card of the same settings and the same weights is not made again unless `force`, or if its
        gallery is smaller than `evaluate.gallery`. Under `accelerate launch` the processes share
        the sampling.

        Args:
            overrides: `a.b=value` for the sections sample and evaluate, and where the data lies.

        Raises:
            ConfigError, ValueError: no such run or checkpoint, other data than the run's, too few
                images, settings that cannot be used, missing Inception weights; one line each.
            RolloutsFailed: images are not finite, or the solver failed; no card is written.
        """
        started = time.perf_counter()
        config, folder = _changed(self.folder.config, overrides), self.folder
        sampler = ImageSampler.load(folder, config, step, config.evaluate.weights)
        origin, guide = sampler.origin(), sampler.guide_record()
        settings = card_settings(config, folder.dataset)
        path = card_path(folder.path / "evaluation", sampler.step, settings | guide)
        known = read_card(path)
        made = known is not None and known["checkpoint"] == origin["checkpoint"]
        if made and not force and has_gallery(path, config.evaluate):
            return path
        with sampler.state.main_process_first():
            datasets = self._datasets(config)
            check_exact(config, datasets)
            metrics = ImageMetrics.build(
                config.evaluate, self._real(config, datasets, sampler.device)
            )
        record = autoencoder_record(datasets.info, config)
        labels = _labels(config, sampler.num_classes, datasets)
        drawn = metrics.draw(sampler, labels, load_decoder(record, sampler.device))
        if drawn is not None:
            extractor = metrics.extractor.to_dict() if metrics.extractor else {}
            if extractor.get("warning"):
                print_line(f"warning: {extractor['warning']}")
            loss, one_step = self._held_out_loss(config, sampler, datasets)
            numbers, how = measure_model(config, sampler.model, datasets, sampler.device)
            distances, more = metrics.measure(drawn, labels)
            card = origin | one_step | how | more | {"settings": settings}
            card |= {"metrics": loss | numbers | distances}
            card |= own_code(config.model, config.data)
            card |= {"sampling": settings["sampling"] | guide | {"nfe": drawn.nfe}}
            card |= {"proxy": config.evaluate.fid_num_images < FEWEST_FOR_FID}
            card |= {"autoencoder": record} if record else {}
            card |= {"extractor": extractor, "reference": metrics.reference()}
            card |= metrics.write_gallery(drawn, labels, path)
            card |= {"seconds": round(time.perf_counter() - started, 3)}
            write_json(path, sealed(card))
        sampler.state.wait_for_everyone()
        return path

    def save_reference(self, path: Path, overrides: Iterable[str] = ()) -> None:
        """Write mean and covariance of the training images' features to the npz file `path`.

        Raises:
            ConfigError, ValueError: `path` is a folder; or as `card`, for the images and the
                feature space.
        """
        if path.is_dir():
            raise ConfigError(
                f"{path}: is a folder; name a file to write, such as {path / 'reference.npz'}"
            )
        config, state = _changed(self.folder.config, overrides), this_process()
        if state.is_main_process:
            real = self._real(config, self._datasets(config), device_of(state))
            real.write_statistics(path)

    def _keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned for this key the first time."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _datasets(self, config: Config) -> Datasets:
        """The images of the run, as the model sees them.

        Raises:
            ConfigError: they are not those that it was trained on.
        """
        with naming(self.folder.path):
            datasets = self._keep(config.data.model_dump_json(), lambda: build_datasets(config))
            if datasets.info.fingerprint != self.folder.dataset.fingerprint:
                raise ConfigError(
                    f"the images in {config.data.place} are not those it was trained on; give those"
                )
        return datasets

    def _real(self, config: Config, datasets: Datasets, device: torch.device) -> RealImages:
        def load() -> RealImages:
            pixels = build_pixel_datasets(config) if datasets.info.autoencoder else datasets
            return RealImages(pixels, config.evaluate, device)

        chosen = config.evaluate
        key = (config.data.model_dump_json(), chosen.extractor.model_dump_json(), chosen.reference)
        return self._keep(key, load)

    def _held_out_loss(self, config: Config, sampler: ImageSampler, datasets: Datasets) -> Measured:
        where, seed = config.data.model_dump_json(), config.evaluate.seed
        key = (where, sampler.step, sampler.weights, seed)
        measured = (config, sampler.model, datasets, sampler.device)
        return self._keep(key, lambda: held_out_loss(*measured))


def _labels(config: Config, num_classes: int, datasets: Datasets) -> Tensor | None:
    """The labels of the generated images, as `evaluate.labels` says; None if unconditional."""
    if not num_classes:
        return None
    if config.evaluate.labels == "balanced":
        return balanced_labels(config.evaluate.fid_num_images, num_classes)
    return labels_like_data(config.evaluate.fid_num_images, datasets.train.labels)


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
