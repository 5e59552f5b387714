"""The training loop.

All randomness of step s is seeded by (seed, s): images, noise, times and label dropout are drawn
for the *global* batch, and each process takes its slice. So a resumed run equals an uninterrupted
one bitwise, and several processes draw the same numbers as one.

Shapes: x_1 (B, C, H, W) in [-1, 1], y (B,), where B is the batch of one process.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Set
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from flowdopr.config import Config
from flowdopr.data import Batch, Datasets, build_loader
from flowdopr.disk import WriteError
from flowdopr.exits import one_line
from flowdopr.flow import Draw
from flowdopr.linalg import local, tf32_products
from flowdopr.models import update_spectral_norms
from flowdopr.optim import DeferredRead
from flowdopr.processes import Agreement
from flowdopr.runs import RunFolder
from flowdopr.terminal import Counter, counting
from flowdopr.train.components import Components
from flowdopr.train.culprit import culprit
from flowdopr.train.ema import EMA, OwnAverage
from flowdopr.train.log import FILE_ONLY, shown_line
from flowdopr.train.looks import Looks
from flowdopr.train.meter import BACKWARD, DATA, FORWARD, OPTIMIZER, Meter
from flowdopr.train.saving import Saver
from flowdopr.train.schedule import derive_seed, is_due, lr_factor
from flowdopr.train.shards import placed_state, placed_weights, whole
from flowdopr.train.signals import TRY, Interrupted, StopSignal, TrainingFailed
from flowdopr.train.spikes import Spikes
from flowdopr.train.trackers import show_numbers

log = logging.getLogger("flowdopr.train")


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
        self.model = accelerator.prepare_model(self.raw_model, evaluation_mode=components.sharded)
        self.optimizer = accelerator.prepare_optimizer(self.raw_optimizer)
        if config.train.compile:
            self.model.compile()
        for group in self.raw_optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.ema = (
            EMA(self.raw_model, components.averages)
            if components.averages
            else OwnAverage(self.raw_model, self.raw_optimizer)
        )
        self.meter, self.spikes = Meter(accelerator), Spikes()
        self.grad_norm, self.skipped, self.skipped_in_a_row = 0.0, 0, 0
        self.agreement = Agreement(accelerator.num_processes, config.train.process_timeout)
        self.looks = Looks(config, accelerator, datasets, components, run, self.ema)
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
                done = self.looks.done(self.step)
                self.accelerator.wait_for_everyone()  # before the first process adds to it
                self._look(done)
            batch, ending = self._next(self.step, loader, stop)
            while batch and not ending:
                loss, grad_norm = self._clipped_gradients(batch)
                following, ending = self._next(self.step + 1, loader, stop)
                self._take_or_skip(batch, loss, grad_norm)
                self.step += 1
                batch = following
                progress()
                if self._due(settings.log_every):
                    self._log(progress)
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

    def _next(
        self, step: int, loader: Iterator[Batch], stop: StopSignal
    ) -> tuple[Batch | None, Any]:
        """The batch that follows step number `step`, None after the last one, and the error with
        which the run must end once that step is done, the same in every process: a signal, or
        images that cannot be loaded."""
        batch = failure = None
        try:
            with self.meter.part(DATA):
                batch = next(loader) if step < self.config.train.steps else None
        except Exception as error:
            log.info("the images of step %d", step + 1, exc_info=True, extra=FILE_ONLY)
            failure = error
        own = self.accelerator.process_index + 1 if failure else 0
        signum, failed = self.agreement.largest(stop.received or 0, own)
        saved = f"step {step} is saved" if step else "nothing was trained"
        if failed:
            what = one_line(failure) if failure else f"process {failed - 1} failed"
            remedy = "mend it, and go on with the same command and --resume"
            return None, TrainingFailed(f"{self.run.path}: {what}; {saved}: {remedy}")
        if signum:
            what = f"{self.run.path}: stopped after step {step}; {saved}"
            return batch, Interrupted(f"{what}: go on with the same command and --resume", signum)
        return batch, None

    def _clipped_gradients(self, batch: Batch) -> tuple[Tensor, DeferredRead]:
        """Forward, backward and clipping.

        Returns the mean loss of this process, on the device, and the gradient's norm over all
        processes before clipping, on its way to the host. The norm is finite only if the loss of
        every process is.
        """
        loss = self._gradients(self.model, batch)
        self.accelerator.unscale_gradients()
        with self.meter.part(OPTIMIZER):
            parameters = list(self.raw_model.parameters())
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
            sent = DeferredRead(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            if self.config.train.max_grad_norm is not None:  # the device does it, the host waits
                clip_grads_with_norm_(parameters, self.config.train.max_grad_norm, norm)
        return loss, sent

    def _gradients(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward and backward over the micro-batches; returns the mean loss of this process."""
        settings, accelerator = self.config.train, self.accelerator
        size = len(batch.labels)
        with self.meter.part(FORWARD):
            draw = self._draw(size)
        micro = size // settings.accumulation_steps
        total = torch.zeros((), device=accelerator.device)
        for first in range(0, size, micro):
            part = slice(first, first + micro)
            last = first + micro >= size
            with nullcontext() if last else accelerator.no_sync(model):
                with self.meter.part(FORWARD):
                    x_part, y_part = batch.part(part).on(accelerator.device)
                    loss = self.objective(model, x_part, y_part, draw[part]).mean()
                # A loss that overflowed may have finite gradients, and no other process sees it.
                finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
                with self.meter.part(BACKWARD):
                    accelerator.backward(loss * finite / settings.accumulation_steps)
            total += loss.detach() / settings.accumulation_steps
        return total

    def _take_or_skip(self, batch: Batch, loss: Tensor, grad_norm: DeferredRead) -> None:
        """One step of the optimizer and the averages, unless the loss or the gradient of any
        process is not finite: then the step leaves no trace but a line of metrics.jsonl.

        The host waits for the norm, as any optimizer may be skipped only by not calling it. The
        next batch is loaded before, and the device clips meanwhile.
        """
        norm = grad_norm.read()
        if math.isfinite(norm):
            self.grad_norm, self.skipped_in_a_row = norm, 0
            self._set_lr()
            with self.meter.part(OPTIMIZER):
                # These products round less than those of autocast.
                with tf32_products(self.config.train.precision != "no"):
                    self.optimizer.step()
                if self.config.model.pc is not None:
                    update_spectral_norms(self.raw_model, self.step)
                self.ema.update(self.step + 1)
            self.meter.add(loss)
            self.optimizer.zero_grad()
        else:
            self.optimizer.zero_grad()
            self._skip(batch)

    def _skip(self, batch: Batch) -> None:
        """Count the step.

        Raises:
            TrainingFailed: it is one too many in a row; the message names the layer.
        """
        settings = self.config.train
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.meter.add(None)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # lowers the scale of the loss
        step, images = self.step + 1, (self.step + 1) * settings.global_batch_size
        self._append({"step": step, "images": images, "skipped": self.skipped})
        log.warning("step %d: the loss or the gradient is not finite; the step is skipped", step)
        if self.skipped_in_a_row < settings.max_skipped_steps:
            return
        own = culprit(self.raw_model, lambda: self._gradients(self.raw_model, batch))
        self.saver.wait()
        causes, saved = zip(*gather_object([(own, self.saver.saved)]), strict=True)
        sound = self.run.checkpoint_path(saved[0]) if saved[0] else "none"
        cause = next(filter(None, causes), "run once more, it is finite")
        raise TrainingFailed(
            f"{self.run.path}: the loss or the gradient was not finite on {self.skipped_in_a_row} "
            f"steps in a row, up to step {step}: {cause}; "
            f"newest sound checkpoint: {sound}; {TRY}"
        )

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

    def _loader(self) -> Iterator[Batch]:
        return build_loader(
            self.config,
            self.datasets.train,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_step=self.step,
        )

    # Logging and looks

    def _due(self, every: int | None) -> bool:
        return is_due(self.step, every, self.config.train.steps)

    def _log(self, progress: Counter) -> None:
        """Log the steps since the last line, if any was taken."""
        losses, batch = self.meter.state(), self.config.train.global_batch_size
        if not len(losses):
            return
        if spikes := self.spikes.among(losses.tolist()):
            log.warning("by step %d: %s", self.step, spikes)
        line = {"step": self.step, "images": self.step * batch}
        line |= self.meter.close(losses, batch)
        line["lr"] = self.raw_optimizer.param_groups[0]["lr"]
        if self.config.train.max_grad_norm is not None:
            line["grad_norm"] = self.grad_norm
        progress.note(f"loss {line['loss']:.4f}")
        self._record(line)

    def _record(self, line: dict[str, Any]) -> None:
        self._append(line)
        if self.accelerator.is_main_process:
            log.info(shown_line(line, self.config.train.steps))

    def _append(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl; a disk that cannot take it now does not end training."""
        if self.accelerator.is_main_process:
            show_numbers(self.accelerator, line)
            try:
                self.run.append_metrics(line)
            except WriteError as error:
                log.warning("%s; the next line tries again", error.what)

    def _look(self, done: Set[str] = frozenset()) -> None:
        """Validate and draw samples where this step is due, except for what is `done`."""
        due = self.looks.due(self.step)
        if not due:
            return
        self.meter.pause()
        left = [what for what in due if what not in done]
        found = self.looks.take(self.step, left)  # all processes meet there, whatever each has left
        if left:
            self._record({"step": self.step, **found})
        self.meter.go_on()

    # Checkpoints

    def _save(self) -> None:
        """Begin a checkpoint; weights that are not finite end the run and replace no checkpoint."""
        self.meter.pause()
        norms = torch._foreach_norm([local(p.detach()) for p in self.raw_model.parameters()])
        broken = not torch.stack(list(norms)).isfinite().all()
        if any(self.agreement.largest(int(broken))):
            what = f"weights are not finite by step {self.step}"
            raise TrainingFailed(f"{self.run.path}: {what}; {TRY}")
        scaler, main = self.accelerator.scaler, self.accelerator.is_main_process
        state = {
            "losses": self.meter.state(),
            "skipped": [self.skipped, self.skipped_in_a_row],
            "optimizer": self.raw_optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        weights = {"model": self.raw_model.state_dict(), "averages": self.ema.state_dicts()}
        content = whole({**weights, "state": state}, kept=main)
        if main:
            note = {"images": self.step * self.config.train.global_batch_size}
            self.saver.save(self.step, **content, texts=self.run.texts(), note=note)
        self.meter.go_on()

    def _restore(self) -> int:
        """Load the newest checkpoint, if there is one, and return its step, else 0."""
        steps = self.run.steps()
        if not steps:
            return 0
        step, wanted = steps[-1], self.raw_model.state_dict()
        state = self.run.load_state(step)
        raw = self.run.load_weights(step, "raw", wanted)
        self.raw_model.load_state_dict(placed_weights(raw, wanted))
        for average in self.ema.averages:
            values = self.run.load_weights(step, average.name, wanted)
            self.ema.load(average.name, placed_weights(values, wanted))
        self.meter.restore(state["losses"])
        self.skipped, self.skipped_in_a_row = state.get("skipped", (0, 0))
        with self.run.reading(step, "state.pt"):
            self.raw_optimizer.load_state_dict(placed_state(state["optimizer"], self.raw_optimizer))
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        return step
