"""Velocities of models, with classifier-free guidance or autoguidance, counting model calls.

    v = v_guide + guidance_scale (v_model - v_guide)                                      (7)

where v_guide is the same model without label (classifier-free: Ho & Salimans 2022) or a worse model
with the same label (autoguidance: Karras et al. 2024). A scale of 1 is no guidance. All channels
are guided. At fixed (x_t, t) the predictions are affine in each other with the same offset, so (7)
is the same whether velocities, data or noises are combined.
"""

import torch
from torch import Tensor

from flowdopr.flow.objective import Model, labels_for, null_label
from flowdopr.flow.path import LinearPath, Path, batch_times
from flowdopr.flow.prediction import check_prediction, convert

ALWAYS = (0.0, 1.0)


class ModelVelocity:
    """v(x, t) of a model at fixed labels; `calls` counts model calls of one image.

    The doubled batch of classifier-free guidance counts as two calls, for it costs two.
    """

    def __init__(
        self,
        model: Model,
        y: Tensor | None,
        *,
        path: Path,
        prediction: str,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guide_model: Model | None,
    ) -> None:
        self.model, self.guide_model = model, guide_model
        self.y = labels_for(model, y)
        self.path, self.prediction = path, prediction
        self.scale, self.interval = guidance_scale, guidance_interval
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, ...) in float32 at the scalar time `t` (or times (B,) without interval)."""
        times = batch_times(t, x)
        if self.scale == 1.0 or not self._within_interval(t):
            return self._velocity(self.model, x, times, self.y)
        if self.guide_model is not None:
            main = self._velocity(self.model, x, times, self.y)
            guide = self._velocity(self.guide_model, x, times, self.y)
        else:
            main, guide = self._both_branches(x, times)
        return guide + self.scale * (main - guide)

    def _within_interval(self, t: Tensor) -> bool:
        if self.interval == ALWAYS:
            return True
        # All rounded alike: times of a grid are float32, and 0.3 of it must be the end 0.3.
        low, high, time = torch.tensor([*self.interval, float(t)], dtype=torch.float32).tolist()
        return low <= time <= high

    def _velocity(self, model: Model, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.calls += 1
        output = model(x, t, y)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return convert(output, x, t, self.path, self.prediction, "velocity")

    def _both_branches(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        assert self.y is not None
        y = torch.cat([self.y, torch.full_like(self.y, null_label(self.model))])
        both = self._velocity(self.model, torch.cat([x, x]), torch.cat([t, t]), y)
        self.calls += 1
        main, guide = both.chunk(2)
        return main, guide


def check_guidance(
    model: Model,
    y: Tensor | None,
    guidance_scale: float,
    guidance_interval: tuple[float, float] = ALWAYS,
    guide_model: Model | None = None,
) -> None:
    """Refuse guidance that cannot work.

    Raises:
        ValueError: for classifier-free guidance without labels or classes, a guide without a scale,
            or an interval that is not within [0, 1].
    """
    low, high = guidance_interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance_interval={guidance_interval}: need 0 <= low < high <= 1")
    if guide_model is not None:
        if guidance_scale == 1:
            raise ValueError("guide_model has no effect at guidance_scale=1: set another scale")
    elif guidance_scale != 1:
        if labels_for(model, y) is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs labels: set it to 1 for an unconditional "
                "model, or give a guide_model"
            )
        null_label(model)


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
        guidance_scale: equation (7); 1 is off.
        guidance_interval: times (low, high) outside of which there is no guidance
            (Kynkaanniemi et al. 2024), its ends included; calls outside count once.
        guide_model: a second model for autoguidance, in place of the unconditional branch.
        path: of the model's training, by default linear.

    Raises:
        ValueError: see `check_guidance`; an unknown prediction.
    """
    check_guidance(model, y, guidance_scale, guidance_interval, guide_model)
    return ModelVelocity(
        model,
        y,
        path=path or LinearPath(),
        prediction=check_prediction(prediction),
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        guide_model=guide_model,
    )
