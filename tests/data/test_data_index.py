"""The index of a long list of files: used while it is true, and only then."""

import os
import shutil
import tarfile
import time
import zipfile

import pytest
from damage import FEW, damage
from hypothesis import given

from flowdopr.cli import run_command
from flowdopr.data import SOURCES, listing
from flowdopr.data.listing import Paths
from flowdopr.data.sources import Folder
from flowdopr.disk import cache_folder
from flowdopr.latents import build_datasets

LONG_AGO = time.time_ns() - 10**12


@pytest.fixture(autouse=True)
def _every_list_is_long(monkeypatch, tmp_path):
    monkeypatch.setattr(listing, "INDEXED", 1)
    monkeypatch.setenv("FLOWDOPR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(write_images, tmp_path):
    folder = write_images(tmp_path / "images", {"cat": 3, "dog": 4, "eel": 0})
    (folder / "notes.txt").write_text("")
    return settled(folder)


def settled(root):
    """`root` with all its files, as if they had been written some time ago."""
    for path in [*root.rglob("*"), root]:
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return root


def packed(folder, kind):
    """The folder as a source of another kind."""
    if kind == "folder":
        return folder
    place, files = folder.with_suffix(f".{kind}"), sorted(folder.rglob("*.*"))
    if kind == "zip":
        with zipfile.ZipFile(place, "w") as out:
            for path in files:
                out.write(path, path.relative_to(folder))
    else:
        with tarfile.open(place, "w") as out:
            for path in files:
                out.add(path, path.relative_to(folder))
    return settled(place)


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_indexed_is_not_listed_again(make_config, folder, kind, monkeypatch, capsys):
    config = make_config(name=kind, root=str(packed(folder, kind)))
    first = build_datasets(config)
    monkeypatch.setattr(SOURCES[kind], "_listed", None)  # would fail if it was called
    monkeypatch.setattr(SOURCES[kind], "_crc", None)
    again = build_datasets(config)
    assert again.info == first.info
    assert again.remarks == first.remarks
    assert all((x == y).all() for (x, _), (y, _) in zip(first.train, again.train, strict=True))
    assert capsys.readouterr().err == ""


def add(folder):
    shutil.copy(folder / "cat" / "1.png", folder / "eel" / "1.png")


def remove(folder):
    (folder / "dog" / "1.png").unlink()


def rename(folder):
    (folder / "dog").rename(folder / "hound")


@pytest.mark.parametrize("change", [add, remove, rename])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_change_is_noticed_and_said_on_one_line(folder, kind, change, capsys):
    SOURCES[kind](packed(folder, kind))
    change(folder)
    root = folder if kind == "folder" else packed(folder, kind)
    if kind != "folder":
        os.utime(root)
    found = SOURCES[kind](root)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")]
    prefix = f"{root.name}/" if kind == "tar" else ""
    assert list(found.names) == sorted(prefix + name for name in names)
    assert capsys.readouterr().err == (
        f"{root}: changed since it was indexed; its files are listed again\n"
    )


def test_an_image_that_is_overwritten_is_noticed_when_it_is_read(make_config, folder, capsys):
    """The time of its folder does not tell; `flowdopr check` lists all anew."""
    config = make_config(name="folder", root=str(folder))
    before = build_datasets(config).info
    (folder / "dog" / "0.png").write_bytes((folder / "dog" / "1.png").read_bytes())
    unaware = build_datasets(config)
    assert unaware.info == before
    with pytest.raises(ValueError, match=r"dog/0.png' \(changed since it was listed: flowdopr che"):
        unaware.train.batch(unaware.train.labels.new_tensor(range(len(unaware.train))))
    settled(folder)
    assert run_command(["check", str(folder)]) == 0
    assert build_datasets(config).info.fingerprint != before.fingerprint


def test_what_changed_just_now_is_not_indexed(folder):
    """Another file could come within the same tick of the clock."""
    os.utime(folder / "cat")
    Folder(folder)
    assert not list(cache_folder().glob("index-*"))


@FEW
@given(damaged=damage())
def test_a_damaged_index_is_not_used(damaged, folder):
    expected = list(Folder(folder).names)
    (index,) = cache_folder().glob("index-*")
    index.write_bytes(damaged(index.read_bytes()))
    assert list(Folder(folder).names) == expected


def test_a_cache_that_cannot_be_written_costs_only_time(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FLOWDOPR_CACHE", str(tmp_path / "file" / "cache"))
    assert len(Folder(folder).names) == len(Folder(folder).names) == 7


def test_paths_are_a_list_of_strings():
    names = ["", "a/ä.png", os.fsdecode(b"b\xe9.png"), "漢"]
    paths = Paths.of(names)
    assert list(paths) == names == [paths[number] for number in range(len(names))]
    assert (paths[-1], paths[1:3]) == (names[-1], names[1:3])
    with pytest.raises(IndexError):
        paths[4]
