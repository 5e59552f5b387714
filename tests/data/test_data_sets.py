"""Each data set is read right, split once and for all, and known by its fingerprint."""

import gzip
import hashlib
import pickle
import socket
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets as torchvision_sets

from flowdopr.data import DatasetInfo, from_uint8, to_uint8
from flowdopr.data.datasets import split
from flowdopr.data.transforms import Fit
from flowdopr.disk import parse_json, to_json
from flowdopr.latents import build_datasets


def write_idx(path, array):
    """MNIST's own file format."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


def write_mnist(folder):
    """Twelve training and four test images under `folder`; returns their pixels."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    pixels = {}
    for part, count in (("train", 12), ("t10k", 4)):
        pixels[part] = noise.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels[part])
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return pixels


@pytest.fixture
def mnist(tmp_path):
    return write_mnist(tmp_path)


def test_the_uint8_rule_is_exact_both_ways_and_clamps():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert to_uint8(torch.tensor([-1.5, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_digits_are_the_real_images_split_for_good(make_config):
    data = build_datasets(make_config(name="digits"))
    assert data.info.image_shape == (1, 8, 8)
    assert (data.info.num_classes, data.info.class_names[3]) == (10, "3")
    assert data.info.num_train + data.info.num_held_out == 1797
    pixels, target = load_digits(return_X_y=True)
    real = {
        ((row * 255 / 16).round().astype(np.uint8).tobytes(), t)
        for row, t in zip(pixels, target, strict=True)
    }
    parts = [{(x.numpy().tobytes(), y) for x, y in part} for part in (data.train, data.held_out)]
    assert parts[0] | parts[1] == real
    assert not parts[0] & parts[1]
    # A different split would silently change every published number.
    assert data.info.fingerprint.startswith("1daee8a75e46fa75")


def test_the_split_is_stratified_and_leaves_no_class_empty():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 2)
    train, held_out = split(labels, 0.1, ("a", "b", "c"))
    assert labels[held_out].bincount().tolist() == [5, 2, 1]
    assert labels[train].bincount().tolist() == [45, 18, 1]
    assert split(labels[:2], 0.99, ())[0].numel() == 1


def test_info_survives_json(make_config):
    info = build_datasets(make_config(name="digits")).info
    assert parse_json(DatasetInfo, to_json(info.to_dict())) == info


def test_mnist_is_read_by_torchvision_with_its_own_test_split(make_config, tmp_path, mnist):
    data = build_datasets(make_config(name="mnist", root=str(tmp_path)))
    assert data.info.image_shape == (1, 28, 28)
    assert (data.info.num_train, data.info.num_held_out) == (12, 4)
    image, label = data.held_out[3]
    assert np.array_equal(image[0].numpy(), mnist["t10k"][3])
    assert label == 3


def test_resizing_and_colour_change_shape_and_fingerprint(make_config, tmp_path, mnist):
    settings = [{}, {"image_size": 32}, {"image_size": 16}, {"channels": 3}]
    infos = [
        build_datasets(make_config(name="mnist", root=str(tmp_path), **extra)).info
        for extra in settings
    ]
    shapes = [(1, 28, 28), (1, 32, 32), (1, 16, 16), (3, 28, 28)]
    assert [info.image_shape for info in infos] == shapes
    assert len({info.fingerprint for info in infos}) == len(infos)


@pytest.mark.parametrize(
    ("name", "label_key"), [("cifar10", "labels"), ("cifar100", "fine_labels")]
)
def test_cifar_is_read_from_its_python_2_pickles(
    make_config, tmp_path, monkeypatch, name, label_key
):
    """Real CIFAR pickles give NumPy's dtype 0 and 1 for False and True, and NumPy warns of it."""
    reader = {"cifar10": torchvision_sets.CIFAR10, "cifar100": torchvision_sets.CIFAR100}[name]
    monkeypatch.setattr(reader, "train_list", [["train", None]])
    monkeypatch.setattr(reader, "test_list", [["test", None]])
    folder = tmp_path / reader.base_folder
    folder.mkdir()
    names = [f"class{number}" for number in range(10)]
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: names}))
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": None})
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    for part in ("train", "test"):
        text = pickle.dumps({"data": pixels, label_key: list(range(6))}, protocol=2)
        assert b"\x89\x88\x87" in text
        (folder / part).write_bytes(text.replace(b"\x89\x88\x87", b"K\x00K\x01\x87"))
    data = build_datasets(make_config(name=name, root=str(tmp_path)))
    assert data.info.image_shape == (3, 32, 32)
    assert np.array_equal(data.train[5][0].numpy(), pixels[5].reshape(3, 32, 32))
    for content in (b"cut", pickle.dumps([]), pickle.dumps({"data": pixels, label_key: [0]})):
        (folder / "train").write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^data.root: {name} in '{tmp_path}' is damaged"
        ) as e:
            build_datasets(make_config(name=name, root=str(tmp_path)))
        assert str(e.value).isprintable()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("images", lambda old: old[:-1]),
        ("images", lambda old: old[:3]),
        ("labels", lambda old: old[:7] + b"\x0b" + old[8:-1]),
        ("labels", lambda old: old[:-1] + b"\x0a"),
    ],
)
def test_a_damaged_mnist_is_one_line(make_config, tmp_path, mnist, file, content):
    """Cut pixels, a cut head, a label too few, and a label beyond the classes."""
    (path,) = (tmp_path / "MNIST" / "raw").glob(f"train-{file}*")
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"^data.root: mnist in .* is damaged \(.+\); delete it"
    ) as e:
        build_datasets(make_config(name="mnist", root=str(tmp_path)))
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    ("name", "download", "message"),
    [
        ("mnist", True, r"could not be downloaded \(.*\); put train-images-idx3-ubyte.gz, .* into"),
        ("mnist", False, r"data.download is false; put .*gz into '.*sets/MNIST/raw', and set data"),
        ("fashion_mnist", True, r"could not be .*gz into '.*sets/FashionMNIST/raw', or give the"),
        ("cifar10", True, r"could not be .*; put cifar-10-python.tar.gz into '.*sets', or give"),
    ],
)
def test_a_missing_torchvision_set_names_folder_and_remedy(
    make_config, tmp_path, monkeypatch, name, download, message
):
    """Without a network, and where a download is forbidden."""
    for reader in (torchvision_sets.MNIST, torchvision_sets.FashionMNIST):
        monkeypatch.setattr(reader, "mirrors", [f"file://{tmp_path}/nowhere/"])
    monkeypatch.setattr(torchvision_sets.CIFAR10, "url", f"file://{tmp_path}/nowhere.tar.gz")
    config = make_config(name=name, root=str(tmp_path / "sets"), download=download)
    with pytest.raises(
        ValueError, match=rf"^data.root: {name} is not in '.*sets' and {message}"
    ) as e:
        build_datasets(config)
    assert str(e.value).isprintable()


