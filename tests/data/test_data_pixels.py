"""The rules by which a file becomes RGB: transparency, bits, colours, orientation, formats."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from flowdopr.data import check_start
from flowdopr.data.pixels import decode, formats, suffixes
from flowdopr.latents import build_datasets

RED, HALF_RED_ON_WHITE, WHITE = (255, 0, 0), (255, 127, 127), (255, 255, 255)


def stored(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def palette():
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


CASES = {
    "opaque": (Image.new("RGBA", (1, 1), (255, 0, 0, 255)), {}, RED),
    "half": (Image.new("RGBA", (1, 1), (255, 0, 0, 128)), {}, HALF_RED_ON_WHITE),
    "hidden colour": (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), {}, WHITE),
    "grey with alpha": (Image.new("LA", (1, 1), (7, 0)), {}, WHITE),
    "transparent colour": (Image.new("RGB", (1, 1), (255, 0, 0)), {"transparency": RED}, WHITE),
    "transparent grey": (Image.new("L", (1, 1), 7), {"transparency": 7}, WHITE),
    "palette": (palette(), {}, RED),
    "transparent in palette": (palette(), {"transparency": 1}, WHITE),
    "half transparent palette": (palette(), {"transparency": b"\xff\x80"}, HALF_RED_ON_WHITE),
    "one bit": (Image.new("1", (1, 1), 1), {}, WHITE),
    "16-bit grey": (Image.fromarray(np.full((1, 1), 0x7FFF, np.uint16)), {}, (0x7F,) * 3),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pixel_becomes(name):
    image, options, expected = CASES[name]
    assert decode(stored(image, **options)).flatten().tolist() == list(expected)


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_of_16_bits_the_upper_8_count(kind):
    deep = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    if kind == "PPM":
        content = b"P5 6 1 65535\n" + deep.astype(">u2").tobytes()
    else:
        content = stored(Image.fromarray(deep), kind)
    found = decode(content)
    assert found[0].tolist() == found[2].tolist() == [[0, 0, 1, 0x12, 0x80, 0xFF]]


def test_colours_of_print_and_orientation():
    cyan = decode(stored(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF"))
    assert cyan.flatten().tolist() == [0, 255, 255]
    sides = Image.fromarray(np.array([[0, 255, 255]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned a quarter to the left
    assert decode(stored(sides, exif=exif))[0].tolist() == [[255], [255], [0]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"^{mode} pixels have no known range, expected 8 or 16"):
        decode(stored(Image.new(mode, (1, 1)), "TIFF"))


def colours(mode, first, *others):
    return [Image.new(mode, (16, 8), colour) for colour in (first, *others)]


def animated(kind):
    first, *others = colours("RGB", RED, WHITE, (0, 0, 255))
    return stored(first, kind, save_all=True, append_images=others)


def turned(kind):
    """Black above, white below, stored lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("L", (8, 16))
    image.paste(255, (0, 0, 8, 16))
    image.paste(0, (0, 0, 4, 16))
    return stored(image, kind, exif=exif)


