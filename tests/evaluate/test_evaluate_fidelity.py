"""Distances against independent float64 computations, and the pitfalls around torch-fidelity."""

from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save
from torch_fidelity import feature_extractor_inceptionv3 as inception

from flowdopr.data import ImageTensor
from flowdopr.disk import cache_folder
from flowdopr.evaluate import (
    Features,
    classifier_extractor,
    extractors,
    fidelity,
    inception_extractor,
    reference_features,
)
from flowdopr.evaluate.pretrained import pretrained_extractor
from flowdopr.linalg import full_float32

ALL = ("fd", "kid", "isc", "prc")


@pytest.fixture
def extractor(digits):
    return classifier_extractor(digits)


def part(dataset, first, last):
    return ImageTensor(dataset.images[first:last], dataset.labels[first:last])


def measure(generated, reference, extractor, metrics=ALL, key=None):
    """Metrics and how they were measured; cached under a fingerprint of the very images."""
    key = key or str(hash(reference.images.numpy().tobytes()))
    real = reference_features(reference, key, extractor)
    return fidelity(extractor(generated.images), real, extractor, metrics)


def score(*args):
    return measure(*args)[0]


def features_of(dataset, extractor):
    return extractor(dataset.images).features.numpy()


def test_a_set_is_at_no_distance_from_itself(digits, extractor):
    same = part(digits.train, 0, 600)
    found = score(same, same, extractor)
    assert set(found) == {
        *("fd", "kid_mean", "kid_std", "isc_mean", "isc_std", "precision", "recall", "f_score")
    }
    assert abs(found["fd"]) < 1e-4
    assert found["precision"] == found["recall"] == 1
    assert 1 <= found["isc_mean"] <= 10


def test_fd_is_the_formula_in_float64(digits, extractor):
    left, right = part(digits.train, 0, 500), part(digits.train, 500, 1100)
    a, b = features_of(left, extractor), features_of(right, extractor)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(cov_a + cov_b - 2 * root)
    assert score(left, right, extractor, ["fd"])["fd"] == pytest.approx(expected, rel=1e-6)


def test_kid_is_the_unbiased_polynomial_mmd(digits, extractor):
    """With as many images as a subset has, every subset is all of them."""
    left, right = part(digits.train, 0, 300), part(digits.train, 300, 600)
    a, b = features_of(left, extractor), features_of(right, extractor)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    expected = (
        off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b)) - 2 * kernel(a, b).mean()
    )
    found, how = measure(left, right, extractor, ["kid"])
    assert found == {"kid_mean": pytest.approx(expected, rel=1e-6), "kid_std": None}
    assert how["kid"]["std"] == "none: each subset has all 300 images of one side"


def test_kid_varies_over_subsets_that_are_smaller_than_both_sides(digits, extractor, monkeypatch):
    monkeypatch.setattr(import_module("flowdopr.evaluate.fidelity"), "LARGEST_KID_SUBSET", 100)
    left, right = part(digits.train, 0, 300), part(digits.train, 300, 600)
    found, how = measure(left, right, extractor, ["kid"])
    assert found["kid_std"] > 0
    assert how["kid"] == {"subsets": 100, "subset_size": 100}


def test_every_metric_tells_noise_from_digits(digits, extractor):
    real, others = part(digits.train, 0, 500), part(digits.train, 500, 1000)
    noise = ImageTensor(torch.randint_like(real.images, 256), real.labels)
    good, bad = score(others, real, extractor), score(noise, real, extractor)
    assert good["fd"] < bad["fd"] / 10
    assert good["kid_mean"] < bad["kid_mean"] / 10
    for name in ("precision", "recall"):
        assert good[name] > 0.7 > 0.3 > bad[name]
    assert good["isc_mean"] > bad["isc_mean"]


def test_precision_is_about_generated_and_recall_about_real_images(digits, extractor):
    """Copies of a few real images are precise and recall little."""
    real = part(digits.train, 0, 400)
    few = ImageTensor(real.images[:20].repeat(20, 1, 1, 1), real.labels)
    found = score(few, real, extractor, ["prc"])
    assert found["precision"] == 1
    assert found["recall"] < 0.2


def test_reference_features_are_reused_only_for_the_same_reference(digits, extractor):
    generated, reference = part(digits.train, 0, 100), part(digits.train, 100, 300)
    stranger = ImageTensor(255 - reference.images, reference.labels)

    def fd(reference, fingerprint):
        return measure(generated, reference, extractor, ["fd"], fingerprint)[0]["fd"]

    first = fd(reference, "A")
    assert fd(stranger, "A") == first  # the key says it is the same reference
    assert fd(stranger, "B") != pytest.approx(first, rel=0.1)
    assert fd(part(reference, 0, 150), "A") != first


def test_generated_images_are_never_cached(digits, extractor):
    reference = part(digits.train, 0, 200)
    found = [
        score(part(digits.train, first, first + 100), reference, extractor, ["fd"])["fd"]
        for first in (200, 300)
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize("damage", [b"", b"no tensors", save({"other": torch.ones(2)}), None])
def test_a_damaged_cache_of_reference_features_is_made_again(digits, extractor, damage):
    reference = part(digits.train, 0, 50)
    before = set((cache_folder() / "features").glob("*"))
    first = reference_features(reference, "damaged", extractor)
    (path,) = set((cache_folder() / "features").glob("*")) - before
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] if damage is None else damage)
    assert torch.equal(reference_features(reference, "damaged", extractor), first)
    assert path.read_bytes() == whole
    path.unlink()


