"""Galleries: the images that were measured, and the training images that are nearest to them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from flowdopr.evaluate import Gallery, classifier_extractor, evaluate, sample
from flowdopr.evaluate.gallery import REFERENCES_TOGETHER, nearest

FEW = ["evaluate.metrics=[fd]", "evaluate.gallery=3"]


def test_nearest_is_that_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 7, generator=generator)
    reference = torch.randn(REFERENCES_TOGETHER + 50, 7, generator=generator)
    features[0] = reference[-1]
    distances, indices = nearest(features, reference)
    gaps = features.numpy()[:, None] - reference.numpy()[None]
    every = np.sqrt(np.square(gaps.astype(float)).sum(2))
    assert indices.tolist() == every.argmin(1).tolist()
    assert distances.numpy() == pytest.approx(every.min(1), abs=1e-6)
    assert (indices[0], distances[0].item()) == (len(reference) - 1, pytest.approx(0, abs=1e-6))


def test_the_gallery_holds_the_first_images_and_their_nearest_training_images(
    make_run, digits, tmp_path
):
    run = make_run()
    card = evaluate(run.path, FEW)
    gallery = Gallery.read(Gallery.beside(card))
    out = sample(run.path, num=3, out=tmp_path / "drawn")
    drawn = [np.asarray(Image.open(out / f"{number:06d}-{number}.png")) for number in range(3)]
    assert np.array_equal(gallery.images[:, 0].numpy(), drawn)
    assert gallery.labels.tolist() == [0, 1, 2]
    extractor = classifier_extractor(digits)
    own, real, held_out = (
        extractor(images).features
        for images in (gallery.images, digits.train.images, digits.held_out.images)
    )
    every = torch.cdist(own, real)
    assert torch.equal(gallery.nearest, digits.train.images[every.argmin(1)])
    assert gallery.distances.tolist() == pytest.approx(every.min(1).values.tolist())
    typical = torch.cdist(held_out, real).min(1).values.median()
    assert gallery.ratios.tolist() == pytest.approx((every.min(1).values / typical).tolist())
    assert json.loads(card.read_text())["gallery"] == {
        "file": Gallery.beside(card).name,
        "num_images": 3,
        "nearest_ratio": pytest.approx(gallery.ratios.median().item()),
    }


def test_only_a_larger_gallery_is_made_anew(make_run):
    run = make_run()
    card = evaluate(run.path, FEW)
    file = Gallery.beside(card)

    def made(*overrides):
        before = file.stat().st_mtime_ns
        assert evaluate(run.path, [*FEW, *overrides]) == card
        return file.stat().st_mtime_ns != before

    assert not made()
    assert not made("evaluate.gallery=2")
    assert not made("evaluate.gallery=0")
    assert made("evaluate.gallery=4")
    assert made("evaluate.gallery=1000")  # as many as are generated
    assert not made("evaluate.gallery=1000")
    whole = file.read_bytes()
    empty = {"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}
    wrong = [empty, {"images": torch.zeros(3, 2)}, {"x": torch.ones(1)}]
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for damage in (b"", whole[:-9], flipped, *map(save, wrong)):
        file.write_bytes(damage)
        assert made()
    assert len(Gallery.read(file).images) == 3


def test_without_features_a_gallery_has_no_neighbours_and_none_is_made_if_not_wanted(make_run):
    run = make_run(class_conditional=False)
    card = evaluate(run.path, ["evaluate.metrics=[]", "evaluate.gallery=2"])
    gallery = Gallery.read(Gallery.beside(card))
    assert len(gallery.images) == 2
    assert (gallery.labels, gallery.nearest, gallery.ratios) == (None, None, None)
    none = evaluate(run.path, ["evaluate.metrics=[spectrum]", "evaluate.gallery=0"])
    assert not Gallery.beside(none).exists()
    assert "gallery" not in json.loads(none.read_text())
