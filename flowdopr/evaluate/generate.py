"""Drawing images from one checkpoint of a run, a batch at a time.

Batch k of a sampling holds the images k * batch_size, k * batch_size + 1, ..., and is always drawn
as a whole, by one process. So an image is the same bit for bit whichever process draws it, and
whatever was drawn before, also with a solver that chooses its steps for a batch.

Images are called by their numbers. Image i of a sampling depends on the seed, on i and on its
label, and not on how many images are drawn; its label depends on i.

Shapes: images uint8 `(N, C, H, W)`, labels `(N,)` int64.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from flowdopr.config import Config
from flowdopr.config.own import own_code
from flowdopr.data import UINT8_RULE, to_uint8
from flowdopr.data.loader import picks_between
from flowdopr.flow import (
    BATCH_DEPENDENT_SOLVERS,
    Sampling,
    Trajectory,
    build_sampling,
    generate,
    trajectory,
)
from flowdopr.flow.objective import num_classes_of
from flowdopr.linalg import full_float32
from flowdopr.models.weights import weights_sha256
from flowdopr.processes import device_of, this_process
from flowdopr.runs import Guide, RunFolder, commit, load_guide, versions

Numbers = range | tuple[int, ...]
MOST_NAMED = 5  # numbers of broken images in a message
DECODED_TOGETHER = 256  # decoded images are floats until they are rounded: not all at once


class RolloutsFailed(RuntimeError):
    """The rollouts of a checkpoint cannot be images; the message names the run and the step."""

    exit_code = 1


def balanced_labels(num: int, num_classes: int) -> Tensor:
    """`(num,)`: the classes in turn, so that label i does not depend on `num`."""
    return torch.arange(num) % num_classes


def labels_like_data(num: int, labels: Tensor) -> Tensor:
    """`(num,)` of the training labels in a fixed shuffled order, each once before any twice."""
    return labels[picks_between(0, len(labels), 0, num).indices]


def repeated_labels(num: int, labels: Sequence[int], num_classes: int) -> Tensor:
    """`(num,)`: the given labels over and over.

    Raises:
        ValueError: a label that the model does not have.
    """
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong or not labels:
        known = f"0 to {num_classes - 1}" if num_classes else "none, it is unconditional"
        raise ValueError(f"labels {list(labels)}: the model's labels are {known}")
    return torch.tensor(list(labels))[torch.arange(num) % len(labels)]


def numbers_in(text: str) -> list[int] | None:
    """The numbers of a list such as "3,7,10-19"; None if it has anything else, or a range that goes
    down."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", word.strip())
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            return None
        found += range(first, last + 1)
    return found


def label_numbers(labels: str | Sequence[int | str], names: Sequence[str]) -> list[int]:
    """The numbers of the classes in `labels`: class numbers, ranges such as "0-9", and `names`.

    Raises:
        ValueError: a name that no class has.
    """
    if isinstance(labels, str):  # a name may have a comma
        labels = [labels] if labels in names else labels.split(",")
    found = []
    for label in labels:
        known = [label] if isinstance(label, int) else numbers_in(label)
        if known is None and label not in names:
            near = difflib.get_close_matches(str(label), names, n=1)
            hint = (
                f"did you mean '{near[0]}'?" if near else "give class numbers, 0-9 or class names"
            )
            raise ValueError(f"labels: no class is called '{label}'; {hint}")
        found += [names.index(str(label))] if known is None else known
    return found


def mean_nfe(calls: Mapping[Numbers, int]) -> int | float:
    """The mean NFE of an image, from that of each batch."""
    total, num = sum(len(batch) * nfe for batch, nfe in calls.items()), sum(map(len, calls))
    return total / num if total % num else total // num


