"""ZIP and tar archives are read in place, and whatever is in them, nothing else is."""

import gzip
import io
import struct
import tarfile
import zipfile
from itertools import islice

import pytest
import torch
from damage import FEW, damage, read_or_refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flowdopr.data import SOURCES, archives, build_loader, sources
from flowdopr.data.labels import find_classes
from flowdopr.latents import build_datasets

PPM = b"P6 2 2 255 " + bytes(12)


def write_tar(path, files):
    """A tar of `files`, (name, content) each; content None is a link to the file's own name."""
    with tarfile.open(path, "w") as out:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
                out.addfile(member)
            else:
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files:
            out.writestr(name, content)
    return path


def png(number):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 255 - number, 0)).save(out, "PNG")
    return out.getvalue()


def write_shards(folder, count, per_shard=5, label="cls"):
    """`count` images of three classes in shards; a label comes before or after its image."""
    folder.mkdir(exist_ok=True)
    for shard in range(-(-count // per_shard)):
        files = []
        for number in range(shard * per_shard, min((shard + 1) * per_shard, count)):
            text = {"cls": f"{number % 3}\n", "json": f'{{"x": 1, "label": {number % 3}}}'}[label]
            pair = [(f"{number:03d}.png", png(number)), (f"{number:03d}.{label}", text.encode())]
            files += pair[:: (-1) ** number]
        write_tar(folder / f"part-{shard:03d}.tar", files)
    return folder


@pytest.mark.parametrize("label", ["cls", "json"])
@pytest.mark.parametrize("form", ["", "/part-{000..004}.tar"])
@pytest.mark.parametrize("most_open", [archives.MOST_OPEN, 2, 0])
def test_shards_are_a_data_set(make_config, tmp_path, monkeypatch, label, form, most_open):
    """A folder or a pattern, with labels of either kind, with many files open or none."""
    monkeypatch.setattr(archives, "MOST_OPEN", most_open)
    root = f"{write_shards(tmp_path / 'shards', 23, label=label)}{form}"
    data = build_datasets(make_config(name="tar", root=root))
    assert data.info.class_names == ("0", "1", "2")
    assert (data.info.num_train, data.info.num_held_out) == (20, 3)
    for part in (data.train, data.held_out):
        for row, number in enumerate(part.indices.tolist()):
            image, y = part[row]
            assert (image[0, 0, 0], y) == (number, number % 3)


def test_batches_of_shards_depend_on_seed_and_step_alone(make_config, tmp_path):
    """Not on the number of processes or workers, nor on where a run was resumed."""
    root = str(write_shards(tmp_path / "shards", 23))

    def take(rank, world_size, workers, start):
        config = make_config(name="tar", root=root, num_workers=workers, horizontal_flip=True)
        places = {"rank": rank, "world_size": world_size, "start_step": start}
        batches = islice(build_loader(config, build_datasets(config).train, **places), 6 - start)
        return [batch.on("cpu") for batch in batches]

    whole = take(0, 1, 0, 0)
    for workers, start in ((0, 3), (2, 2)):
        halves = [take(rank, 2, workers, start) for rank in (0, 1)]
        for first, second, expected in zip(*halves, whole[start:], strict=True):
            for parts, column in zip(zip(first, second, strict=True), expected, strict=True):
                assert torch.equal(torch.cat(parts), column)


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_lead_out_and_what_is_no_file_are_counted(tmp_path, write):
    """The same image under a name that is kept, and under names that are not."""
    bad = ["../a.png", "cat/../../b.png", "..\\c.png"]
    files = [("cat/1.png", PPM), *((name, PPM) for name in bad), ("/dog/2.png", PPM)]
    files += [("x.txt", b"x"), ("cat/1.json", b"{}"), (".hidden.png", PPM)]
    kind = write.__name__.removeprefix("write_")
    root = write(tmp_path / f"a.{kind}", files)
    source = SOURCES[kind](root)
    prefix = "a.tar/" if kind == "tar" else ""
    assert list(source.names) == [f"{prefix}cat/1.png", f"{prefix}dog/2.png"]
    others, leading = source.remarks()
    assert others == "skipped as no images: 1 .json, 1 .txt"
    assert leading.startswith(f"skipped by their names: 3 that lead out of '{root}', the first is")
    assert leading.endswith(f"'{prefix}../a.png'")
    assert find_classes(source).names == ("cat", "dog")
    assert source.read(1) == PPM
    assert list(tmp_path.rglob("*")) == [root]


def test_a_link_in_a_tar_is_not_followed(tmp_path):
    files = [("1.png", PPM), ("2.png", None), ("folder/3.png", None)]
    source = SOURCES["tar"](write_tar(tmp_path / "a.tar", files))
    assert list(source.names) == ["a.tar/1.png"]
    assert source.remarks() == ["skipped as no images: 2 links to nothing"]


def cut(content):
    return content[:2048]  # all files, but not the end


def negative(content):
    """The size of the second file as a negative number, whose end is the first file's header."""
    member = tarfile.TarInfo("b.png")
    member.size = -1024
    return content[:1024] + member.tobuf(tarfile.GNU_FORMAT) + content[1536:]


def overwritten(content):
    return content[:1024] + b"x" * 512 + content[1536:]


@pytest.mark.parametrize(
    ("files", "change", "message"),
    [
        ([("a.png", PPM), ("b.png", PPM)], cut, "no header and no end at byte"),
        ([("a.png", PPM), ("b.png", PPM)], overwritten, "no header and no end at byte 1,024 of"),
        ([("a.png", PPM)], lambda content: content * 200, "no header and no end at byte 1,024 of"),
        ([("a.png", PPM), ("b.png", PPM)], negative, "a negative size at byte 1,024"),
        ([("a.png", PPM), ("dataset.json", b"{}")], None, "'dataset.json' is not read; give each"),
        ([("a.png", PPM)], gzip.compress, "as an uncompressed tar: .*; mend it, or copy or"),
        ([("a.png", PPM), ("a.cls", b"cat")], None, "'a.cls' holds no label: .*JSON"),
        ([("a.png", PPM), ("a.cls", b"-1")], None, "'a.cls' holds no label: .*greater"),
        ([("a.png", PPM), ("a.json", b"[]")], None, "'a.json' holds no label: .*object"),
        ([("a.png", PPM), ("a.json", b'{"label": "c"}')], None, "holds no label: label: .*integer"),
        ([("a.png", PPM), ("a.b.png", PPM), ("a.cls", b"1")], None, "have one label; keep one of"),
        ([("a.png", PPM), ("a.cls", b"1"), ("b.png", PPM)], None, "a.tar:b.png' has no label"),
    ],
)
def test_a_tar_that_cannot_be_used_is_one_line(tmp_path, files, change, message):
    path = write_tar(tmp_path / "a.tar", files)
    path.write_bytes(change(path.read_bytes()) if change else path.read_bytes())
    with pytest.raises(ValueError, match=rf"^data.root: '.*a.tar.*{message}") as caught:
        SOURCES["tar"](path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("root", ["none.tar", "", "part-{000..009}.tar", "{0..1}/part-000.tar"])
def test_shards_that_are_missing_are_named(tmp_path, root):
    write_shards(tmp_path / "shards", 6)
    (tmp_path / "empty").mkdir()
    place = tmp_path / ("shards" if root else "empty") / root
    lost = str(place).replace("{000..009}", "002")
    with pytest.raises(ValueError, match=r"^data.root: there is no tar") as caught:
        SOURCES["tar"](place)
    assert f"'{lost}'; give one, a folder of them, or a pattern" in str(caught.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_zip_is_read_whatever_lies_around_its_files(tmp_path, method):
    """Bytes before the archive, a long extra field, and a name that occurs twice."""
    path = tmp_path / "a.zip"
    path.write_bytes(b"#!/bin/sh\n")
    with zipfile.ZipFile(path, "a", method) as out:
        entry = zipfile.ZipInfo("0.ppm")
        entry.extra = struct.pack("<HH", 0xCAFE, 500) + bytes(500)
        out.writestr(entry, PPM, method)
        with pytest.warns(UserWarning, match="Duplicate name"):
            out.writestr("0.ppm", PPM[:-1] + b"\1")
        out.writestr("1.ppm", PPM)
    source = SOURCES["zip"](path)
    assert [source.read(number) for number in range(2)] == [PPM[:-1] + b"\1", PPM]


def changed(offset, form, value):
    """Change an entry of the archive's directory, where its sizes and flags are."""

    def change(content):
        content = bytearray(content)
        struct.pack_into(form, content, content.index(b"PK\1\2") + offset, value)
        return bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(8, "<H", 1), "it is encrypted; pack the archive anew"),
        (changed(10, "<H", 14), "its compression 14 is not read; pack"),
        (changed(24, "<L", 20), "Bad CRC-32"),  # packs more than it says
        (changed(24, "<L", 2**31), "2,147,483,648 bytes, more than"),
        (changed(20, "<L", 2**31), "its entry in the archive's directory is damaged"),
        (changed(42, "<L", 7), "its header is damaged"),
    ],
)
def test_an_entry_that_lies_is_a_broken_image(make_config, tmp_path, change, message):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name in ("0.ppm", "1.ppm", "2.ppm"):
            out.writestr(name, PPM)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"cannot read the image '{path}:0.ppm' \({message}"):
        build_datasets(make_config(name="zip", root=str(path)))
    data = build_datasets(make_config(name="zip", root=str(path), on_bad_image="skip"))
    assert data.info.num_train + data.info.num_held_out == 2
    assert f"skipped as broken: 1, the first is {path}:0.ppm (" in data.remarks[0]


