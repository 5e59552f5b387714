"""The guide model of autoguidance, from another run (Karras et al. 2024, arXiv 2406.02507).

A guide is a worse version of the model, smaller or less trained. It takes the place of the
unconditional branch of guidance, so it must be trained on the same images and the same path.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from flowdopr.config import Config, ConfigError
from flowdopr.data import DatasetInfo
from flowdopr.runs.folder import RunFolder

SAME_FLOW = ("path", "path_options", "prediction")


class Guide(NamedTuple):
    """`model` in evaluation mode, and its `origin`: run, step and weights. Both None: no guide."""

    model: nn.Module | None
    origin: dict[str, Any] | None


def load_guide(config: Config, dataset: DatasetInfo, device: torch.device | str = "cpu") -> Guide:
    """The guide that `config.sample` names, on `device`; Guide(None, None) if it names none.

    A class-conditional model may have an unconditional guide.

    Args:
        dataset: what the guided model was trained on.

    Raises:
        ConfigError: no such run, checkpoint or weights; a guide of another image shape, path,
            prediction, autoencoder or number of classes; or, without a guide, classifier-free
            guidance of a model whose unconditional branch was not trained.
    """
    chosen = config.sample
    if chosen.guide_run is None:
        _check_unguided(config, dataset)
        return Guide(None, None)
    run = RunFolder.open(chosen.guide_run)
    _check_fits(run, config, dataset)
    model, step = run.load_model(chosen.guide_step, chosen.guide_weights, device)
    origin = {"run": run.config.name, "step": step, "weights": chosen.guide_weights}
    return Guide(model, origin)


def _check_unguided(config: Config, dataset: DatasetInfo) -> None:
    """Check that a model that is guided without a guide has learned its null label."""
    scale, dropout = config.sample.guidance_scale, config.flow.class_dropout_prob
    if scale == 1:
        return
    if not _classes(config, dataset):
        raise ConfigError(
            f"sample.guidance_scale={scale:g} needs a class-conditional model: set it to 1, or "
            "train on data with classes and model.class_conditional=true"
        )
    if dropout == 0:
        raise ConfigError(
            f"sample.guidance_scale={scale:g} needs an unconditional branch, which "
            "flow.class_dropout_prob=0 leaves untrained: train with 0.1, set the scale to 1, or "
            "give sample.guide_run"
        )


def _check_fits(run: RunFolder, config: Config, dataset: DatasetInfo) -> None:
    """Check that the guide's output can be combined with the model's."""
    place = f"sample.guide_run={config.sample.guide_run}"
    pairs: dict[str, tuple[Any, ...]] = {"image shape": _shapes(run.dataset, dataset)}
    guide_classes = _classes(run.config, run.dataset)
    if guide_classes:
        pairs["number of classes"] = (guide_classes, _classes(config, dataset))
    for key in SAME_FLOW:
        pairs[f"flow.{key}"] = (getattr(run.config.flow, key), getattr(config.flow, key))
    decoders = ((found.autoencoder or {}) for found in (run.dataset, dataset))
    guide_sha, own_sha = (decoder.get("weights_sha256") for decoder in decoders)
    pairs["autoencoder"] = (guide_sha, own_sha)
    for name, (guides, own) in pairs.items():
        if guides != own:
            raise ConfigError(
                f"{place}: its {name} is {guides}, this run's is {own}; give a run that fits"
            )


def _classes(config: Config, dataset: DatasetInfo) -> int:
    return dataset.num_classes if config.model.class_conditional else 0


def _shapes(*found: DatasetInfo) -> tuple[str, ...]:
    return tuple(" x ".join(map(str, info.image_shape)) for info in found)
