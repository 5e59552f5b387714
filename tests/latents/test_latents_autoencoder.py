"""The latent autoencoder, on a tiny one of diffusers' with random weights."""

import sys

import pytest
import torch
from autoencoders import small_autoencoder

from flowdopr.latents.autoencoder import Autoencoder


@pytest.fixture
def vae():
    return small_autoencoder()


def test_shapes_and_frozen_weights(vae):
    autoencoder = Autoencoder(vae)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z = autoencoder.encode(x)
    assert z.shape == (2, *autoencoder.latent_shape((3, 16, 16))) == (2, 4, 8, 8)
    assert autoencoder.decode(z).shape == x.shape
    assert not any(p.requires_grad for p in autoencoder.parameters())
    assert not any(module.training for module in vae.modules())


def test_stable_diffusions_scale_is_the_default(vae):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = vae.encode(x).latent_dist.mean
    assert Autoencoder(vae).scale == 0.18215
    torch.testing.assert_close(Autoencoder(vae).encode(x), mean * 0.18215)
    shifted = Autoencoder(vae, scale=2.0, shift=0.5)
    torch.testing.assert_close(shifted.encode(x), (mean - 0.5) * 2.0)


def test_decode_undoes_scale_and_shift(vae):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = vae.decode(vae.encode(x).latent_dist.mean).sample
    autoencoder = Autoencoder(vae, scale=3.0, shift=-0.2)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(x)), expected)


def test_samples_scatter_as_the_posterior_says_and_follow_the_generator(vae):
    autoencoder = Autoencoder(vae, scale=1.0)
    x = torch.rand(1, 3, 16, 16).expand(500, -1, -1, -1)
    z = autoencoder.encode(x, sample=True, generator=torch.Generator().manual_seed(3))
    again = autoencoder.encode(x, sample=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(z, again)
    posterior = vae.encode(x[:1]).latent_dist
    error = (z.mean(0) - posterior.mean[0]) / posterior.std[0]
    assert error.abs().max() < 5 / 500**0.5
    torch.testing.assert_close(z.std(0), posterior.std[0], rtol=0.2, atol=0)


def test_from_pretrained_loads_a_folder(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    x = torch.rand(2, 3, 16, 16)
    loaded = Autoencoder.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.encode(x), Autoencoder(vae).encode(x))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b'{"block_out_channels": "x"}'),
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model.safetensors", b"cut"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # diffusers warns of what it then refuses
def test_a_folder_without_an_autoencoder_is_said_in_one_line(vae, tmp_path, file, content):
    vae.save_pretrained(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"no autoencoder could be loaded from .*; without"
    ) as error:
        Autoencoder.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_package_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'pip install "flowdopr\[latents\]"'):
        Autoencoder.from_pretrained("anything")


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 15, 16), (3, 16, 17)])
def test_images_that_do_not_fit_are_refused(vae, shape):
    with pytest.raises(ValueError, match="multiples of 2, not images of"):
        Autoencoder(vae).encode(torch.zeros(1, *shape))