def test_a_bomb_in_a_zip_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_FILE", 2**20)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("0.png", bytes(2**24))
    content = bytearray(path.read_bytes())
    for size, message in ((2**24, "16,777,216 bytes, more than 1,048,576"), (9, "Bad CRC-32")):
        struct.pack_into("<L", content, content.index(b"PK\1\2") + 24, size)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            SOURCES["zip"](path).read(0)


def read_all(config):
    data = build_datasets(config)
    for part in (data.train, data.held_out):
        for index in range(len(part)):
            part[index]


@FEW
@given(damaged=damage())
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damaged_archives_are_read_or_refused(kind, damaged, make_config, tmp_path):
    files = [(f"{number}.ppm", PPM) for number in range(4)] + [("0.json", b'{"x": "0"}')]
    write = {"zip": write_zip, "tar": write_tar}[kind]
    archive = write(tmp_path / f"a.{kind}", files)
    archive.write_bytes(damaged(archive.read_bytes()))
    read_or_refused(lambda: read_all(make_config(name=kind, root=str(archive))))


@FEW
@given(content=st.binary(max_size=2000))
@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_any_bytes_are_read_or_refused(kind, content, make_config, tmp_path):
    """As an archive, or as all that a folder has: labels and an image."""
    root = tmp_path / "a"
    if kind == "folder":
        root.mkdir(exist_ok=True)
        for name in ("dataset.json", "0.png", "1.png"):
            (root / name).write_bytes(content)
    else:
        root.write_bytes(content)
    for policy in ("error", "skip"):
        config = make_config(name=kind, root=str(root), on_bad_image=policy)
        read_or_refused(lambda config=config: read_all(config))
