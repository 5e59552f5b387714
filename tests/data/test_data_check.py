"""Broken images are found before training meets them, or left out, everywhere the same."""

import io
import os
import shutil
import zipfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowdopr.cli import run_command
from flowdopr.data import build_loader, check_start
from flowdopr.data.sources import Folder
from flowdopr.disk import cache_folder
from flowdopr.latents import build_datasets

CONFIGS = Path(__file__).parents[2] / "configs"
WHOLE = io.BytesIO()
Image.effect_noise((8, 8), 50).save(WHOLE, "PNG")
BROKEN = {
    "cut.png": WHOLE.getvalue()[:70],
    "empty.jpg": b"",
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.fixture
def folder(write_images, tmp_path):
    """Twelve images of two classes and three broken ones, and the same without the broken."""
    whole = write_images(tmp_path / "whole", {"cat": 7, "dog": 5})
    shutil.copytree(whole, tmp_path / "images")
    for name, content in BROKEN.items():
        (tmp_path / "images" / "dog" / name).write_bytes(content)
    return tmp_path / "images"


@pytest.fixture(params=["folder", "zip", "tar"])
def roots(request, folder, tmp_path):
    """The kind of the data set, and its roots with and without the broken images."""
    pair = [folder, tmp_path / "whole"]
    if request.param != "folder":
        pair = [shutil.make_archive(str(path), request.param, path) for path in pair]
    return request.param, *map(str, pair)


def test_skipping_is_as_if_the_broken_images_were_not_there(make_config, roots):
    """The same counts, split and fingerprint, and the same batches in any process and epoch."""
    kind, root, whole = roots
    skipping = make_config(name=kind, root=root, on_bad_image="skip", num_workers=2)
    found, expected = build_datasets(skipping), build_datasets(make_config(name=kind, root=whole))
    if kind == "tar":  # the name of the archive is part of the fingerprint
        found, expected = (
            replace(d, info=replace(d.info, fingerprint="")) for d in (found, expected)
        )
    assert found.info == expected.info
    (remark,) = found.remarks
    assert "skipped as broken: 3, the first is" in remark
    assert "dog/cut.png (" in remark
    halves = [build_loader(skipping, found.train, rank=rank, world_size=2) for rank in (0, 1)]
    plain = build_loader(make_config(name=kind, root=whole), expected.train)
    for *parts, batch in islice(zip(*halves, plain, strict=True), 5):  # three epochs
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)


def test_the_decision_is_remembered_until_a_file_changes(make_config, folder, monkeypatch):
    monkeypatch.setenv("FLOWDOPR_CACHE", str(folder.parent / "cache"))
    config = make_config(name="folder", root=str(folder), on_bad_image="skip")
    first = build_datasets(config)
    with monkeypatch.context() as patched:
        patched.setattr("flowdopr.data.check._faults", None)  # would fail if anything was decoded
        assert build_datasets(config).info == first.info
    (kept,) = cache_folder().glob("broken-*.json")
    for damaged in ("[1]", "{", '{"cut.png": 1}'):
        kept.write_text(damaged)
        assert build_datasets(config).info == first.info
    whole = WHOLE.getvalue()
    (folder / "dog" / "cut.png").write_bytes(whole)
    os.truncate(folder / "cat" / "3.png", 60)
    repaired = build_datasets(config)
    assert repaired.info.num_train + repaired.info.num_held_out == 12
    assert repaired.info.fingerprint != first.info.fingerprint


def test_an_image_that_memory_lacks_is_not_skipped(make_config, folder, monkeypatch):
    def decode(image, sixteen):
        raise MemoryError

    config = make_config(name="folder", root=str(folder), on_bad_image="skip")
    with monkeypatch.context() as patched:
        patched.setattr("flowdopr.data.pixels._eight_bits", decode)
        with pytest.raises(ValueError, match=r"png' \(out of memory\); free memory, or remove it"):
            build_datasets(config)
    assert "skipped as broken: 3" in build_datasets(config).remarks[0]


