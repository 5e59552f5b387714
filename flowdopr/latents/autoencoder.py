"""The autoencoder of latents: diffusers' `AutoencoderKL` with its scale and shift.

Shapes: x (B, 3, H, W) images in [-1, 1]; z (B, L, H / f, W / f) latents, about unit variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowdopr.exits import reason
from flowdopr.models.weights import weights_sha256

# Decoding takes a hundred times the memory of an image, so it is done in small batches.
DECODED_TOGETHER = 16


class Autoencoder(nn.Module):
    """Images to latents and back: z = (E(x) - shift) * scale (Rombach et al., arXiv 2112.10752).

        autoencoder = Autoencoder.from_pretrained("stabilityai/sd-vae-ft-ema")
        z = autoencoder.encode(x)
        x = autoencoder.decode(z)

    The weights are frozen and the module is in evaluation mode.

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
        except Exception as error:  # diffusers checks little of what it reads
            raise ValueError(
                f"no autoencoder could be loaded from {name_or_path}: {reason(error)[:300]}; "
                "without a network, give the path of a folder in diffusers' format"
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

    def record(self, name_or_path: str) -> dict[str, Any]:
        """Plain values with which `from_record` loads this autoencoder again, ready for JSON."""
        local = Path(name_or_path)
        return {
            "name": str(local.resolve()) if local.is_dir() else name_or_path,
            "weights_sha256": weights_sha256(self.vae),
            "scale": self.scale,
            "shift": self.shift,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Autoencoder:
        """The autoencoder that made a `record`.

        Raises:
            ValueError: as `from_pretrained`; other weights than the record's.
        """
        found = cls.from_pretrained(record["name"], scale=record["scale"], shift=record["shift"])
        if weights_sha256(found.vae) != record["weights_sha256"]:
            raise ValueError(
                f"data.autoencoder: '{record['name']}' has other weights than the autoencoder that "
                "made the latents; give that one"
            )
        return found

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, L, h, w) of the latents of images (B, C, H, W).

        Raises:
            ValueError: images that this autoencoder does not take.
        """
        _, channels, height, width = x.shape
        self.latent_shape((channels, height, width))
        found = self.vae.encode(x).latent_dist
        return (found.mean - self.shift) * self.scale, found.std * abs(self.scale)

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


def load_decoder(
    record: Mapping[str, Any] | None, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """A function from a model's images (N, C, H, W) to pixels on the CPU.

    Args:
        record: `DatasetInfo.autoencoder`; None where the model's images are pixels already.
        device: where to decode.

    Raises:
        ValueError: diffusers is missing, nothing can be loaded, or it has other weights.
    """
    if record is None:
        return lambda images: images
    autoencoder = Autoencoder.from_record(record).to(device)

    def decode(latents: Tensor) -> Tensor:
        parts = latents.split(DECODED_TOGETHER)
        return torch.cat([autoencoder.decode(z.to(device)).cpu() for z in parts])

    return decode
