"""Classes come from dataset.json or from folders, and nothing else is taken for one."""

import json
import zipfile

import pytest

from flowdopr.data.archives import Archive
from flowdopr.data.labels import find_classes
from flowdopr.data.sources import Folder
from flowdopr.latents import build_datasets

PNG = b"not opened here"


@pytest.fixture(params=["folder", "zip"])
def make_source(request, tmp_path):
    """`make_source({path: bytes})` -> a folder or archive of these files."""

    def make(files, root="images"):
        if request.param == "zip":
            with zipfile.ZipFile(tmp_path / f"{root}.zip", "w") as out:
                for path, content in files.items():
                    out.writestr(path, content)
            return Archive(tmp_path / f"{root}.zip")
        for path, content in files.items():
            (tmp_path / root / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / root / path).write_bytes(content)
        return Folder(tmp_path / root)

    return make


def edm(labels, prefix="", count=6):
    """The files of an EDM data set with `labels(name, number)`, a list, or any other content."""
    names = [f"{number // 2:05d}/img{number:08d}.png" for number in range(count)]
    if callable(labels):
        labels = [[name, labels(number)] for number, name in enumerate(names)]
    content = labels if isinstance(labels, bytes) else json.dumps({"labels": labels}).encode()
    return {prefix + name: PNG for name in names} | {f"{prefix}dataset.json": content}


@pytest.mark.parametrize("prefix", ["", "ffhq/"])
def test_labels_are_those_of_dataset_json(make_source, prefix):
    source = make_source(edm(lambda number: (number * 2) % 5, prefix))
    found = find_classes(source)
    assert found.labels.tolist() == [0, 2, 4, 1, 3, 0]
    assert found.names == ("0", "1", "2", "3", "4")
    assert found.remarks == (f"classes as in '{source.where(prefix + 'dataset.json')}'",)
    assert source.remarks() == []


@pytest.mark.parametrize("files", [edm(None), {k: v for k, v in edm(None).items() if "img" in k}])
def test_chunks_without_labels_are_no_classes(make_source, files):
    found = find_classes(make_source(files))
    assert (found.labels.tolist(), found.names) == ([0] * 6, ())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "object"),
        (b"{}", "labels: Field required"),
        (b"\xff\xfe", "JSON"),
        (b'{"labels": [["00000/img00000000.png"]]}', "labels.0.1: Field required"),
        (b'{"labels": [["00000/img00000000.png", 0.5]]}', "labels.0.1: .* integer"),
        (b'{"labels": [["00000/img00000000.png", -1]]}', "labels.0.1: .* greater"),
        (b'{"labels": [["00000/img00000000.png", 3]]}', "'00000/img00000001.png' has none"),
        (b'{"labels": [["00000/img00000007.png", 3]]}', "no image '00000/img00000007.png'"),
        (b'{"labels": []}', "has none"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_one_line(make_source, content, reason):
    source = make_source(edm(content))
    with pytest.raises(
        ValueError, match=rf"^data.root: '.*dataset.json' does .*{reason}"
    ) as caught:
        find_classes(source)
    assert str(caught.value).isprintable()


def test_the_fingerprint_follows_dataset_json(make_config, write_images, tmp_path):
    folder = write_images(tmp_path, {"": 4})
    seen = set()
    for labels in (None, [0, 1, 0, 1], [1, 0, 0, 1]):
        pairs = labels and [[f"{number}.png", label] for number, label in enumerate(labels)]
        (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
        info = build_datasets(make_config(name="folder", root=str(folder))).info
        assert info.num_classes == (2 if labels else 0)
        seen.add(info.fingerprint)
    (folder / "dataset.json").unlink()
    seen.add(build_datasets(make_config(name="folder", root=str(folder))).info.fingerprint)
    assert len(seen) == 4


def test_two_sets_with_dataset_json_share_their_numbers(make_config, write_images, tmp_path):
    for name, labels in (("train", [0, 2]), ("held_out", [1, 0])):
        folder = write_images(tmp_path / name, {"": 2})
        pairs = [[f"{number}.png", label] for number, label in enumerate(labels)]
        (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    roots = {"root": f"{tmp_path}/train", "held_out_root": f"{tmp_path}/held_out"}
    data = build_datasets(make_config(name="folder", **roots))
    assert data.info.class_names == ("0", "1", "2")
    assert (data.train.labels.tolist(), data.held_out.labels.tolist()) == ([0, 2], [1, 0])


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (["train", "val"], "train", "val"),
        (["Test", "Train", "validation"], "Train", "validation"),
        (["test", "valid"], "valid", "test"),
    ],
)
def test_parts_of_a_data_set_are_no_classes(make_source, names, first, second):
    source = make_source({f"set/{name}/{kind}/0.png": PNG for name in names for kind in "ab"})
    remedy = f"data.root=.*set/{first} and data.held_out_root=.*set/{second}$"
    if isinstance(source, Archive):
        remedy = rf"make an archive of each, for data.root \('{first}'\) and data.held_out_root$"
    with pytest.raises(ValueError, match=rf"^data.root: '{first}' and '{second}' in .*{remedy}"):
        find_classes(source)


def test_parts_that_each_have_a_dataset_json_are_refused_too(make_source):
    with pytest.raises(ValueError, match=r"'train' and 'test' in .* are parts of a data set"):
        find_classes(make_source(edm(None, "train/") | edm(None, "test/")))


def test_folders_without_images_are_named(make_source):
    source = make_source({f"{name}/0.png": PNG for name in "ab"} | {"c/0.heic": PNG})
    found = find_classes(source)
    assert found.names == ("a", "b")
    if isinstance(source, Folder):  # archives need not list folders
        assert found.remarks == ("without an image: c",)
    assert source.remarks() == ["skipped as no images: 1 .heic"]


def test_archives_from_windows_and_with_dots_keep_their_classes(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        for name in ("set\\cat\\1.png", "./set/dog/1.png", "/set/dog/2.png"):
            out.writestr(name, PNG)
    source = Archive(tmp_path / "a.zip")
    found = find_classes(source)
    assert (found.labels.tolist(), found.names) == ([0, 1, 1], ("cat", "dog"))
    assert list(source.names) == ["set/cat/1.png", "set/dog/1.png", "set/dog/2.png"]
    assert source.read(0) == PNG
