"""The training loop.

All randomness of step s is seeded by (seed, s): images, noise, times and label dropout are drawn
for the *global* batch, and each process takes its slice. So a resumed run equals an uninterrupted
one bitwise, and several processes draw the same numbers as one.

Shapes: x_1 (B, C, H, W) in [-1, 1], y (B,), where B is the batch of one process.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.utils import save_image

from flowdopr.config import Config
from flowdopr.data import Datasets, build_loader, plain_batches
from flowdopr.disk import WriteError, replacing
from flowdopr.exits import is_out_of_memory, one_line
from flowdopr.flow import (
    ONE_STEP_BATCH,
    Draw,
    FlowMatching,
    Sampling,
    generate,
    one_step_loss,
)
from flowdopr.linalg import tf32_products
from flowdopr.processes import Agreement
from flowdopr.runs import Average, RunFolder
from flowdopr.terminal import Counter, counting
from flowdopr.train.ema import EMA, OwnAverage
from flowdopr.train.log import FILE_ONLY, shown_line
from flowdopr.train.meter import Meter
from flowdopr.train.saving import Saver
from flowdopr.train.schedule import derive_seed, lr_factor
from flowdopr.train.signals import Interrupted, StopSignal, TrainingFailed

log = logging.getLogger("flowdopr.train")

Batch = tuple[Tensor, Tensor]
HELD_OUT, GRID = "held-out loss", "sample grid"
TRY = "lower optimizer.lr, lengthen train.warmup_steps, or use train.precision=bf16 or no"


@dataclass(frozen=True)
class Components:
    """What a config describes, each built once: see `start.build_components`.

    The guide model and the decoder of the sample grids stay on the training device: their weights
    take little memory beside gradients, optimizer state and activations.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: FlowMatching
    averages: Sequence[Average]
    sampling: Sampling
    guide_model: nn.Module | None
    decode: Callable[[Tensor], Tensor]


