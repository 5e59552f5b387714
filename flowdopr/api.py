"""What the commands do, as functions for scripts and notebooks: `flowdopr.train(...)` and so on.

    run = flowdopr.train("quickstart", ["name=first", "train.steps=200"])
    model = flowdopr.load(run)
    x = model.sample(16, labels="0-9", seed=1)      # (16, 1, 8, 8) in [-1, 1]
    model.to_pil(x)[0].save("zero.png")
    flowdopr.evaluate(run)["metrics"]["fd"]

Shapes: images x (B, C, H, W); labels y (B,) int64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from flowdopr.compare import compare as run_study
from flowdopr.config import Config, read_config
from flowdopr.data import to_uint8
from flowdopr.disk import read_json
from flowdopr.evaluate import evaluate as measure
from flowdopr.evaluate import sample_overrides
from flowdopr.evaluate.draw import changed, image_numbers, labels_of
from flowdopr.evaluate.exact import LIKELIHOOD_SOLVER, unguided
from flowdopr.evaluate.generate import ImageSampler
from flowdopr.flow import log_likelihood
from flowdopr.flow.noise import ImageNoise
from flowdopr.latents import load_decoder
from flowdopr.linalg import full_float32
from flowdopr.runs import open_run
from flowdopr.train import train as run_training

AnyConfig = Config | Mapping[str, Any] | str | Path
"""A config, a mapping of what its file has, a file, or the name of one that flowdopr has."""


def train(
    config: AnyConfig,
    overrides: Iterable[str] = (),
    *,
    resume: bool = False,
    changed_data: bool = False,
) -> Path:
    """Train a run and return its folder, as `flowdopr train` does.

    Args:
        config: a file, the name of one that comes with flowdopr, a mapping of what a file has, or a
            `Config`.
        overrides: settings as on the command line, such as "optimizer.lr=1e-3".
        resume: go on from the newest checkpoint, if there is one.
        changed_data: go on although the images changed.

    Raises:
        ConfigError, ValueError: settings or data that cannot be used.
        Interrupted, TrainingFailed: the training was stopped, or cannot go on.
    """
    chosen = read_config(config, overrides)
    return run_training(chosen, resume=resume, changed_data=changed_data)


def evaluate(
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    step: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Measure a checkpoint of a run, as `flowdopr evaluate` does, and return its card.

    Args:
        run: the run folder.
        overrides: settings of the sections `sample` and `evaluate`.
        step: the checkpoint; None: the newest.
        force: measure again although there is a card.

    Raises:
        ConfigError, ValueError, RolloutsFailed: as `flowdopr.evaluate.Evaluator.card`.
    """
    path = measure(run, overrides, step=step, force=force)
    return read_json(path, "measure it again, with force")


def compare(
    config: AnyConfig,
    overrides: Iterable[str] = (),
    *,
    workers: int | None = None,
    report_only: bool = False,
) -> dict[str, Any]:
    """Run a study, as `flowdopr compare` does, and return what its results.json has.

    A script must call it under `if __name__ == "__main__":`, because the runs' processes import it.

    Args:
        config: the study, as in `train`.
        overrides: settings as on the command line.
        workers: runs at the same time, in place of `compare.workers`.
        report_only: only make the report, from the runs that are there.

    Raises:
        ConfigError, ValueError, Interrupted, StudyFailed: as `flowdopr.compare.compare`.
    """
    chosen = read_config(config, overrides)
    folder = run_study(chosen, workers=workers, report_only=report_only)
    return read_json(folder / "results.json", "make the report again, with report_only")


def load(run: str | Path, weights: str = "ema", step: int | None = None) -> TrainedModel:
    """The model of a run.

    Args:
        run: its folder, or a file that `flowdopr export` wrote, which has one step and weights.
        weights: "ema", "raw", an average's own name, or "posthoc-LENGTH".
        step: the checkpoint; None: the newest.

    Raises:
        ConfigError, ValueError: no such run, checkpoint or weights, or a damaged file.
    """
    folder = open_run(run)
    return TrainedModel(ImageSampler.load(folder, folder.config, step, weights))


