"""What a run shows of a step beside its loss: the held-out loss and a grid of samples.

Both are of averaged weights.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from flowdopr.config import Config
from flowdopr.data import Datasets, plain_batches, to_uint8
from flowdopr.disk import replacing
from flowdopr.exits import is_out_of_memory, one_line
from flowdopr.flow import ONE_STEP_BATCH, generate, one_step_loss
from flowdopr.models import update_spectral_norms
from flowdopr.pictures import grid
from flowdopr.runs import RunFolder
from flowdopr.train.components import Components
from flowdopr.train.ema import EMA, OwnAverage
from flowdopr.train.log import FILE_ONLY
from flowdopr.train.schedule import is_due
from flowdopr.train.signals import TRY, TrainingFailed
from flowdopr.train.trackers import show_picture

log = logging.getLogger("flowdopr.train")

HELD_OUT, GRID = "held-out loss", "sample grid"


class Looks:
    """The held-out losses and sample grids of one run; `missing` are those that failed."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        datasets: Datasets,
        components: Components,
        run: RunFolder,
        ema: EMA | OwnAverage,
    ):
        self.config, self.accelerator, self.datasets, self.run = config, accelerator, datasets, run
        self.components, self.ema = components, ema
        self.missing: list[str] = []

    def due(self, step: int) -> list[str]:
        """Which of both `step` must show."""
        settings = self.config.train
        every = {HELD_OUT: settings.validate_every, GRID: settings.sample_every}
        return [what for what in every if is_due(step, every[what], settings.steps)]

    def done(self, step: int) -> set[str]:
        """Which of both an earlier launch made of `step`, before it ended."""
        lines = [line for line in self.run.metrics() if line["step"] == step]
        found = {HELD_OUT for line in lines if "held_out_loss" in line}
        return found | ({GRID} if self._grid_path(step).exists() else set())

    def take(self, step: int, wanted: Sequence[str]) -> dict[str, float]:
        """Make what is `wanted`, and return the numbers for metrics.jsonl.

        The first process does it; the others help where they hold parts of the weights, and wait
        for it. A failure is logged, and training goes on.
        """
        began, found = time.perf_counter(), {}
        if self.accelerator.is_main_process or self.components.sharded:
            for what in wanted:
                try:
                    with self._averaged_model() as model:
                        if what == HELD_OUT:
                            found["held_out_loss"] = self._held_out_loss(model)
                        else:
                            self._draw_grid(model, step)
                except Exception as error:
                    self._note_missing(f"{what} of step {step}", error)
        self.accelerator.wait_for_everyone()
        return {**found, "evaluation_seconds": time.perf_counter() - began}

    def _note_missing(self, what: str, error: Exception) -> None:
        log.info("%s", what, exc_info=True, extra=FILE_ONLY)
        remedy = ": lower sample.batch_size" if is_out_of_memory(error) else ""
        log.warning("no %s: %s%s; the run goes on without it", what, one_line(error), remedy)
        self.missing.append(what)

    @contextmanager
    def _averaged_model(self) -> Iterator[nn.Module]:
        """The raw model with averaged weights, in evaluation mode."""
        model = self.components.model.eval()
        try:
            with self.ema.applied(model), torch.no_grad():
                update_spectral_norms(model)  # those of the averaged weights
                yield model
        finally:
            model.train()

    def _held_out_loss(self, model: nn.Module) -> float:
        batches = plain_batches(self.datasets.held_out, ONE_STEP_BATCH, self.accelerator.device)
        # Not the run's own seed, so that runs of several seeds can be compared.
        seed = self.config.evaluate.seed
        result = one_step_loss(self.components.objective, model, batches, seed=seed)
        if not math.isfinite(result.mean):
            raise TrainingFailed(f"it is {result.mean}; {TRY}")
        return result.mean

    def _draw_grid(self, model: nn.Module, step: int) -> None:
        number = self.config.sample.num_images
        conditional = self.config.model.class_conditional
        num_classes = self.datasets.info.num_classes if conditional else 0
        samples = generate(
            model,
            torch.arange(number) % num_classes if num_classes else None,
            num_images=number,
            seed=self.config.seed,
            batch_size=self.config.sample.batch_size,
            guide_model=self.components.guide_model,
            sampling=self.components.sampling,
        )
        images = self.components.decode(samples.images)
        if not images.isfinite().all():  # they would become black
            raise TrainingFailed(f"images are not finite; {TRY}")
        if self.accelerator.is_main_process:
            picture = to_pil_image(grid(to_uint8(images)))
            with replacing(self._grid_path(step)) as part:
                picture.save(part, format="png")
            show_picture(self.accelerator, step, picture)

    def _grid_path(self, step: int) -> Path:
        return self.run.path / "samples" / f"step-{step:08d}.png"
