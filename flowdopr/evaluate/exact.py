"""Metrics of the model itself, which need no samples: the held-out one-step loss, bits per
dimension of held-out images, the excess over the exact velocity of the training set, and the drift
of rollouts from the path.

Each function returns its metrics and, for the card, the settings that they were measured with.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.config import Config, ConfigError
from flowdopr.data import Datasets, plain_batches
from flowdopr.data.loader import picks_between
from flowdopr.data.memory import Picks
from flowdopr.flow import (
    ONE_STEP_BATCH,
    EmpiricalVelocity,
    Sampling,
    bits_per_dim,
    build_objective,
    build_sampling,
    excess_error,
    one_step_loss,
    rollout_drift,
    rollout_excess,
    rollout_span,
)
from flowdopr.flow.objective import num_classes_of
from flowdopr.linalg import full_float32

LIKELIHOOD_SOLVER = "dopri5"
LARGEST_TRAINING_SET = 100_000  # images the oracle compares with, mirrored copies included
POINTS_TOGETHER = 128  # fixed, because noise and times are drawn batch by batch


Measured = tuple[dict[str, Any], dict[str, Any]]
"""Metrics, and the settings that they were measured with."""


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
    if chosen.drift is not None and len(datasets.held_out) < 2:
        raise ConfigError(
            "evaluate.drift needs two held-out images or more, there is one; raise "
            "data.held_out_fraction in a new run, or set evaluate.drift=null"
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
    total = len(datasets.train) * (2 if config.data.horizontal_flip else 1)
    if total > LARGEST_TRAINING_SET:
        raise ConfigError(
            f"evaluate.excess compares each call with all {total} training images, more than "
            f"{LARGEST_TRAINING_SET}; set evaluate.excess=null"
        )


def measure_model(config: Config, model: nn.Module, datasets: Datasets, device: Any) -> Measured:
    """All chosen metrics but the one-step loss; the settings by section of the card."""
    metrics, settings = {}, {}
    for section, chosen, measure in (
        ("likelihood", config.evaluate.bpd, likelihood),
        ("oracle", config.evaluate.excess, excess),
        ("drift", config.evaluate.drift, drift),
    ):
        if chosen:
            numbers, settings[section] = measure(config, model, datasets, device)
            metrics |= numbers
    return metrics, settings


def held_out_loss(config: Config, model: nn.Module, datasets: Datasets, device: Any) -> Measured:
    """The one-step loss of the held-out images, as a mean and by time."""
    objective, seed = build_objective(config), config.evaluate.seed
    held_out = plain_batches(datasets.held_out, ONE_STEP_BATCH, device)
    with full_float32():
        loss = one_step_loss(objective, model, held_out, seed=seed)
    start, end = rollout_span(objective.path, objective.prediction)
    times = {"distribution": "uniform", "start": start, "end": end}
    metrics = {
        "one_step_loss": loss.mean,
        "one_step_loss_by_time": loss.by_time,
        "one_step_loss_by_time_se": loss.se_by_time,
    }
    return metrics, {"one_step": {"times": times, "seed": seed}}


def likelihood(config: Config, model: nn.Module, datasets: Datasets, device: Any) -> Measured:
    """`bpd`, a mean over held-out images, and its standard error `bpd_se` over them."""
    chosen, seed = config.evaluate.bpd, config.evaluate.seed
    assert chosen is not None
    held_out = datasets.held_out
    num = min(chosen.num_images, len(held_out))
    images, labels = held_out.batch(picks_between(0, len(held_out), 0, num).indices)
    solver = {"solver": LIKELIHOOD_SOLVER, "atol": chosen.atol, "rtol": chosen.rtol}
    sampling = unguided(config, time_grid="uniform", **solver)
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
    return {"bpd": bits.mean().item(), "bpd_se": error}, settings


def excess(config: Config, model: nn.Module, datasets: Datasets, device: Any) -> Measured:
    """How far the model is from the exact velocity of its training set.

    `excess` is measured at points of the path, where `train_one_step_loss` = `excess` +
    `irreducible` in expectation; `rollout_excess` at the points that the model's own rollouts
    visit. There the error in velocity grows without bound towards t = 1, so read it by time, or
    set `evaluate.excess.space=data`. `feedback_gap_by_time` is the ratio of the two in each bin of
    time: above 1 where the model's own rollouts lead it to states that it knows less well.
    """
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
            sampling=unguided(config),
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
    if chosen.space == "velocity":  # that of `excess`
        pairs = zip(rollout.by_time, on_path.excess.by_time, strict=True)
        metrics["feedback_gap_by_time"] = [a / b if b else math.nan for a, b in pairs]
    settings = {
        "num_images": num,
        "training_images": len(images),
        "mirrored_copies": config.data.horizontal_flip,
        "rollout_space": chosen.space,
        "guidance_scale": 1.0,
        "seed": seed,
    }
    return metrics, settings


def drift(config: Config, model: nn.Module, datasets: Datasets, device: Any) -> Measured:
    """`drift_by_time`: the energy distance of the rollouts' states from held-out points of the path
    (`flow.rollout_drift`), and `drift`, its mean over the model calls."""
    chosen = config.evaluate.drift
    assert chosen is not None
    held_out, seed = datasets.held_out, config.evaluate.seed
    num = min(chosen.num_images, len(held_out))
    points = picks_between(0, len(held_out), 0, num).indices
    parts = [
        held_out.drawn(Picks(part, part < 0, 0 * part), 0).on(device) for part in points.split(128)
    ]
    x_1, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    with full_float32():
        found = rollout_drift(
            build_objective(config),
            model,
            x_1,
            labels if num_classes_of(model) else None,
            seed=seed,
            sampling=unguided(config),
        )
    metrics = {"drift": found.mean, "drift_by_time": found.by_time}
    return metrics, {"num_images": num, "guidance_scale": 1.0, "seed": seed}


def unguided(config: Config, **changes: Any) -> Sampling:
    """The run's sampling without guidance: a guided velocity belongs to no distribution."""
    return replace(build_sampling(config), guidance_scale=1.0, **changes)


def _training_points(config: Config, datasets: Datasets) -> tuple[Tensor, Tensor]:
    """All images that training can draw: x_1 (N, C, H, W) and labels, mirrored copies included."""
    train = datasets.train
    images = torch.cat([x_1 for x_1, _ in plain_batches(train, 4096)])
    if not config.data.horizontal_flip:
        return images, train.labels
    parts = torch.arange(len(train)).split(4096)
    picks = (Picks(part, torch.ones(len(part), dtype=torch.bool), 0 * part) for part in parts)
    mirrored = torch.cat([train.drawn(pick, 0).on("cpu")[0] for pick in picks])
    return torch.cat([images, mirrored]), torch.cat([train.labels, train.labels])
