"""DiT: a transformer on image patches, modulated by time and label (adaLN-zero).

Peebles and Xie, arXiv 2212.09748; sizes and details as in SiT, arXiv 2401.08740.

Shapes: B batch, C channels, H x W image, P patch side, N = HW / P^2 tokens, D hidden size.
"""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from flowdopr.models.layers import (
    Attention,
    Condition,
    FusedLinear,
    Linear,
    Mlp,
    SwiGLU,
    gated_sum,
    leave_to_gp,
    modulate,
    rotary_angles,
    sincos_positions,
    zero_,
)

# name: (depth, hidden_size, num_heads); S to XL are SiT's.
SIZES = {
    "XXS": (3, 64, 4),
    "XS": (6, 128, 4),
    "T": (12, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; identity at the start."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, *, mlp: str, norm: str, qk_norm: bool
    ):
        super().__init__()
        self.norm_1 = make_norm(norm, dim)
        self.attention = Attention(dim, num_heads, qk_norm=qk_norm)
        self.norm_2 = make_norm(norm, dim)
        self.mlp = (SwiGLU if mlp == "swiglu" else Mlp)(dim, hidden)
        self.modulation = leave_to_gp(FusedLinear(dim, dim, 6))

    def forward(self, x: Tensor, c: Tensor, angles: Tensor | None) -> Tensor:
        """x (B, N, D), c (B, D) the activated condition, angles (N, E/2) or None -> (B, N, D)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
            self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        )
        h = self.attention(modulate(self.norm_1(x), shift_1, scale_1), angles)
        x = gated_sum(x, gate_1, h)
        h = self.mlp(modulate(self.norm_2(x), shift_2, scale_2))
        return gated_sum(x, gate_2, h)


class DiT(nn.Module):
    """Velocity model `model(x, t, y)` on image or latent patches.

        model = DiT((3, 32, 32), num_classes=10, size="S", patch_size=4)
        velocity = model(x, t, y)  # x (B, 3, 32, 32), t (B,), y (B,) or None

    Args:
        image_shape: (C, H, W).
        num_classes: 0 for an unconditional model; else label `num_classes` is the null label.
        size: one of SIZES; `depth`, `hidden_size` and `num_heads` replace its values one by one.
        patch_size: side of a patch in pixels; divides H and W; 1 is patchless.
        mlp_ratio: MLP width over hidden size.
        mlp: "gelu" or "swiglu" (same parameter count).
        norm: "layer" or "rms"; both without weights of their own.
        qk_norm: RMS-normalise queries and keys.
        rope: rotary positions in attention, beside the fixed sin-cos table.

    Raises:
        ValueError: unknown size, or sizes that do not divide one another.
    """

    positions: Tensor
    angles: Tensor | None

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        size: str = "S",
        depth: int | None = None,
        hidden_size: int | None = None,
        num_heads: int | None = None,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        norm: Literal["layer", "rms"] = "layer",
        qk_norm: bool = False,
        rope: bool = False,
    ):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"model.size {size!r} is unknown: choose one of {', '.join(SIZES)}")
        depth = depth or SIZES[size][0]
        dim = hidden_size or SIZES[size][1]
        heads = num_heads or SIZES[size][2]
        channels, height, width = image_shape
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"model.patch_size {patch_size} does not divide the image, {height} x {width}"
            )
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.patch_size = patch_size
        grid = height // patch_size, width // patch_size
        self.embed = Linear(channels * patch_size**2, dim)
        self.condition = Condition(dim, num_classes)
        self.blocks = nn.ModuleList(
            DiTBlock(dim, heads, int(dim * mlp_ratio), mlp=mlp, norm=norm, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.final_norm = make_norm(norm, dim)
        self.final_modulation = leave_to_gp(FusedLinear(dim, dim, 2))
        self.final = Linear(dim, channels * patch_size**2)
        # The tables follow from the sizes, so checkpoints need not store them.
        angles = rotary_angles(*grid, dim // heads) if rope else None
        self.register_buffer("positions", sincos_positions(*grid, dim), persistent=False)
        self.register_buffer("angles", angles, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """SiT's initialisation: Xavier, small embeddings, zero modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for linear in (self.condition.time_1, self.condition.time_2):
            nn.init.normal_(linear.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, DiTBlock):
                zero_(module.modulation)
        zero_(self.final_modulation)
        zero_(self.final)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) int64 or None -> velocity (B, C, H, W)."""
        p = self.patch_size
        h = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        h = h + self.positions
        # Every modulation reads the same activated condition: activate it once.
        c = nn.functional.silu(self.condition(t, y))
        for block in self.blocks:
            h = block(h, c, self.angles)
        shift, scale = self.final_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        h = self.final(modulate(self.final_norm(h), shift, scale))
        height = x.shape[2] // p
        x = rearrange(h, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=p, q=p)
        return x.contiguous()


def make_norm(norm: str, dim: int) -> nn.Module:
    """A normalisation without weights: the modulation after it scales and shifts."""
    kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm]
    return kind(dim, eps=1e-6, elementwise_affine=False)