NOISE = stored(Image.effect_noise((64, 32), 50), "JPEG")
USED = {
    "animated.gif": (animated("GIF"), RED),
    "animated.png": (animated("PNG"), RED),
    "pages.tif": (animated("TIFF"), RED),
    "cmyk.jpg": (stored(*colours("CMYK", (255, 0, 0, 0)), "JPEG"), (0, 255, 255)),
    "cmyk.tif": (stored(*colours("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "palette.gif": (stored(colours("RGB", RED)[0].quantize(4), "GIF"), RED),
    "deep.png": (stored(Image.fromarray(np.full((8, 16), 0x80FF, np.uint16))), (0x80,) * 3),
    "turned.jpg": (turned("JPEG"), (0, 0, 0)),
    "turned.png": (turned("PNG"), (0, 0, 0)),
}
BROKEN = {
    "cut.jpg": (NOISE[: len(NOISE) // 2], "truncated"),
    "cut.png": (stored(Image.effect_noise((16, 8), 50))[:90], "truncated|broken"),
    "gigantic.png": (stored(Image.new("1", (20_000, 10_000)), compress_level=1), "exceeds limit"),
    "float.tif": (stored(Image.new("F", (16, 8)), "TIFF"), "F pixels have no known range"),
    "empty.webp": (b"", "no image format that Pillow decodes"),
}


@pytest.mark.parametrize("name", USED)
def test_a_file_of_an_odd_kind_is_used_by_its_rule(make_config, tmp_path, name):
    """All of them are 16 pixels wide and 8 high, after turning those that say so."""
    for place in (name, f"2-{name}"):
        (tmp_path / place).write_bytes(USED[name][0])
    data = build_datasets(make_config(name="folder", root=str(tmp_path)))
    assert check_start(data) == []
    image, _ = data.train[0]
    assert image.shape == (3, 8, 16)
    assert np.abs(image[:, 1, 1].numpy().astype(int) - USED[name][1]).max() <= 1  # JPEG rounds


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_used_is_named_and_counted(make_config, tmp_path, name):
    content, reason = BROKEN[name]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(stored(Image.new("RGB", (16, 8))))
    (tmp_path / name).write_bytes(content)
    config = make_config(name="folder", root=str(tmp_path))
    with pytest.raises(ValueError, match=rf"cannot read the image '.*/{name}' \(.*({reason})"):
        check_start(build_datasets(config))
    data = build_datasets(make_config(name="folder", root=str(tmp_path), on_bad_image="skip"))
    assert data.info.num_train + data.info.num_held_out == 3
    (remark,) = data.remarks
    assert remark.startswith(f"skipped as broken: 1, the first is {tmp_path / name} (")


def test_opaque_pixels_are_unchanged():
    pixels = torch.randint(256, (9, 9, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels)
    image.putalpha(255)
    assert np.array_equal(decode(stored(image)).permute(1, 2, 0).numpy(), pixels)


def test_what_pillow_decodes_is_an_image_and_nothing_runs_another_program(make_config, tmp_path):
    written = {"jfif": "JPEG", "jpe": "JPEG", "ppm": "PPM", "tga": "TGA", "jp2": "JPEG2000"}
    written |= {"webp": "WEBP", "bmp": "BMP", "PNG": "PNG", "gif": "GIF", "mpo": "MPO"}
    for suffix, kind in written.items():
        Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}", kind)
    for name in ("a.pdf", "a.eps", "a.h5", "notes.txt", "b.txt", "LICENSE", ".hidden.png"):
        (tmp_path / name).write_bytes(b"%!PS")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "a.png").write_bytes(b"")
    data = build_datasets(make_config(name="folder", root=str(tmp_path)))
    assert data.info.num_train + data.info.num_held_out == len(written)
    assert data.remarks == (
        "skipped as no images: 2 .txt, 1 .eps, 1 .h5, 1 .pdf, 1 without suffix",
    )
    assert not {".eps", ".ps", ".wmf", ".mpg", ".h5"} & suffixes()
    assert "EPS" not in formats()
    with pytest.raises(ValueError, match="no image format that Pillow decodes"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")


def test_a_start_does_not_read_again_what_an_earlier_one_has_read(
    make_config, write_images, tmp_path
):
    """As in a study of many runs; an image that was written since is read."""
    image = write_images(tmp_path / "images", {"": 6}) / "3.png"
    config = make_config(name="folder", root=str(image.parent))
    assert check_start(build_datasets(config), seconds=0) != []  # no time to read any
    assert check_start(build_datasets(config)) == []
    times, size = image.stat(), image.stat().st_size
    image.write_bytes(bytes(size))
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert check_start(build_datasets(config)) == []
    image.touch()
    with pytest.raises(ValueError, match=r"3\.png"):
        check_start(build_datasets(config))
