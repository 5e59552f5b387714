"""Folders as people keep them: with links, with the wrong kind of root, with files that vanish."""

import zipfile

import pytest

from flowdopr.data.sources import Folder
from flowdopr.latents import build_datasets


def test_linked_classes_and_images_count(make_config, write_images, tmp_path):
    write_images(tmp_path / "elsewhere", {"dog": 3, "": 1})
    folder = write_images(tmp_path / "images", {"cat": 2})
    (folder / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (folder / "cat" / "linked.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (folder / "cat" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "link").symlink_to(folder)
    for root in (folder, tmp_path / "link"):
        data = build_datasets(make_config(name="folder", root=str(root)))
        assert data.info.class_names == ("cat", "dog")
        assert data.info.num_train + data.info.num_held_out == 6


def test_links_in_a_circle_come_to_an_end(write_images, tmp_path):
    write_images(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    assert Folder(tmp_path).names == ["a/0.png", "b/0.png", "b/a/0.png"]


def test_a_root_of_the_other_kind_names_the_setting(make_config, write_images, tmp_path):
    folder = write_images(tmp_path / "images", {"": 2})
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.write(folder / "0.png", "0.png")
    for name, root, remedy in (("zip", folder, "folder"), ("folder", archive, "zip")):
        with pytest.raises(ValueError, match=rf"there is no .*; set data\.name={remedy}"):
            build_datasets(make_config(name=name, root=str(root)))


def test_an_image_that_vanished_is_named_in_one_line(make_config, write_images, tmp_path):
    write_images(tmp_path, {"": 4})
    data = build_datasets(make_config(name="folder", root=str(tmp_path)))
    gone = tmp_path / f"{int(data.train.indices[1])}.png"
    gone.unlink()
    with pytest.raises(ValueError, match=f"cannot read the image '{gone}'") as caught:
        data.train[1]
    assert "\n" not in str(caught.value)