class TrainedModel:
    """A model of a run, made by `load`.

    module: the network, in evaluation mode. config: that of the run. step: the checkpoint's step.
    """

    def __init__(self, sampler: ImageSampler) -> None:
        self._sampler = sampler
        self.module: nn.Module = sampler.model
        self.config, self.step = sampler.config, sampler.step

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of what the network sees: images, or latents."""
        return self._sampler.run.dataset.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; empty without classes."""
        return self._sampler.run.dataset.class_names

    def sample(
        self,
        num: int,
        *,
        labels: str | Sequence[int | str] | None = None,
        seed: int = 0,
        solver: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        overrides: Iterable[str] = (),
    ) -> Tensor:
        """Images (num, C, H, W), float32 in [-1, 1], on the CPU.

        Image i depends on (`seed`, i), its label and the settings; it is that of `flowdopr sample`.

        Args:
            num: number of images.
            labels: class numbers and names, or a text such as "0-4,cat", repeated over the images;
                None: all classes in turn.
            solver, steps, guidance_scale: in place of the run's `sample.solver`, its `steps` and
                `sample.guidance.scale`.
            overrides: other settings `sample.key=value`.

        Raises:
            ConfigError, ValueError: unknown labels, or settings that cannot be used.
            RolloutsFailed: images are not finite, or the solver failed.
        """
        short = {"solver": solver, "steps": steps, "guidance_scale": guidance_scale}
        chosen = [*sample_overrides(short), *overrides]
        sampler = self._sampler.changed(changed(self.config, chosen))
        decode = load_decoder(sampler.run.dataset.autoencoder, sampler.device)
        batches, y = sampler.batches(image_numbers(num)), labels_of(num, labels, sampler)
        how = {"seed": seed, "decode": decode, "finish": _in_range}
        return torch.cat([sampler.draw(batch, y, **how)[0] for batch in batches])

    @staticmethod
    def to_pil(x: Tensor) -> list[Image]:
        """Images (B, C, H, W) in [-1, 1] as pictures, rounded as `flowdopr sample` does."""
        return [to_pil_image(image) for image in to_uint8(x)]

    def velocity(self, x: Tensor, t: float | Tensor, y: Tensor | None = None) -> Tensor:
        """The velocity (B, C, H, W) in float32 that the model predicts, without guidance.

        Autograd goes through it.

        Args:
            x: points of the path (B, C, H, W): images in [-1, 1], or latents, with noise.
            t: times from 0 (noise) to 1 (data), one number or (B,).
            y: labels (B,); None for an unconditional model.
        """
        device = self._sampler.device
        labels = None if y is None else y.to(device)
        times = torch.as_tensor(t, dtype=torch.float32, device=device)
        return unguided(self.config).velocity(self.module, labels)(x.to(device), times)

    def log_likelihood(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        seed: int = 0,
        exact: bool = False,
        atol: float = 1e-5,
        rtol: float = 1e-5,
    ) -> Tensor:
        """log p(x | y) in nats, (B,), of the density that the ODE without guidance has, by dopri5.

        Equation (9) of `flowdopr/flow/likelihood.py`, with Hutchinson's estimate of the divergence.

        Args:
            x: images (B, C, H, W) in [-1, 1], or latents.
            y: labels (B,); None for an unconditional model.
            seed: of the probes of the estimate.
            exact: compute the divergence itself, by C H W backward passes in place of one for each
                model call.
            atol, rtol: tolerances of the solver.

        Raises:
            ValueError: the solver cannot reach the tolerances.
        """
        device = self._sampler.device
        x, labels = x.to(device), None if y is None else y.to(device)
        solver = {"solver": LIKELIHOOD_SOLVER, "atol": atol, "rtol": rtol}
        sampling = unguided(self.config, time_grid="uniform", **solver)
        noise = ImageNoise(seed, range(len(x)), tuple(x.shape[1:]), device)
        with full_float32():
            return log_likelihood(
                sampling.velocity(self.module, labels),
                x,
                probes=None if exact else noise.signs(),
                **sampling.likelihood_arguments(),
            ).log_prob


def _in_range(pixels: Tensor) -> Tensor:
    return pixels.float().cpu().clamp(-1, 1)
