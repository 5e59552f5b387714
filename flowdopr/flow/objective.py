"""The training objective: random numbers drawn for the global batch, and the loss they give.

Shapes: x_0, x_1 (B, C, H, W) or (B, ...); t, keep, u, loss (B,); y (B,) int64, another condition
(B, ...), or None.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from flowdopr.flow.coupling import Coupling, independent
from flowdopr.flow.path import LinearPath, Path
from flowdopr.flow.prediction import check_prediction, convert, loss_weight
from flowdopr.flow.time import TimeSampler

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Draw:
    """All random numbers of one training step; `draw[a:b]` holds those of images a to b - 1.

    x_0: noise (B, C, H, W). t: times (B,). keep: (B,) bool, False where the label is dropped.
    u: (B,) uniform numbers for couplings that choose at random.
    """

    x_0: Tensor
    t: Tensor
    keep: Tensor
    u: Tensor

    def __getitem__(self, part: slice | Tensor) -> "Draw":
        return Draw(*(getattr(self, field.name)[part] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.t)


class FlowMatching:
    """Conditional flow matching (Lipman et al. 2023): regression of dx_t, x_1 or x_0 at (x_t, t).

    >>> objective = FlowMatching()
    >>> draw = objective.draw(8, (1, 4, 4), generator=torch.Generator().manual_seed(0))
    >>> loss = objective(lambda x, t, y: x, torch.rand(8, 1, 4, 4), None, draw)
    >>> loss.shape
    torch.Size([8])

    Args:
        path: probability path from noise to data, by default linear.
        prediction: what the model predicts: "velocity", "data" or "noise".
        weighting: weight of the squared error, see `loss_weight`.
        time_sampler: distribution of t, by default uniform.
        coupling: pairs noise with images, see `make_coupling`; by default as drawn.
        class_dropout_prob: probability that the label of an image is replaced by the null label
            `model.num_classes`, as classifier-free guidance needs.
        sigma_data: standard deviation of the data, for the weighting "edm".

    Raises:
        ValueError: for an unknown prediction or weighting, a weighting that float32 cannot hold on
            this path, or a probability outside [0, 1].
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        prediction: str = "velocity",
        weighting: str = "uniform",
        time_sampler: TimeSampler | None = None,
        coupling: Coupling = independent,
        class_dropout_prob: float = 0.0,
        sigma_data: float = 0.5,
    ) -> None:
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob={class_dropout_prob}: must be in [0, 1]")
        self.path = path or LinearPath()
        self.prediction = check_prediction(prediction)
        self.weighting = weighting
        self.time_sampler = time_sampler or TimeSampler()
        self.coupling = coupling
        self.class_dropout_prob = class_dropout_prob
        self.sigma_data = sigma_data
        if not self._weight(torch.linspace(0, 1, 101)).isfinite().all():
            raise ValueError(
                f"weighting={weighting!r} of prediction={prediction!r} leaves float32 on this path "
                f"({type(self.path).__name__}): choose weighting 'uniform' or 'velocity'"
            )

    def _weight(self, t: Tensor) -> Tensor:
        return loss_weight(self.weighting, t, self.path, self.prediction, self.sigma_data)

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, ...],
        *,
        generator: torch.Generator,
        device: torch.device | str | None = None,
    ) -> Draw:
        """Random numbers for a global batch, drawn on the generator's device, moved to `device`.

        Each process and micro-batch takes its slice, so the numbers do not depend on how many
        processes and micro-batches there are.

        Args:
            batch_size: images of the global batch, B.
            image_shape: of one of them, (C, H, W) or any other.
        """
        here = generator.device
        t = self.time_sampler(batch_size, generator, self.path)
        keep = torch.rand(batch_size, generator=generator, device=here) >= self.class_dropout_prob
        u = torch.rand(batch_size, generator=generator, device=here)
        x_0 = torch.randn(batch_size, *image_shape, generator=generator, device=here)
        to = device if device is not None else here
        return Draw(*(value.to(to, non_blocking=True) for value in (x_0, t, keep, u)))

    def __call__(self, model: Model, x_1: Tensor, y: Tensor | None, draw: Draw) -> Tensor:
        """Loss (B,) in float32: the weighted squared error, averaged over C, H, W.

        The coupling acts among the images given here, that is within one micro-batch.

        Raises:
            ValueError: when labels are to be dropped but the model has no null label.
        """
        y = labels_for(model, y)
        x_0 = self.coupling(draw.x_0, x_1, y, draw.u)
        x_t, dx_t = self.path.sample(x_0, x_1, draw.t)
        if y is not None and self.class_dropout_prob > 0:
            y = torch.where(draw.keep, y, null_label(model))
        output = model(x_t, draw.t, y).float()
        target = {"velocity": dx_t, "data": x_1.float(), "noise": x_0.float()}[self.prediction]
        return (output - target).square().flatten(1).mean(1) * self._weight(draw.t)

    def velocity(self, model: Model, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The velocity (B, C, H, W) in float32, converted from what the model predicts."""
        output = model(x_t, t, y).float()
        return convert(output, x_t, t, self.path, self.prediction, "velocity")


def num_classes_of(model: Model) -> int | None:
    """`model.num_classes`, also of a model in a distributed wrapper; None for a plain function."""
    return getattr(getattr(model, "module", model), "num_classes", None)


def labels_for(model: Model, y: Tensor | None) -> Tensor | None:
    """`y`, or None if `model` is unconditional."""
    return None if num_classes_of(model) == 0 else y


def null_label(model: Model) -> int:
    """The label for "no class", which is `model.num_classes`.

    Raises:
        ValueError: for a model without classes.
    """
    number = num_classes_of(model)
    if not number:
        raise ValueError("class dropout and guidance need a model with num_classes above 0")
    return number