@dataclass(frozen=True)
class ImageSampler:
    """One checkpoint of a run, loaded, with the guide and the settings that its images depend on.

    `config` is the run's config with the overrides of the command.
    """

    run: RunFolder
    config: Config
    step: int
    weights: str
    model: nn.Module
    guide: Guide
    sampling: Sampling
    state: PartialState

    @classmethod
    def load(cls, run: RunFolder, config: Config, step: int | None, weights: str) -> ImageSampler:
        """Load checkpoint `step` (None: the newest) and the guide that `config` names.

        Raises:
            ConfigError, ValueError: no such checkpoint or weights, a guide that does not fit, or
                settings of sampling that do not go together.
        """
        state, sampling = this_process(), build_sampling(config)
        guide = load_guide(config, run.dataset, device_of(state))
        model, step = run.load_model(step, weights, device_of(state))
        return cls(run, config, step, weights, model, guide, sampling, state)

    def changed(self, config: Config) -> ImageSampler:
        """The same weights with other settings of section `sample`.

        Raises:
            ConfigError, ValueError: as `load`.
        """
        guide = load_guide(config, self.run.dataset, self.device)
        return replace(self, config=config, guide=guide, sampling=build_sampling(config))

    @property
    def device(self) -> torch.device:
        return device_of(self.state)

    @property
    def num_classes(self) -> int:
        """0 for an unconditional model."""
        return num_classes_of(self.model) or 0

    def origin(self) -> dict[str, Any]:
        """The fields of a card that say which weights and which code made the images."""
        return {
            "run": self.run.config.name,
            "step": self.step,
            "weights": self.weights,
            "checkpoint": {"step": self.step, "sha256": weights_sha256(self.model)},
            "uint8": UINT8_RULE,
            "versions": versions(),
            "commit": commit(),
            **own_code(self.config.model),
        }

    def guide_record(self) -> dict[str, Any]:
        """The guide's weights, for a card's `sampling`; empty without a guide."""
        if self.guide.model is None:
            return {}
        sha256 = {"sha256": weights_sha256(self.guide.model)}
        return {"guide": (self.guide.origin or {}) | sha256}

    def batches(self, numbers: Numbers) -> list[Numbers]:
        """The batches in which the images of these numbers are drawn. A solver that chooses its
        steps for a batch draws single images with all others of their batch."""
        config = self.config.sample
        size = config.batch_size
        if isinstance(numbers, tuple) and config.solver.name in BATCH_DEPENDENT_SOLVERS:
            found = sorted({number // size for number in numbers})
            return [range(batch * size, (batch + 1) * size) for batch in found]
        return [numbers[first : first + size] for first in range(0, len(numbers), size)]

    def share(self, numbers: Numbers) -> list[Numbers]:
        """Those of `batches` that this process draws."""
        return self.batches(numbers)[self.state.process_index :: self.state.num_processes]

    def draw(
        self,
        batch: Numbers,
        labels: Tensor | None,
        *,
        seed: int,
        decode: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor], Tensor] = to_uint8,
    ) -> tuple[Tensor, int]:
        """The images of one of the `batches`, on the CPU, and the model calls (NFE) of each.

        With a solver of fixed steps, image i depends on (`seed`, i) and its label alone, up to
        rounding. A solver in `BATCH_DEPENDENT_SOLVERS` chooses its steps for the whole batch, so
        there it depends on the rest of its batch within the solver's tolerance. Computed in full
        float32.

        Args:
            labels: of the images 0, 1, ... of the sampling; None for an unconditional model.
            decode: from the model's images to pixels, see `latents.load_decoder`.
            finish: what becomes of the pixels, which are floats.

        Raises:
            RolloutsFailed: the solver failed, or images are not finite.
        """
        with full_float32():
            try:
                samples = generate(
                    self.model,
                    None if labels is None else labels[list(batch)],
                    num_images=len(batch),
                    seed=seed,
                    indices=batch,
                    batch_size=len(batch),
                    guide_model=self.guide.model,
                    sampling=self.sampling,
                )
            except ValueError as error:  # an adaptive solver that finds no step
                raise RolloutsFailed(f"{self.run.path}: step {self.step}: {error}") from error
            images, broken = [], []
            for part in samples.images.split(DECODED_TOGETHER):
                pixels = decode(part)
                broken += (~pixels.flatten(1).isfinite().all(1)).tolist()
                images.append(finish(pixels))
        if numbers := [str(number) for number, bad in zip(batch, broken, strict=True) if bad]:
            named = ", ".join(numbers[:MOST_NAMED]) + ", ..." * (len(numbers) > MOST_NAMED)
            raise RolloutsFailed(  # to_uint8 would make them black
                f"{self.run.path}: step {self.step}: {len(numbers)} of the images {batch[0]} to "
                f"{batch[-1]} are not finite ({named}), because the training diverged or the "
                "guidance is too strong; choose an earlier step, or train with a lower optimizer.lr"
            )
        return torch.cat(images), int(samples.nfe)

    def trajectory(self, numbers: Numbers, labels: Tensor | None, *, seed: int) -> Trajectory:
        """The way to the images of these numbers, which are a batch of their own here.

        Args:
            labels: as in `draw`.
        """
        with full_float32():
            return trajectory(
                self.model,
                None if labels is None else labels[list(numbers)],
                seed=seed,
                indices=numbers,
                image_shape=self.run.dataset.image_shape,
                guide_model=self.guide.model,
                sampling=self.sampling,
            )
