"""The velocity that a model predicts, with classifier-free guidance or autoguidance.

    v = v_guide + guidance_scale (v_model - v_guide)                                      (7)

where v_guide is the velocity of the same model without label (classifier-free guidance: Ho &
Salimans 2022) or of a worse model with the same label (autoguidance: Karras et al. 2024). A scale
of 1 is no guidance. All channels are guided. At fixed (x_t, t) the velocity, the data and the noise
are affine functions of each other, so (7) gives the same whichever of the three is combined.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowdopr.flow.objective import Model, labels_for, null_label
from flowdopr.flow.path import LinearPath, Path, batch_times
from flowdopr.flow.prediction import check_prediction, convert

ALWAYS = (0.0, 1.0)


@dataclass(eq=False)
class ModelVelocity:
    """v(x, t) of a model at fixed labels, made by `guided_velocity`, which explains the fields.

    `calls` counts model calls for one image. Classifier-free guidance counts as two calls, because
    its batch is twice as large.
    """

    model: Model
    y: Tensor | None
    path: Path
    prediction: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    guide_model: Model | None
    calls: int = field(default=0, init=False)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, ...) in float32 at the scalar time `t` (or times (B,) without interval)."""
        times = batch_times(t, x)
        if self.guidance_scale == 1 or not self._within_interval(t):
            return self._velocity(self.model, x, times, self.y)
        if self.guide_model is not None:
            main = self._velocity(self.model, x, times, self.y)
            guide = self._velocity(self.guide_model, x, times, self.y)
        else:
            assert self.y is not None
            y = torch.cat([self.y, torch.full_like(self.y, null_label(self.model))])
            both = self._velocity(self.model, torch.cat([x, x]), torch.cat([times, times]), y)
            self.calls += 1
            main, guide = both.chunk(2)
        return guide + self.guidance_scale * (main - guide)

    def _within_interval(self, t: Tensor) -> bool:
        if self.guidance_interval == ALWAYS:
            return True
        # Grids are float32, so the interval is rounded too: a time of 0.3 must equal an end of 0.3.
        rounded = torch.tensor([*self.guidance_interval, float(t)], dtype=torch.float32)
        low, high, time = rounded.tolist()
        return low <= time <= high

    def _velocity(self, model: Model, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.calls += 1
        output = model(x, t, y)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return convert(output, x, t, self.path, self.prediction, "velocity")


def guided_velocity(
    model: Model,
    y: Tensor | None = None,
    guidance_scale: float = 1.0,
    *,
    guidance_interval: tuple[float, float] = ALWAYS,
    guide_model: Model | None = None,
    path: Path | None = None,
    prediction: str = "velocity",
) -> ModelVelocity:
    """The velocity to integrate for `model` at labels `y`.

    >>> velocity = guided_velocity(lambda x, t, y: -x)
    >>> velocity(torch.ones(2, 3), torch.tensor(0.5)).shape, velocity.calls
    (torch.Size([2, 3]), 1)

    Args:
        model: model(x, t, y) -> (B, ...), giving what `prediction` names, as does `guide_model`.
        y: labels (B,), or None for an unconditional model.
        guidance_scale: factor in (7); 1 turns guidance off.
        guidance_interval: guidance acts only at times from low to high, both included
            (Kynkaanniemi et al. 2024); calls at other times count once.
        guide_model: a second model for autoguidance, in place of the unconditional branch.
        path: path with which the model was trained, by default linear.

    Raises:
        ValueError: for classifier-free guidance without labels or classes, a guide at scale 1, an
            interval that is not within [0, 1], or an unknown prediction.
    """
    y = labels_for(model, y)
    low, high = guidance_interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance_interval={guidance_interval}: need 0 <= low < high <= 1")
    if guide_model is not None and guidance_scale == 1:
        raise ValueError("guide_model has no effect at guidance_scale=1: set another scale")
    if guide_model is None and guidance_scale != 1:
        if y is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs labels: set it to 1 for an unconditional "
                "model, or give a guide_model"
            )
        null_label(model)  # raises for a model without classes
    path, prediction = path or LinearPath(), check_prediction(prediction)
    return ModelVelocity(model, y, path, prediction, guidance_scale, guidance_interval, guide_model)