class Trainer:
    """The state of one run in memory; `fit` trains it to its last step.

    Constructing it reads the newest checkpoint, if there is one, and writes no file.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        datasets: Datasets,
        components: Components,
        run: RunFolder,
    ):
        self.config, self.accelerator, self.datasets, self.run = config, accelerator, datasets, run
        self.components, self.objective = components, components.objective
        self.shape = datasets.info.image_shape
        # accelerate wraps model and optimizer for mixed precision and several processes; the raw
        # ones underneath hold the same tensors.
        self.raw_model, self.raw_optimizer = components.model, components.optimizer
        self.model, self.optimizer = accelerator.prepare(self.raw_model, self.raw_optimizer)
        if config.train.compile:
            self.model.compile()
        for group in self.raw_optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.ema = (
            EMA(self.raw_model, components.averages)
            if components.averages
            else OwnAverage(self.raw_model, self.raw_optimizer)
        )
        self.meter = Meter(accelerator)
        self.agreement = Agreement(accelerator.num_processes)
        self.missing: list[str] = []
        """Held-out losses and sample grids that failed."""
        self.step = self._restore()
        self.saver = Saver(run, self.step)

    # The loop

    def fit(self) -> None:
        """Train from the restored step to `train.steps`, saving at the end or when stopped.

        A step is saved before it is validated, and before an error of the data ends the run.

        Raises:
            Interrupted, TrainingFailed: see `_next` and `_end`.
        """
        settings = self.config.train
        loader = self._loader()
        self.model.train()
        self.meter.go_on()
        shown = self.accelerator.is_main_process
        bar = counting("training", settings.steps, completed=self.step, shown=shown)
        with StopSignal() as stop, bar as progress, self.saver:
            if self.step:
                self._look(done=self._looked_at())
            batch, ending = self._next(loader, stop)
            while batch and not ending:
                loss, grad_norm = self.optimizer_step(*batch)
                self.step += 1
                self.ema.update(self.step)
                self.meter.add(loss)
                progress()
                if self._due(settings.log_every):
                    self._log(grad_norm, progress)
                batch, ending = self._next(loader, stop)
                if ending or self._due(settings.checkpoint_every):
                    self._save()
                self._look()
            self._end(ending)

    def _end(self, ending: Exception | None) -> None:
        """Wait until the last step is saved, and raise the error with which the run ends, if any.

        Raises:
            TrainingFailed: the last step could not be saved.
        """
        self.saver.wait()
        if self.agreement.largest(int(bool(self.saver.why_not)))[0]:
            raise TrainingFailed(
                f"{self.run.path}: trained to step {self.step}, which could not be saved: "
                f"{self.saver.why_not or 'see process 0'}; the newest checkpoint is of step "
                f"{self.saver.saved}: mend it, and go on with the same command and --resume"
            )
        if ending:
            raise ending

    def _next(self, loader: Iterator[Batch], stop: StopSignal) -> tuple[Batch | None, Any]:
        """The batch of the next step, None after the last one, and the error with which the run
        must end now, the same in every process: a signal, or images that cannot be loaded."""
        batch = failure = None
        try:
            batch = next(loader) if self.step < self.config.train.steps else None
        except Exception as error:
            log.info("the images of step %d", self.step + 1, exc_info=True, extra=FILE_ONLY)
            failure = error
        own = self.accelerator.process_index + 1 if failure else 0
        signum, failed = self.agreement.largest(stop.received or 0, own)
        saved = f"step {self.step} is saved" if self.step else "nothing was trained"
        if failed:
            what = one_line(failure) if failure else f"process {failed - 1} failed"
            remedy = "mend it, and go on with the same command and --resume"
            return None, TrainingFailed(f"{self.run.path}: {what}; {saved}: {remedy}")
        if signum:
            what = f"{self.run.path}: stopped after step {self.step}; {saved}"
            return batch, Interrupted(f"{what}: go on with the same command and --resume", signum)
        return batch, None

    def optimizer_step(self, x_1: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Forward and backward over the micro-batches, then one step of the optimizer.

        Returns the mean loss of this process and the gradient's norm before clipping, both on the
        device: reading them would make the host wait.
        """
        settings, accelerator = self.config.train, self.accelerator
        self._set_lr()
        draw = self._draw(x_1.shape[0])
        micro = x_1.shape[0] // settings.accumulation_steps
        total = torch.zeros((), device=accelerator.device)
        for first in range(0, x_1.shape[0], micro):
            part = slice(first, first + micro)
            last = first + micro >= x_1.shape[0]
            x_part = x_1[part].to(accelerator.device, non_blocking=True)
            y_part = y[part].to(accelerator.device, non_blocking=True)
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.objective(self.model, x_part, y_part, draw[part]).mean()
                accelerator.backward(loss / settings.accumulation_steps)
            total += loss.detach() / settings.accumulation_steps
        grad_norm = None
        if settings.max_grad_norm is not None:
            grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        with tf32_products(settings.precision != "no"):  # rounds less than autocast did to G
            self.optimizer.step()
        self.optimizer.zero_grad()
        return total, grad_norm

    def _set_lr(self) -> None:
        settings = self.config.train
        factor = lr_factor(
            self.step,
            steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            decay=settings.lr_decay,
            cooldown_steps=settings.cooldown_steps,
        )
        for group in self.raw_optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _draw(self, batch_size: int) -> Draw:
        """This process's noise, times and label dropout of the current step."""
        accelerator, seed = self.accelerator, self.config.seed
        # Dropout inside the model may differ between processes; noise and times may not.
        torch.manual_seed(derive_seed(seed, self.step, 1 + accelerator.process_index))
        generator = torch.Generator(accelerator.device)
        generator.manual_seed(derive_seed(seed, self.step, 0))
        draw = self.objective.draw(
            self.config.train.global_batch_size,
            self.shape,
            generator=generator,
            device=accelerator.device,
        )
        first = accelerator.process_index * batch_size
        return draw[first : first + batch_size]

    def _loader(self) -> Iterator[tuple[Tensor, Tensor]]:
        return build_loader(
            self.config,
            self.datasets.train,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_step=self.step,
        )

    # Logging, validation and samples

    def _due(self, every: int | None) -> bool:
        last = self.step == self.config.train.steps
        return last or (every is not None and self.step % every == 0)

    def _log(self, grad_norm: Tensor | None, progress: Counter) -> None:
        line = {"step": self.step, "images": self.step * self.config.train.global_batch_size}
        line |= self.meter.close(self.config.train.global_batch_size)
        line["lr"] = self.raw_optimizer.param_groups[0]["lr"]
        if grad_norm is not None:
            line["grad_norm"] = float(grad_norm)
        if not math.isfinite(line["loss"]):
            raise TrainingFailed(
                f"{self.run.path}: the loss is {line['loss']} by step {self.step}; {TRY}"
            )
        progress.note(f"loss {line['loss']:.4f}")
        self._record(line)

    def _record(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            try:
                self.run.append_metrics(line)
            except WriteError as error:
                log.warning("%s; the next line tries again", error.what)
            log.info(shown_line(line, self.config.train.steps))

    def _look(self, done: Collection[str] = ()) -> None:
        """Validate and draw samples where this step is due, except for what is `done`.

        The first process does it, and decides alone what is done: the others may see its new files.
        A failure is logged, and training goes on.
        """
        settings = self.config.train
        looks = {
            HELD_OUT: (settings.validate_every, self._validate),
            GRID: (settings.sample_every, self._draw_samples),
        }
        due = [what for what, (every, _) in looks.items() if self._due(every)]
        if not due:
            return
        self.meter.pause()
        if self.accelerator.is_main_process:
            for what in (what for what in due if what not in done):
                try:
                    with self._averaged_model() as model:
                        looks[what][1](model)
                except Exception as error:
                    self._note_missing(f"{what} of step {self.step}", error)
        self.accelerator.wait_for_everyone()
        self.meter.go_on()

    def _looked_at(self) -> set[str]:
        """What an earlier launch made of the restored step, before it ended."""
        lines = [line for line in self.run.metrics() if line["step"] == self.step]
        found = {HELD_OUT for line in lines if "held_out_loss" in line}
        return found | ({GRID} if self._grid_path().exists() else set())

    def _note_missing(self, what: str, error: Exception) -> None:
        log.info("%s", what, exc_info=True, extra=FILE_ONLY)
        remedy = ": lower sample.batch_size" if is_out_of_memory(error) else ""
        log.warning("no %s: %s%s; the run goes on without it", what, one_line(error), remedy)
        self.missing.append(what)

    @contextmanager
    def _averaged_model(self) -> Iterator[nn.Module]:
        """The raw model with averaged weights, in evaluation mode."""
        self.raw_model.eval()
        try:
            with self.ema.applied(self.raw_model), torch.no_grad():
                yield self.raw_model
        finally:
            self.raw_model.train()

    def _validate(self, model: nn.Module) -> None:
        batches = plain_batches(self.datasets.held_out, ONE_STEP_BATCH, self.accelerator.device)
        # Not the run's own seed, so that runs of several seeds can be compared.
        seed = self.config.evaluate.seed
        result = one_step_loss(self.objective, model, batches, seed=seed)
        if not math.isfinite(result.mean):
            raise TrainingFailed(f"it is {result.mean}; {TRY}")
        self._record({"step": self.step, "held_out_loss": result.mean})

    def _draw_samples(self, model: nn.Module) -> None:
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
        with replacing(self._grid_path()) as part:
            save_image(images / 2 + 0.5, part, format="png", nrow=math.ceil(number**0.5))

    def _grid_path(self) -> Path:
        return self.run.path / "samples" / f"step-{self.step:08d}.png"

    # Checkpoints

    def _save(self) -> None:
        """Begin a checkpoint; weights that are not finite end the run and replace no checkpoint."""
        self.meter.pause()
        norms = torch._foreach_norm([p.detach() for p in self.raw_model.parameters()])
        if not torch.stack(list(norms)).isfinite().all():
            what = f"weights are not finite by step {self.step}"
            raise TrainingFailed(f"{self.run.path}: {what}; {TRY}")
        losses = self.meter.state()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "losses": losses,
                "optimizer": self.raw_optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
            self.saver.save(
                self.step,
                model=self.raw_model.state_dict(),
                averages=self.ema.state_dicts(),
                state=state,
                texts=self.run.texts(),
                note={"images": self.step * self.config.train.global_batch_size},
            )
        self.meter.go_on()

    def _restore(self) -> int:
        """Load the newest checkpoint, if there is one, and return its step, else 0."""
        steps = self.run.steps()
        if not steps:
            return 0
        step, wanted = steps[-1], self.raw_model.state_dict()
        state = self.run.load_state(step)
        self.raw_model.load_state_dict(self.run.load_weights(step, "raw", wanted))
        for average in self.ema.averages:
            self.ema.load(average.name, self.run.load_weights(step, average.name, wanted))
        self.meter.restore(state["losses"])
        with self.run.reading(step, "state.pt"):
            self.raw_optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        return step
