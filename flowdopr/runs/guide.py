"""The model of a second run, for autoguidance (Karras et al. 2024, arXiv 2406.02507).

A guide is a worse version of the model: smaller, or trained less. It stands in place of the
unconditional branch of guidance, so it must see the same images on the same path.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from flowdopr.config import Config, ConfigError
from flowdopr.data import DatasetInfo
from flowdopr.runs.exported import open_run
from flowdopr.runs.folder import RunFolder

SAME_FLOW = ("path", "prediction")


class Guide(NamedTuple):
    """`model` in evaluation mode, and which one it is: run, step, weights."""

    model: nn.Module | None
    origin: dict[str, Any] | None


def load_guide(config: Config, dataset: DatasetInfo, device: torch.device | str = "cpu") -> Guide:
    """The guide that `config.sample.guidance` names for a model of `dataset`, if any.

    It may be unconditional though the model is not.

    Raises:
        ConfigError: no such run, checkpoint or weights, or a run of images, classes, a path or a
            prediction that do not fit; or guidance without a guide, and the model has no trained
            unconditional branch.
    """
    guidance = config.sample.guidance
    if guidance is None:
        return Guide(None, None)
    if guidance.guide is None:
        _check_own_branch(guidance.scale, config, dataset)
        return Guide(None, None)
    chosen = guidance.guide
    run = open_run(chosen.run)
    _check_fits(run, config, dataset)
    model, step = run.load_model(chosen.step, chosen.weights, device)
    return Guide(model, {"run": run.config.name, "step": step, "weights": chosen.weights})


def _check_own_branch(scale: float, config: Config, dataset: DatasetInfo) -> None:
    """Check that a model that is guided without a guide has learned its null label."""
    if not _classes(config, dataset):
        raise ConfigError(
            f"sample.guidance.scale={scale:g} needs a class-conditional model: set "
            "sample.guidance=null, or train on data with classes and model.class_conditional=true"
        )
    if config.flow.class_dropout_prob == 0:
        raise ConfigError(
            f"sample.guidance.scale={scale:g} needs an unconditional branch, which "
            "flow.class_dropout_prob=0 leaves untrained: train with 0.1, set sample.guidance=null, "
            "or give sample.guidance.guide.run"
        )


def _check_fits(run: RunFolder, config: Config, dataset: DatasetInfo) -> None:
    place = f"sample.guidance.guide.run={run.path}"
    pairs: dict[str, tuple[Any, ...]] = {"image shape": _shapes(run.dataset, dataset)}
    classes, guides = _classes(config, dataset), _classes(run.config, run.dataset)
    if guides:
        pairs["number of classes"] = (guides, classes)
    flows = [found.flow.model_dump(mode="json") for found in (run.config, config)]
    for key in SAME_FLOW:
        pairs[f"flow.{key}"] = (flows[0][key], flows[1][key])
    decoders = ((found.autoencoder or {}) for found in (run.dataset, dataset))
    guide_sha, own_sha = (decoder.get("weights_sha256") for decoder in decoders)
    pairs["autoencoder"] = (guide_sha, own_sha)
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ConfigError(
                f"{place}: its {name} is {theirs}, this run's is {ours}; give a run that fits"
            )


def _classes(config: Config, dataset: DatasetInfo) -> int:
    return dataset.num_classes if config.model.class_conditional else 0


def _shapes(*found: DatasetInfo) -> tuple[str, ...]:
    return tuple(" x ".join(map(str, info.image_shape)) for info in found)
