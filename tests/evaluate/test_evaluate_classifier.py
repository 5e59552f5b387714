"""The data set's own classifier: good, the same everywhere, trained once, refused where useless."""

from dataclasses import replace

import pytest
import torch

from flowdopr.data import Datasets, ImageTensor
from flowdopr.evaluate import classifier as module
from flowdopr.evaluate.classifier import Classifier, accuracy, load_classifier, trained_classifier


def test_it_reads_digits_and_says_how_well(digits):
    trained = trained_classifier(digits)
    assert trained.held_out_accuracy > 0.97
    assert accuracy(load_classifier(trained.path)[0], digits.held_out) == trained.held_out_accuracy
    assert trained.warning is None


def test_it_is_trained_once(digits, monkeypatch):
    first = trained_classifier(digits)
    monkeypatch.setattr(module, "train_classifier", None)
    assert trained_classifier(digits) == first


def test_training_is_the_same_on_any_thread_count_and_leaves_the_random_state(
    digits, monkeypatch, tmp_path
):
    train = module.train_classifier
    monkeypatch.setattr(module, "train_classifier", lambda model, data: train(model, data, steps=6))
    before, hashes = torch.get_rng_state(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        monkeypatch.setenv("FLOWDOPR_CACHE", str(tmp_path / str(threads)))
        hashes.append(trained_classifier(digits).weights_sha256)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert hashes[0] == hashes[1]
    assert torch.equal(before, torch.get_rng_state())


def test_other_images_get_a_classifier_of_their_own(digits, monkeypatch):
    train = module.train_classifier
    monkeypatch.setattr(module, "train_classifier", lambda model, data: train(model, data, steps=1))
    images = ImageTensor(255 - digits.train.images, digits.train.labels)
    other = Datasets(images, digits.held_out, replace(digits.info, fingerprint="f" * 64))
    assert trained_classifier(other).path != trained_classifier(digits).path


@pytest.mark.parametrize("image_shape", [(1, 4, 4), (1, 8, 8), (3, 32, 32), (3, 100, 64)])
def test_it_takes_images_of_any_size(image_shape):
    images = torch.randint(0, 256, (5, *image_shape), dtype=torch.uint8)
    features, logits = Classifier(image_shape, 7).eval()(images)
    assert features.shape == (5, 64)
    assert logits.shape == (5, 7)


def test_a_data_set_without_classes_is_refused_with_the_remedy(digits):
    flat = Datasets(digits.train, digits.held_out, replace(digits.info, num_classes=0))
    with pytest.raises(
        ValueError, match=r"no classes .*; use evaluate.extractor=imagenet or .*=inception$"
    ):
        trained_classifier(flat)


@pytest.mark.parametrize(("total", "at_most"), [(1999, 1000), (19_999, 10_000), (10, 10), (3, 8)])
def test_images_to_look_at_are_spread_over_all(total, at_most):
    """Images of a folder are sorted by class."""
    found = module._evenly_spaced(total, at_most)
    assert len(found) == min(total, at_most)
    gaps = torch.cat([found, torch.tensor([total])]).diff()
    assert found[0] == 0
    assert gaps.max() - gaps.min() <= 1
