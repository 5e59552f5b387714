"""What needs no samples: bits per dimension of held-out images, and the excess one-step error.

Both say of the model itself what FD says of its samples only. Their settings go into the card.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdopr.config import Config, ConfigError
from flowdopr.data import Datasets, plain_batches
from flowdopr.data.loader import picks_between
from flowdopr.data.memory import Picks
from flowdopr.flow import (
    EmpiricalVelocity,
    Sampling,
    bits_per_dim,
    build_objective,
    build_sampling,
    excess_error,
    rollout_excess,
)
from flowdopr.flow.objective import num_classes_of
from flowdopr.linalg import full_float32

LIKELIHOOD_SOLVER = "dopri5"
LARGEST_TRAINING_SET = 100_000  # images the oracle compares with, mirrored copies included
POINTS_TOGETHER = 128  # fixed, because noise and times are drawn batch by batch


class Measured(NamedTuple):
    """Numbers for the card's `metrics`, and how they came about."""

    metrics: dict[str, Any]
    settings: dict[str, Any]


def check_exact(config: Config, datasets: Datasets) -> None:
    """Refuse metrics that cannot be computed for this run, before anything runs.

    Raises:
        ConfigError: in one line, with the remedy.
    """
    chosen, latents = config.evaluate, datasets.info.autoencoder is not None
    if chosen.bpd is not None and latents:
        raise ConfigError(
            "evaluate.bpd is the likelihood of 8-bit pixels, a model of latents has none; set "
            "evaluate.bpd=null"
        )
    if chosen.excess is None:
        return
    if latents and getattr(datasets.train, "random", False):
        raise ConfigError(
            "evaluate.excess needs a finite training set, these latents are drawn anew each epoch; "
            "set evaluate.excess=null, or encode with --kept mean and train on that"
        )
    if config.flow.coupling.name != "independent":
        raise ConfigError(
            "evaluate.excess is known in closed form for flow.coupling=independent, not "
            f"{config.flow.coupling.name}; set evaluate.excess=null"
        )
    if (total := _number_of_points(config, datasets)) > LARGEST_TRAINING_SET:
        raise ConfigError(
            f"evaluate.excess compares each call with all {total} training images, more than "
            f"{LARGEST_TRAINING_SET}; set evaluate.excess=null"
        )


def likelihood(config: Config, model: nn.Module, datasets: Datasets, device: Any) -> Measured:
    """`bpd`, a mean over held-out images, and its standard error `bpd_se` over them."""
    chosen, seed = config.evaluate.bpd, config.evaluate.seed
    assert chosen is not None
    held_out = datasets.held_out
    num = min(chosen.num_images, len(held_out))
    images, labels = held_out.batch(picks_between(0, len(held_out), 0, num).indices)
    solver = {"solver": LIKELIHOOD_SOLVER, "atol": chosen.atol, "rtol": chosen.rtol}
    sampling = _unguided(config, time_grid="uniform", **solver)
    with full_float32():
        bits, nfe = bits_per_dim(
            model,
            images,
            labels,
            seed=seed,
            batch_size=config.sample.batch_size,
            trace=chosen.trace,
            device=device,
            sampling=sampling,
        )
    bits = bits.double()
    error = bits.std().item() / math.sqrt(num) if num > 1 else math.nan
    times = sampling.likelihood_arguments()["grid"].tolist()
    settings = {
        "num_images": num,
        "trace": chosen.trace,
        "times": {"start": times[0], "end": times[-1]},
        **solver,
        "nfe": nfe,
        "dequantisation": "uniform",
        "seed": seed,
    }
    return Measured({"bpd": bits.mean().item(), "bpd_se": error}, settings)


def excess(config: Config, model: nn.Module, datasets: Datasets, device: Any) -> Measured:
    """The model's error over the exact velocity of its training set: `excess` on the path, where
    `train_one_step_loss` = `excess` + `irreducible` in expectation, and `rollout_excess` where its
    own rollouts go; of the velocity it grows without bound towards t = 1, so it is read by time or
    taken in the space of the data."""
    chosen = config.evaluate.excess
    assert chosen is not None
    images, labels = _training_points(config, datasets)
    oracle_labels = labels if num_classes_of(model) else None
    objective, seed = build_objective(config), config.evaluate.seed
    oracle = EmpiricalVelocity(images, oracle_labels, path=objective.path).to(device)
    num = min(chosen.num_images, len(images))
    points = picks_between(0, len(images), 0, num).indices
    batches = [
        (images[part].to(device), labels[part].to(device)) for part in points.split(POINTS_TOGETHER)
    ]
    with full_float32():
        on_path = excess_error(oracle, objective, model, batches, seed=seed)
        rollout = rollout_excess(
            oracle,
            model,
            None if oracle_labels is None else labels[points],
            num_images=num,
            seed=seed,
            space=chosen.space,
            sampling=_unguided(config),
            device=device,
        )
    metrics = {
        "excess": on_path.excess.mean,
        "excess_by_time": on_path.excess.by_time,
        "irreducible": on_path.irreducible.mean,
        "irreducible_by_time": on_path.irreducible.by_time,
        "train_one_step_loss": on_path.loss.mean,
        "rollout_excess": rollout.mean,
        "rollout_excess_by_time": rollout.by_time,
    }
    settings = {
        "num_images": num,
        "training_images": len(images),
        "mirrored_copies": config.data.horizontal_flip,
        "rollout_space": chosen.space,
        "guidance_scale": 1.0,
        "seed": seed,
    }
    return Measured(metrics, settings)


def _unguided(config: Config, **changes: Any) -> Sampling:
    """The run's rollouts without guidance, whose velocity is not that of a distribution."""
    return replace(build_sampling(config), guidance_scale=1.0, **changes)


def _number_of_points(config: Config, datasets: Datasets) -> int:
    return len(datasets.train) * (2 if config.data.horizontal_flip else 1)


def _training_points(config: Config, datasets: Datasets) -> tuple[Tensor, Tensor]:
    """All that training can show: x_1 (N, C, H, W) and labels, with mirrored copies if it does."""
    train = datasets.train
    images = torch.cat([x_1 for x_1, _ in plain_batches(train, 4096)])
    if not config.data.horizontal_flip:
        return images, train.labels
    parts = torch.arange(len(train)).split(4096)
    picks = (Picks(part, torch.ones(len(part), dtype=torch.bool), 0 * part) for part in parts)
    mirrored = torch.cat([train.drawn(pick, 0)[0] for pick in picks])
    return torch.cat([images, mirrored]), torch.cat([train.labels, train.labels])
