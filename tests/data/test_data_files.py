"""Folders as people keep them: with links, with the wrong kind of root, with files that vanish."""

import json
import os
import zipfile

import pytest

from flowdopr.data import check_start
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


@pytest.mark.parametrize("target", ["a", ".", "..", "../.."])
def test_a_link_back_up_is_one_line(make_config, write_images, tmp_path, target):
    """Even one above the root, which would lead through everything that lies beside it."""
    folder = write_images(tmp_path / "images", {"a": 1, "b": 1})
    (folder / "a" / "link").symlink_to(folder / target)
    with pytest.raises(
        ValueError, match=r"^data.root: the link '.*a/link' leads back to"
    ) as caught:
        build_datasets(make_config(name="folder", root=str(folder)))
    assert "\n" not in str(caught.value)


def test_links_in_a_circle_and_to_nothing(write_images, tmp_path):
    write_images(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    folder = Folder(tmp_path)
    assert list(folder.names) == ["a/0.png", "b/0.png"]
    assert folder.remarks() == ["skipped as no images: 2 links to nothing"]
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="leads back to"):
        Folder(tmp_path)


def test_names_that_are_no_utf8_are_shown_and_counted(make_config, write_images, tmp_path):
    folder = write_images(tmp_path / "images", {"cat": 3})
    other = write_images(tmp_path / "other", {"": 3})
    name = b"/b\xe9b\xe9\n"  # Latin-1, with a line break
    os.rename(os.fsencode(other), os.fsencode(folder) + name)
    data = build_datasets(make_config(name="folder", root=str(folder)))
    assert data.info.class_names == (r"b\xe9b\xe9\n", "cat")
    assert json.loads(json.dumps(data.info.to_dict()))["num_train"] == 4
    data.summary().encode()
    os.truncate(os.fsencode(folder) + name + b"/1.png", 30)
    with pytest.raises(ValueError, match=r"images/b\\xe9b\\xe9.*1.png' \(") as caught:
        check_start(data)
    assert str(caught.value).isprintable()
    config = make_config(name="folder", root=str(folder), on_bad_image="skip")
    first, again = build_datasets(config), build_datasets(config)  # the second from the cache
    assert first.info == again.info
    assert (first.info.num_train, first.remarks) == (3, again.remarks)


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