@pytest.mark.parametrize(("metrics", "count"), [(["prc"], 4), (["fd"], 1)])
def test_too_few_images_are_refused_in_one_line(digits, extractor, metrics, count):
    with pytest.raises(ValueError, match=r"raise evaluate.fid_num_images$"):
        score(part(digits.train, 0, count), digits.train, extractor, metrics)
    with pytest.raises(ValueError, match=r"take them out of evaluate.metrics$"):
        score(digits.held_out, part(digits.train, 0, count), extractor, metrics)


def test_full_float32_only_while_scoring():
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    convolution.fp32_precision = "tf32"
    try:
        with full_float32():
            assert convolution.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert convolution.fp32_precision == "tf32"
    finally:
        convolution.fp32_precision = before


@pytest.fixture
def random_inception(tmp_path, monkeypatch):
    """Inception's real architecture with random weights in a file."""
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        model = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "inception.pth"
    torch.save(model.state_dict(), path)
    return path


def test_inception_is_read_from_a_path_and_takes_grey_images(digits, random_inception):
    extractor = inception_extractor(str(random_inception))
    assert extractor.distance == "fid"
    images = part(digits.train, 0, 6)
    found = score(images, images, extractor, ["kid", "prc"])
    assert found["precision"] == found["recall"] == 1
    assert np.isfinite(found["kid_mean"])


@pytest.mark.slow
def test_fid_is_named_fid(digits, random_inception):
    extractor = inception_extractor(str(random_inception))
    images = part(digits.train, 0, 8)
    assert abs(score(images, images, extractor, ["fd"])["fid"]) < 1e-2


def test_without_inception_weights_one_line_names_the_alternatives(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(extractors, "load_state_dict_from_url", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torn = tmp_path / "torn.pth"
    torn.write_bytes(b"no weights")
    cases = {None: "could not be downloaded", str(torn): "cannot be read"}
    cases[str(tmp_path / "none.pth")] = "there is no file"
    for weights, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            inception_extractor(weights)
        assert str(caught.value).endswith("use evaluate.extractor=classifier (FD)")
        assert "\n" not in str(caught.value)


class Intruder:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", [inception_extractor, partial(pretrained_extractor, "dinov2")])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_weights_cannot_run_code(tmp_path, load, zipped):
    path, stolen = tmp_path / "weights.pth", tmp_path / "stolen"
    torch.save({"weights": Intruder(stolen)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evaluate.extractor.weights: .* (cannot|does not)"):
        load(str(path))
    assert not stolen.exists()


def gaussian(generator, count, mean, root):
    """Draws (count, D) from a Gaussian with covariance root root^T."""
    noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    return mean + noise @ root.T


def with_exact_moments(draws, mean, root):
    """`draws` moved such that their own mean and covariance are `mean` and root root^T."""
    centred = draws - draws.mean(0)
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(centred.T.cov()), centred.T, upper=False
    ).T
    return mean + whitened @ root.T


def frechet_of_gaussians(mean_1, root_1, mean_2, root_2):
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))."""
    cov_1, cov_2 = (root @ root.T for root in (root_1, root_2))
    cross = scipy.linalg.sqrtm((cov_1 @ cov_2).numpy()).real.trace()
    gap = mean_1 - mean_2
    return (gap @ gap + cov_1.trace() + cov_2.trace() - 2 * cross).item()


@pytest.mark.parametrize("seed", range(3))
def test_fd_of_gaussian_features_and_its_limit_are_the_closed_form(extractor, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, 64, generator=generator, dtype=torch.float64) / 40
    root = torch.randn(64, 64, generator=generator, dtype=torch.float64) / 8
    turned = root + torch.randn(64, 64, generator=generator, dtype=torch.float64) / 40
    root = torch.stack([root, turned])
    exact = frechet_of_gaussians(mean[0], root[0], mean[1], root[1])
    draws = [gaussian(generator, 2000, *one) for one in zip(mean, root, strict=True)]
    fitted = [with_exact_moments(*one) for one in zip(draws, mean, root, strict=True)]

    def measure(generated):
        wanted = ["fd", "fd_by_images"]
        return fidelity(Features(generated, generated), fitted[1], extractor, wanted)[0]

    assert measure(fitted[0])["fd"] == pytest.approx(exact, rel=1e-9)
    found = measure(draws[0])
    points = found["fd_by_images"]
    assert [number for number, _ in points] == [250, 500, 1000, 2000]
    assert points[-1][1] == pytest.approx(found["fd"], rel=1e-12)
    assert all(few > more for (_, few), (_, more) in pairwise(points))
    halves = [measure(half)["fd"] for half in draws[0].split(1000)]
    assert points[2][1] == pytest.approx(sum(halves) / 2)
    slope, limit = np.polyfit([1 / number for number, _ in points], [fd for _, fd in points], 1)
    assert slope > 0
    assert found["fd_infinity"] == pytest.approx(limit)
    assert abs(limit - exact) < abs(found["fd"] - exact) / 3


def test_too_few_images_for_a_line_have_no_limit(extractor):
    features = torch.randn(255, 64, dtype=torch.float64)
    # A half must have 64 images, and twice as many as there are dimensions.
    for dimensions, numbers in {64: [255], 63: [127, 255], 16: [127, 255]}.items():
        own = features[:, :dimensions]
        found = fidelity(Features(own, own), own, extractor, ["fd_by_images"])[0]
        assert [number for number, _ in found["fd_by_images"]] == numbers
        assert (found["fd_infinity"] is None) == (len(numbers) == 1)
