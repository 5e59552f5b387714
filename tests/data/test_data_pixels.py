"""The rules by which a file becomes RGB: transparency, bits, colours, orientation, formats."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

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
