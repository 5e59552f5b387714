"""Files are whole or not there."""

import pytest

from flowdopr.disk import replacing, write_bytes, write_text


def test_a_file_is_replaced_whole(tmp_path):
    write_text(tmp_path / "a.txt", "né\n")
    assert (tmp_path / "a.txt").read_bytes() == "né\n".encode()
    write_bytes(tmp_path / "a.txt", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"new"


def interrupted(path):
    with replacing(path) as part:
        part.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt


def test_what_fails_half_way_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
