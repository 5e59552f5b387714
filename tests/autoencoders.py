"""A small autoencoder with random weights, for tests of several folders."""

from diffusers import AutoencoderKL


def small_autoencoder() -> AutoencoderKL:
    """Halves the side of RGB images into 4 channels."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
