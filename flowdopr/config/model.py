"""Settings of the models; each section's fields are the model's keyword arguments."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowdopr.config.types import Count, Fraction, Function, Pattern, Positive, Section


class PCConfig(Section):
    level: Literal[0, 1, 2, 3, 4] = 4
    """Degree of the polynomial that lifts small singular values; 0 normalises alone."""
    layers: Annotated[tuple[Pattern, ...], Field(min_length=1)] = (
        r"(^|\.)(mlp\.(up|down)|attention\.proj)$",
    )
    """Regular expressions, without look-around, searched in the names of Linear and Conv2d layers.
    The default finds the MLPs and the outputs of attention."""
    recover_norm: bool = True
    """Multiply by the weight's own spectral norm again, as a constant."""
    gain: bool = True
    """Multiply each matrix by a trained scalar."""
    power_iterations: Count = 1
    """Power iterations a step, which estimate the spectral norm."""


class ModelSection(Section):
    """Settings of every model."""

    name: str
    class_conditional: bool = True
    """Feed class labels to the model; false trains an unconditional one."""
    pc: PCConfig | None = None
    """PC layers, which lift the small singular values of their weights: their settings, `{}` for
    the defaults. null: none. See docs/pc-layer.md."""


class DiTConfig(ModelSection):
    name: Literal["dit"]
    """Diffusion transformer."""
    size: Literal["XXS", "XS", "T", "S", "B", "L", "XL"] = "S"
    """Named depth, width and heads; S to XL are SiT's."""
    depth: Count | None = None
    """Blocks, in place of the size's."""
    hidden_size: Count | None = None
    """Width, in place of the size's."""
    num_heads: Count | None = None
    """Attention heads, in place of the size's."""
    patch_size: Count = 2
    """Side of a patch in pixels; 1 is patchless."""
    mlp_ratio: Positive = 4.0
    """MLP width over hidden size."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Kind of MLP, with equal parameter counts."""
    norm: Literal["layer", "rms"] = "layer"
    """Kind of normalisation, without weights of its own."""
    qk_norm: bool = False
    """RMS-normalise queries and keys."""
    rope: bool = False
    """Rotary positions in attention, beside the fixed sine-cosine table."""

    @model_validator(mode="after")
    def _size_is_used(self) -> DiTConfig:
        if self.depth and self.hidden_size and self.num_heads:
            self.unused("model.size", "beside model.depth, model.hidden_size and model.num_heads")
        return self


class UNetConfig(ModelSection):
    name: Literal["unet"]
    """Convolutional U-Net with attention."""
    channels: Count = 128
    """Width at multiplier 1; a multiple of 4."""
    channel_multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 2, 2)
    """Width of each level over `channels`, finest first."""
    num_res_blocks: Count = 2
    """Residual blocks a level on the way down (one more on the way up)."""
    attention_resolutions: tuple[Count, ...] = (16,)
    """Heights of the feature maps that get attention; the middle always has it."""
    num_heads: Count = 4
    """Attention heads."""
    head_channels: Count | None = None
    """Channels of an attention head, in place of `num_heads`."""
    dropout: Fraction = 0.0
    """Dropout inside residual blocks."""
    scale_shift_norm: bool = True
    """The condition scales and shifts the norm (FiLM) instead of being added."""
    resample: Literal["conv", "pool", "resblock"] = "conv"
    """What changes the resolution; `pool` has no weights."""

    @model_validator(mode="after")
    def _every_setting_is_used(self) -> UNetConfig:
        if self.head_channels:
            self.unused("model.num_heads", "beside model.head_channels")
        if len(self.channel_multipliers) == 1:
            self.unused("model.resample", "with one level in model.channel_multipliers")
        return self


class OwnConfig(ModelSection):
    name: Literal["own"]
    """A model of your own: docs/own-model.md."""
    factory: Function
    """The function that returns it, as `module:function`; the environment variable FLOWDOPR_CODE
    must list it, because it runs code."""
    options: dict[str, Any] | None = None
    """Its arguments after `image_shape` and `num_classes`."""