def test_a_download_of_other_bytes_is_refused(make_config, tmp_path, monkeypatch, mnist):
    """torchvision knows the checksum of each file; nothing of a wrong one is read."""
    served, raw = tmp_path / "served", tmp_path / "sets" / "MNIST" / "raw"
    served.mkdir()
    for path in (tmp_path / "MNIST" / "raw").iterdir():
        (served / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(torchvision_sets.MNIST, "mirrors", [f"file://{served}/"])
    config = make_config(name="mnist", root=str(tmp_path / "sets"))
    for _ in range(2):  # what came is not taken for downloaded the second time
        with pytest.raises(ValueError, match=r"^data.root: mnist is not in .* could not be downl"):
            build_datasets(config)
    assert not list(raw.glob("*-ubyte"))


@pytest.mark.parametrize("settings", [{"name": "mnist", "download": False}, {"name": "folder"}])
def test_without_a_download_no_network_is_used(make_config, tmp_path, monkeypatch, settings):
    def refused(*arguments):
        raise AssertionError("a socket was connected")

    monkeypatch.setattr(socket.socket, "connect", refused)
    with pytest.raises(ValueError, match=r"^data.root: "):
        build_datasets(make_config(root=str(tmp_path / "nothing"), **settings))


def test_archives_that_were_put_there_by_hand_are_unpacked(
    make_config, tmp_path, monkeypatch, mnist
):
    """As the message about a failed download says: nothing is asked of the network then."""
    raw, sums = tmp_path / "MNIST" / "raw", []
    for path in sorted(raw.iterdir()):
        packed = raw / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        sums.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
        path.unlink()
    monkeypatch.setattr(torchvision_sets.MNIST, "resources", sums)
    monkeypatch.setattr(torchvision_sets.MNIST, "mirrors", [f"file://{tmp_path}/nowhere/"])
    data = build_datasets(make_config(name="mnist", root=str(tmp_path)))
    assert np.array_equal(data.held_out[3][0][0].numpy(), mnist["t10k"][3])


def make_zip(folder, archive, prefix=""):
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted(folder.rglob("*.png")):
            out.write(path, prefix + path.relative_to(folder).as_posix())
    return archive


@pytest.mark.parametrize("prefix", ["", "images/train/"])
def test_a_zip_holds_what_its_folder_holds(make_config, write_images, tmp_path, prefix):
    folder = write_images(tmp_path / "plain", {"cat": 5, "dog": 4})
    archive = make_zip(folder, tmp_path / "images.zip", prefix)
    from_folder = build_datasets(make_config(name="folder", root=str(folder)))
    from_zip = build_datasets(make_config(name="zip", root=str(archive), num_workers=2))
    assert from_zip.info.class_names == ("cat", "dog")
    assert from_zip.info.num_held_out == 2
    for part in ("train", "held_out"):
        for (left, y_left), (right, y_right) in zip(
            getattr(from_folder, part), getattr(from_zip, part), strict=True
        ):
            assert torch.equal(left, right)
            assert y_left == y_right
    assert len(pickle.loads(pickle.dumps(from_zip.train))[0][0]) == 3


def test_a_flat_folder_has_no_classes(make_config, write_images, tmp_path):
    write_images(tmp_path, {"": 5})
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    info = build_datasets(make_config(name="folder", root=str(tmp_path))).info
    assert (info.num_classes, info.class_names, info.num_train + info.num_held_out) == (0, (), 5)


def test_images_of_all_kinds_come_to_one_shape(make_config, tmp_path):
    red = Image.new("RGB", (20, 12), (255, 0, 0))
    for number, mode in enumerate(["RGB", "RGBA", "L", "P", "CMYK"]):
        red.convert(mode).save(tmp_path / f"{number}.tif")
    for channels in (1, 3):
        config = make_config(name="folder", root=str(tmp_path), image_size=6, channels=channels)
        data = build_datasets(config)
        shapes = {tuple(x.shape) for part in (data.train, data.held_out) for x, _ in part}
        assert shapes == {(channels, 6, 6)}


def test_folder_fingerprints_follow_every_change(make_config, write_images, tmp_path):
    write_images(tmp_path, {"": 4})

    def fingerprint(**extra):
        return build_datasets(
            make_config(name="folder", root=str(tmp_path), **extra)
        ).info.fingerprint

    seen = [fingerprint(), fingerprint(image_size=4), fingerprint(held_out_fraction=0.5)]
    assert fingerprint() == seen[0]
    (tmp_path / "0.png").rename(tmp_path / "4.png")
    seen.append(fingerprint())
    content = bytearray((tmp_path / "2.png").read_bytes())
    content[-20] ^= 1  # same name, same size
    (tmp_path / "2.png").write_bytes(content)
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "there is no folder"),
        ({"cat": 2, "": 1}, "'.*0.png' lies beside class folders"),
        ({"cat": 2, "dog": 1}, "class 'dog' has 1 image; at least 2"),
        ({"": 1}, "the data set has 1 image; at least 2"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(
    make_config, write_images, tmp_path, counts, message
):
    folder = write_images(tmp_path / "images", counts)
    with pytest.raises(ValueError, match=f"^data.root: .*{message}") as caught:
        build_datasets(make_config(name="folder", root=str(folder)))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_and_a_file_that_is_no_zip_say_so(make_config, tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        build_datasets(make_config(name="folder", root=str(tmp_path)))
    (tmp_path / "images.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as a ZIP"):
        build_datasets(make_config(name="zip", root=str(tmp_path / "images.zip")))
    with pytest.raises(ValueError, match=r"there is no ZIP file .*; give the archive"):
        build_datasets(make_config(name="zip", root=str(tmp_path / "none.zip")))


def test_other_sizes_deep_pixels_and_cut_files_name_the_file(make_config, write_images, tmp_path):
    write_images(tmp_path, {"": 1})
    write_images(tmp_path / "z", {"": 1}, size=9)
    (tmp_path / "z" / "0.png").rename(tmp_path / "other.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "deep.tif")
    data = build_datasets(make_config(name="folder", root=str(tmp_path)))
    said = {}
    for part in (data.train, data.held_out):
        for index in range(len(part)):
            try:
                part[index]
            except ValueError as error:
                said[str(error).split("'")[1].rsplit("/")[-1]] = str(error)
    assert sorted(said) == ["deep.tif", "other.png", "short.png"]
    assert "has 9x9 pixels, the others 8x8; set data.image_size" in said["other.png"]
    assert "F pixels have no known range, expected 8 or 16 bits" in said["deep.tif"]
    assert not any("\n" in line for line in said.values())


@pytest.mark.parametrize("channels", [1, 3])
def test_adm_halves_by_the_mean_of_four_pixels(channels):
    """At twice or four times the size no interpolation is left: means of two columns, then of two
    rows, rounded each time."""
    image = torch.randint(256, (channels, 32, 32), dtype=torch.uint8)
    expected = image.double()
    for size in (16, 8):
        for window in ((1, 2), (2, 1)):
            expected = (torch.nn.functional.avg_pool2d(expected, window) + 0.5).floor()
        assert torch.equal(Fit(size, channels, "adm")(image), expected.to(torch.uint8))


@pytest.mark.parametrize("sides", [(41, 30), (30, 47), (16, 19), (9, 12)])
def test_adm_interpolates_and_crops_as_published(sides):
    """The crop of a side that is odd too long begins at the smaller offset; enlarging works."""
    width, height = sides
    across = torch.linspace(0, 255, width).expand(3, height, width).to(torch.uint8)
    size = 8 if min(sides) > 10 else 10
    out = Fit(size, 3, "adm")(across)
    assert out.shape == (3, size, size)
    halvings = 0
    while min(width, height) >= 2 * size:
        width, height, halvings = width // 2, height // 2, halvings + 1
    scale = size / min(width, height)
    first = (round(width * scale) - size) // 2
    # Positions of the kept columns in the original image, of which the pixels are a ramp.
    columns = (torch.arange(size) + first + 0.5) * sides[0] / round(width * scale)
    expected = ((columns - 0.5) * 255 / (sides[0] - 1)).clamp(0, 255)
    assert (out[0, 0].double() - expected).abs().max() < 255 / sides[0]


def test_adm_is_a_setting_of_folders_alone(make_config, write_images, tmp_path):
    write_images(tmp_path, {"": 4}, size=9)
    options = {"name": "folder", "root": str(tmp_path), "image_size": 4}
    adm, plain = (build_datasets(make_config(**options, resize=r)) for r in ("adm", "bilinear"))
    assert adm.info.image_shape == plain.info.image_shape == (3, 4, 4)
    assert adm.info.fingerprint != plain.info.fingerprint
    assert plain.info.fingerprint == build_datasets(make_config(**options)).info.fingerprint
    for wrong in ({"name": "digits", "image_size": 4}, {"name": "folder", "root": str(tmp_path)}):
        with pytest.raises(ValueError, match=r"data\.resize"):
            make_config(**wrong, resize="adm")
