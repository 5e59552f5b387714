"""The spectrum of rollouts against NumPy in float64, and what changes it."""

import numpy as np
import pytest
import torch

from flowdopr.data import ImageTensor
from flowdopr.evaluate.spectrum import principal_directions, spectrum


def correlated(count, seed, shape=(1, 6, 6)):
    """Images whose covariance has eigenvalues from about 900 to 4 squared levels."""
    size = int(np.prod(shape))
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    scale = np.geomspace(30, 2, size)
    x = 127 + (np.random.default_rng(seed).normal(size=(count, size)) * scale) @ basis.T
    return torch.tensor(x.round().clip(0, 255), dtype=torch.uint8).reshape(count, *shape)


def dataset(images):
    return ImageTensor(images, torch.zeros(len(images), dtype=torch.int64))


def directions(images, folder):
    return principal_directions(dataset(images), folder, str(hash(images.numpy().tobytes())))


def measured(images, known):
    """The spectrum of images that come in batches."""
    moments = sum(known.moments(part) for part in images.split(300))
    return spectrum(moments, len(images), known)


def test_ratios_are_those_of_numpy_in_float64(tmp_path):
    data, rollouts = correlated(5000, 1), correlated(800, 2)
    found = measured(rollouts, directions(data, tmp_path))
    x, y = (images.flatten(1).double().numpy() for images in (data, rollouts))
    variances, vectors = np.linalg.eigh(np.cov(x, rowvar=False, bias=True))
    logs = np.log(np.var(y @ vectors, axis=0, ddof=1) / variances)[::-1]
    assert found["spectrum_error"] == pytest.approx(abs(logs).mean(), rel=1e-4)
    assert found["spectrum_error_lowest"] == pytest.approx(abs(logs[-12:]).mean(), rel=1e-4)
    groups = [group.mean() for group in np.array_split(logs, 32)]
    assert np.log(found["spectrum"]) == pytest.approx(groups, abs=1e-4)


def test_the_data_have_no_error_and_lost_detail_shows_where_it_is_lost(tmp_path):
    data = correlated(5000, 1)
    known = directions(data, tmp_path)
    assert measured(data, known)["spectrum_error"] < 1e-3
    x = data.flatten(1).float() @ known.directions
    x[:, -12:] = x[:, -12:].mean(0) + (x[:, -12:] - x[:, -12:].mean(0)) / 2
    blurred = (x @ known.directions.T).round().clamp(0, 255).byte().reshape(data.shape)
    found = measured(blurred, known)
    # A quarter of the variance in the 12 lowest of 36 directions, but for the rounding to levels.
    assert found["spectrum_error_lowest"] == pytest.approx(np.log(4), abs=0.15)
    assert found["spectrum_error"] == pytest.approx(np.log(4) / 3, abs=0.06)
    assert found["spectrum"][0] == pytest.approx(1, abs=0.02)
    assert found["spectrum"][-1] == pytest.approx(0.26, abs=0.03)


def test_constant_numbers_are_left_out_and_constant_images_refused(tmp_path):
    data = correlated(500, 1)
    data[:, :, 0] = 7
    assert len(directions(data, tmp_path).variances) == 30
    constant = measured(torch.full_like(data, 9), directions(data, tmp_path))
    assert np.isfinite(constant["spectrum"]).all()
    with pytest.raises(ValueError, match="that differ"):
        directions(torch.full_like(data, 9), tmp_path)


def test_large_images_are_averaged_to_32_pixels_and_directions_kept(tmp_path):
    data = torch.randint(0, 256, (40, 1, 64, 64), dtype=torch.uint8)
    first = directions(data, tmp_path)
    assert first.directions.shape[0] == 32 * 32
    again = directions(data, tmp_path)
    assert torch.equal(first.variances, again.variances)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(first.variances, directions(data, tmp_path).variances)
    assert (first.variances.diff() <= 0).all()
