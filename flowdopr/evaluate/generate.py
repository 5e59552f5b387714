"""Drawing images from one checkpoint of a run, shared out over the processes of the launch.

Shapes: images uint8 `(N, C, H, W)`, labels `(N,)` int64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from flowdopr.config import Config
from flowdopr.data import UINT8_RULE, to_uint8
from flowdopr.data.loader import picks_between
from flowdopr.flow import build_sampling, generate
from flowdopr.flow.objective import num_classes_of
from flowdopr.latents import load_decoder
from flowdopr.linalg import full_float32
from flowdopr.models.weights import weights_sha256
from flowdopr.processes import device_of, this_process
from flowdopr.runs import Guide, RunFolder, commit, load_guide, versions
from flowdopr.terminal import counting

DECODED_TOGETHER = 256  # decoded images are floats until they are rounded: not all at once


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
    state: PartialState

    @classmethod
    def load(cls, run: RunFolder, config: Config, step: int | None, weights: str) -> ImageSampler:
        """Load checkpoint `step` (None: the newest) and the guide that `config` names.

        Raises:
            ConfigError, ValueError: no such checkpoint or weights, or a guide that does not fit.
        """
        state = this_process()
        guide = load_guide(config, run.dataset, device_of(state))
        model, step = run.load_model(step, weights, device_of(state))
        return cls(run, config, step, weights, model, guide, state)

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
        }

    def guide_record(self) -> dict[str, Any]:
        """The guide's weights, for a card's `sampling`; empty without a guide."""
        if self.guide.model is None:
            return {}
        sha256 = {"sha256": weights_sha256(self.guide.model)}
        return {"guide": (self.guide.origin or {}) | sha256}

    def draw(
        self,
        num: int,
        labels: Tensor | None,
        *,
        seed: int,
        autoencoder: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, int | float]:
        """`num` images on the CPU of every process, and the model calls (NFE) per image.

        Each process draws one contiguous range. With a solver of fixed steps, image i depends on
        (`seed`, i) and its label alone, whatever the number of processes and the batch size. A
        solver in `BATCH_DEPENDENT_SOLVERS` chooses its steps for a whole batch, so there the same
        holds only up to its tolerance. Computed in full float32.

        Args:
            autoencoder: what decodes the model's images; None where they are pixels.
        """
        decode = load_decoder(autoencoder, self.device)
        rank, world = self.state.process_index, self.state.num_processes
        first, last = rank * num // world, (rank + 1) * num // world
        share: list[tuple[Tensor, float]] = []
        if last > first:
            with counting("sampling", last - first, shown=rank == 0) as progress, full_float32():
                samples = generate(
                    self.model,
                    None if labels is None else labels[first:last],
                    num_images=last - first,
                    seed=seed,
                    first_index=first,
                    batch_size=self.config.sample.batch_size,
                    guide_model=self.guide.model,
                    sampling=build_sampling(self.config),
                    progress=progress,
                )
                parts = samples.images.split(DECODED_TOGETHER)
                images = torch.cat([to_uint8(decode(part)) for part in parts])
            share = [(images, samples.nfe * (last - first))]
        shares = gather_object(share) if world > 1 else share
        nfe = sum(calls for _, calls in shares) / num
        return torch.cat([images for images, _ in shares]), int(nfe) if nfe.is_integer() else nfe
