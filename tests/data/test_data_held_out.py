"""Two folders or archives as a pair: all of one to train on, all of the other held out."""

import json
import zipfile

import pytest
import torch

from flowdopr.latents import build_datasets


@pytest.fixture
def pair(write_images, tmp_path):
    train = write_images(tmp_path / "train", {"cat": 5, "dog": 1})
    return train, write_images(tmp_path / "test", {"cat": 2, "dog": 3})


def zipped(folder):
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(folder.rglob("*.png")):
            out.write(path, path.relative_to(folder).as_posix())
    return archive


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_nothing_of_the_first_is_held_out(make_config, pair, kind):
    train, test = (zipped(folder) for folder in pair) if kind == "zip" else pair
    data = build_datasets(make_config(name=kind, root=str(train), held_out_root=str(test)))
    assert data.info.class_names == ("cat", "dog")
    assert (data.info.num_train, data.info.num_held_out) == (6, 5)
    assert data.train.labels.tolist() == [0] * 5 + [1]
    assert data.held_out.labels.tolist() == [0] * 2 + [1] * 3
    alone = build_datasets(make_config(name="folder", root=str(pair[1])))
    for index, (image, label) in zip(alone.train.indices, alone.train, strict=True):
        assert torch.equal(data.held_out[int(index)][0], image)
        assert data.held_out[int(index)][1] == label


def test_the_fingerprint_follows_both(make_config, pair, write_images, tmp_path):
    def fingerprint(train, test):
        config = make_config(name="folder", root=str(train), held_out_root=str(test))
        return build_datasets(config).info.fingerprint

    other = write_images(tmp_path / "other", {"cat": 2, "dog": 2})
    found = {fingerprint(*pair), fingerprint(*reversed(pair)), fingerprint(pair[0], other)}
    assert len(found) == 3


def test_a_pair_that_does_not_fit_is_one_line(make_config, pair, write_images, tmp_path):
    other = write_images(tmp_path / "other", {"cat": 2, "eel": 3})
    flat = write_images(tmp_path / "flat", {"": 3})
    cases = {
        other: "data.held_out_root: the classes in .* only one of them has 'dog'",
        flat: "only one of them has 'cat'",
        tmp_path / "nowhere": "data.held_out_root: there is no folder",
    }
    for place, message in cases.items():
        config = make_config(name="folder", root=str(pair[0]), held_out_root=str(place))
        with pytest.raises(ValueError, match=message) as caught:
            build_datasets(config)
        assert "\n" not in str(caught.value)
    folders = write_images(
        tmp_path / "folders", {str(label): 1 for label in range(11)}
    )  # "10" < "2"
    listed = write_images(tmp_path / "listed", {"": 11})
    labels = [[path.name, label] for label, path in enumerate(sorted(listed.glob("*.png")))]
    (listed / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ValueError, match=r"only one has a dataset\.json"):
        build_datasets(make_config(name="folder", root=str(listed), held_out_root=str(folders)))
    with pytest.raises(ValueError, match=r"held_out_root=x is not used by data.name=digits"):
        make_config(name="digits", held_out_root="x")
    with pytest.raises(ValueError, match=r"held_out_fraction=0.2 is not used beside data.held_out"):
        make_config(name="folder", held_out_root="x", held_out_fraction=0.2)
