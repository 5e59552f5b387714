"""Latents: diffusers' `AutoencoderKL` behind two calls, `encode` and `decode`.

Shapes: x (B, 3, H, W) images in [-1, 1]; z (B, L, H / f, W / f) latents, about unit variance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Images to latents and back: z = (E(x) - shift) * scale (Rombach et al., arXiv 2112.10752).

        autoencoder = Autoencoder.from_pretrained("stabilityai/sd-vae-ft-ema")
        z = autoencoder.encode(x)
        x = autoencoder.decode(z)

    Never trained here: weights are frozen, the module is in evaluation mode.

    Args:
        vae: a diffusers `AutoencoderKL`.
        scale: factor on latents; default the VAE's own (0.18215 for Stable Diffusion's).
        shift: subtracted first; default the VAE's own, else 0.
    """

    def __init__(self, vae: Any, *, scale: float | None = None, shift: float | None = None):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        own_shift = getattr(vae.config, "shift_factor", None) or 0.0
        self.scale = float(vae.config.scaling_factor if scale is None else scale)
        self.shift = float(own_shift if shift is None else shift)
        self.image_channels = int(vae.config.in_channels)
        self.latent_channels = int(vae.config.latent_channels)
        self.downsampling = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, *, scale: float | None = None, shift: float | None = None
    ) -> Autoencoder:
        """Load from a folder in diffusers' format, or by its name on the Hugging Face hub.

        Raises:
            ValueError: diffusers is missing, or nothing can be loaded from there.
        """
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ValueError(
                'latents need the package diffusers: pip install "flowdopr[latents]"'
            ) from error
        try:
            vae = AutoencoderKL.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"no autoencoder could be loaded from {name_or_path}: {reason}"
            ) from error
        return cls(vae, scale=scale, shift=shift)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape (L, h, w) of the latents of images (C, H, W).

        Raises:
            ValueError: images that this autoencoder does not take.
        """
        channels, height, width = image_shape
        f = self.downsampling
        if channels != self.image_channels or height % f or width % f:
            raise ValueError(
                f"the autoencoder takes {self.image_channels} channels and sides that are "
                f"multiples of {f}, not images of {channels} x {height} x {width}"
            )
        return self.latent_channels, height // f, width // f

    @torch.no_grad()
    def encode(self, x: Tensor, *, sample: bool = False, generator: Any = None) -> Tensor:
        """Latents of images: the posterior's mean, or a sample of it from `generator`.

        Args:
            x: (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: images that this autoencoder does not take.
        """
        _, channels, height, width = x.shape
        self.latent_shape((channels, height, width))
        posterior = self.vae.encode(x).latent_dist
        z = posterior.sample(generator) if sample else posterior.mean
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1] and not clamped, of latents (B, L, h, w)."""
        return self.vae.decode(z / self.scale + self.shift).sample