def test_a_file_that_cannot_be_read_is_not_skipped(make_config, folder, monkeypatch):
    """A network disk may fail once; the data set must not depend on that."""
    config = make_config(name="folder", root=str(folder), on_bad_image="skip")
    real = Folder._bytes

    def read(source, path, place):
        if path == "cat/2.png":
            raise TimeoutError(110, "Connection timed out")
        return real(source, path, place)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "_bytes", read)
        patched.setattr("flowdopr.data.sources.CHECKSUM_LIMIT", 0)
        for _ in range(2):  # and nothing is cached
            with pytest.raises(ValueError, match=r"cat/2.png' \(Connection timed out\); put it"):
                build_datasets(config)
    assert "3" in build_datasets(config).remarks[0]


def test_training_looks_at_the_images_first_for_some_seconds(make_config, write_images, tmp_path):
    config = make_config(name="folder", root=str(write_images(tmp_path, {"": 600})))
    data = build_datasets(config)
    unchecked, held_out = check_start(data, seconds=1e-9)
    assert unchecked.startswith("0 of 540 images in")
    assert f"flowdopr check {tmp_path} decodes all" in held_out
    assert run_command(["check", str(tmp_path)]) == 0
    assert check_start(data, seconds=1e-9) == []  # as all were decoded before
    for name in ("7.png", "8.png"):
        os.truncate(tmp_path / name, 60)
    several = r"; so it is with 2 of the 540 images"
    with pytest.raises(ValueError, match=rf"[78].png' \(changed since it was listed: .*{several}"):
        check_start(data)
    with pytest.raises(ValueError, match=rf"[78].png' \((?!changed).*{several}"):
        check_start(build_datasets(config))
    write_images(tmp_path, {"": 9}, size=9)
    with pytest.raises(
        ValueError, match=r"has \dx\d pixels, the others \dx\d; set data.image_size"
    ):
        check_start(build_datasets(config))


def test_the_command_lists_what_is_broken(roots, folder, tmp_path, capsys):
    kind, root, whole = roots
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{name: {kind}, root: {whole}}}\n")
    assert run_command(["check", root]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split(": ")[0].rsplit("/")[-1] for line in lines] == sorted(BROKEN)
    assert lines[1].endswith("empty.jpg: no image format that Pillow decodes")
    assert f"{root}: 3 of 15 images are broken" in err
    assert run_command(["check", str(config)]) == 0
    assert capsys.readouterr().out == ""
    assert run_command(["check", str(config), f"data.held_out_root={root}"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such config file"),
        ([str(Path(__file__).parent)], "data' holds no image that Pillow reads"),
        ([f"{CONFIGS}/quickstart.yaml"], "data.name=digits has no files that are checked"),
        ([str(CONFIGS), "data.root=x"], "configs' is no config to change"),
    ],
)
def test_what_cannot_be_checked_is_one_line(arguments, message, capsys):
    assert run_command(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_shards_is_checked_as_such(folder, tmp_path, capsys):
    """But not a folder of images in which an archive lies, too."""
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.make_archive(str(shards / "0"), "tar", folder)
    assert run_command(["check", str(shards)]) == 1
    assert "3 of 15 images are broken" in capsys.readouterr().err
    shutil.copytree(tmp_path / "whole", shards, dirs_exist_ok=True)
    assert run_command(["check", str(shards)]) == 0
    assert "0 of 12 images are broken; skipped as no images: 1 .tar" in capsys.readouterr().err


def test_an_archive_with_damaged_bytes_is_listed(folder, tmp_path, capsys):
    """The archive's own checksum tells what no decoder would notice."""
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("0.ppm", b"P6 2 2 255 " + bytes(12))
        out.writestr("1.ppm", b"P6 2 2 255 " + bytes(12))
    content = bytearray(archive.read_bytes())
    content[content.index(b"P6 ") + 15] ^= 1
    archive.write_bytes(content)
    assert run_command(["check", str(archive)]) == 1
    assert capsys.readouterr().out.startswith(f"{archive}:0.ppm: Bad CRC-32")
