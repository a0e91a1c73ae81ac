"""Pictures of every kind: modes, orientations, damaged files, and what is refused."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from hybridkv.model import InputError
from hybridkv.model.pictures import open_image, short
from tests import fuzz_pictures

FIELD = Path(__file__).parent / "field"


def picture(width=112, height=84, seed=0, mode="RGB"):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(
        mode
    )


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.mode == other.mode == "RGB" and one.tobytes() == other.tobytes()


def test_transparency_lies_over_white(tmp_path):
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert open_image(clear).getpixel((5, 5)) == (255, 255, 255)
    assert open_image(clear.convert("LA").convert("La")).getpixel((5, 5)) == (255, 255, 255)
    palette = Image.new("P", (40, 40), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    assert open_image(tmp_path / "p.png").getpixel((5, 5)) == (255, 255, 255)
    palette.putpalette([255, 0, 0, 0], "RGBA")  # the palette's colours are transparent themselves
    assert open_image(palette).getpixel((5, 5)) == (255, 255, 255)
    assert open_image(Image.new("LA", (9, 9), (0, 255))).getpixel((5, 5)) == (0, 0, 0)


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((5, 5)) == (128, 128, 128)
    Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16)).save(tmp_path / "clear.png", transparency=32768)
    assert open_image(tmp_path / "clear.png").getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_sixteen_bits_in_either_byte_order(mode):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = open_image(Image.fromarray(values).convert("I").convert(mode))
    assert np.array_equal(np.asarray(got), np.repeat((values // 256)[..., None], 3, axis=2))


def test_a_big_endian_tiff_reads_as_the_little_endian_one():
    little, big = open_image(FIELD / "i16.tif"), open_image(FIELD / "i16be.tif")
    assert same(little, big) and len(set(little.tobytes())) > 10


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    assert same(open_image(picture(mode=mode)), picture(mode=mode).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_orientation_is_applied_as_pillow_does(tmp_path, orientation, kind):
    path, exif = tmp_path / f"turned.{kind}", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture(112, 56).save(path, exif=exif)
    got = open_image(path)
    assert got.size == ((56, 112) if orientation > 4 else (112, 56))
    assert same(got, ImageOps.exif_transpose(Image.open(path)))
    with Image.open(path) as given:  # a Pillow image is read as its file is
        assert same(open_image(given), got)


@pytest.mark.parametrize("name", ["exif6.jpg", "exif_bad_ascii_as_float.jpg", "exif_xres_as_ascii.jpg"])
def test_damaged_exif_keeps_its_orientation(name):
    with Image.open(FIELD / name) as image:
        stored = np.asarray(image)
    assert np.array_equal(np.asarray(open_image(FIELD / name)), np.rot90(stored, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_exif_block_that_can_not_be_read_says_nothing(tmp_path):
    picture().save(tmp_path / "a.png")
    plain, whole = open_image(tmp_path / "a.png"), Image.open(tmp_path / "a.png")
    for block in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0XX",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12",
    ):
        picture().save(tmp_path / "b.png", exif=block)
        assert same(open_image(tmp_path / "b.png"), plain)
    whole.info["exif"] = "no bytes at all"
    assert same(open_image(whole), plain)


def test_a_phones_photo_is_its_first_view(tmp_path):
    with Image.open(FIELD / "phone.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
        image.load()
        first = image.convert("RGB")
    assert same(open_image(FIELD / "phone.jpg"), first)


def test_several_frames_or_pages_are_refused(tmp_path):
    more = [picture(seed=1), picture(seed=2)]
    for kind in ("gif", "png", "webp"):
        picture().save(tmp_path / f"moving.{kind}", save_all=True, append_images=more)
        with pytest.raises(InputError, match=r"moving.* is animated \(3 frames\): give one frame"):
            open_image(tmp_path / f"moving.{kind}")
    with pytest.raises(InputError, match=r"pages.tif has 2 pages: save the one that is meant"):
        open_image(FIELD / "pages.tif")


def test_bad_pictures_are_refused(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    picture().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    tif = bytearray((FIELD / "i16.tif").read_bytes())
    at = struct.unpack("<I", tif[4:8])[0]
    tif[at + 4 : at + 6] = struct.pack("<H", 2)  # the width is text
    (tmp_path / "bad.tif").write_bytes(tif)
    cases = {
        "missing.png": "does not exist",
        "text.png": "not a picture",
        "empty.png": "not a picture",
        "cut.png": "can't be read",
        "bad.tif": "can't be read",
        ".": "can't be read: it is a folder",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            open_image(tmp_path / name)
    with pytest.raises(InputError, match="without a fixed range"):
        open_image(Image.new("F", (20, 20)))
    with pytest.raises(InputError, match=r"no pixels \(0 x 5\)"):
        open_image(Image.new("RGB", (0, 5)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 112 * 84 - 1)  # a warning in Pillow
    with pytest.raises(InputError, match="more than 9,407 pixels"):
        open_image(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # an error in Pillow
    with pytest.raises(InputError, match="scale it down"):
        open_image(tmp_path / "whole.png")


def test_names_that_are_no_file_get_one_short_line(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    cases = {
        "data:image/png;base64," + "iVBORw0KGgo" * 1000: "data URIs are not read, save it to a file first",
        "https://example.org/a.png": "https://example.org/a.png is not fetched",
        "file:///a.png": "is not fetched",
        "a" * 5000 + ".png": "File name too long",
        "~nobody-at-all/x.png": "~nobody-at-all/x.png does not exist",
        "a\0b.png": "can't be read",
        "~a\0b/x.png": "can't be read",
        "\ud800.png": "can't be read",
        "": "'' does not exist",
        "two\nlines.png": r"two\\nlines.png' does not exist",
        str(tmp_path / "pipe"): "can't be read: it is a device or pipe",
        os.devnull: "can't be read: it is a device or pipe",
        str(tmp_path / "file" / "x.png"): "can't be read: Not a directory",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as raised:
            open_image(name)
        assert len(str(raised.value)) < 300 and str(raised.value).isprintable()
    monkeypatch.setenv("HOME", str(tmp_path))
    picture().save(tmp_path / "mine.png")
    assert same(open_image("~/mine.png"), picture())
    assert len(short("x" * 10**6)) < 130


@pytest.mark.parametrize("wrong", [None, 3, b"a.png", ["a.png"], np.zeros((3, 3))])
def test_what_is_no_picture_is_named(wrong):
    with pytest.raises(InputError, match=f"images.2. must be a path or a Pillow image, not {type(wrong).__name__}"):
        open_image(wrong, "images[2]")


def test_a_closed_image_is_refused():
    image = Image.open(FIELD / "exif6.jpg")
    image.close()
    with pytest.raises(InputError, match="can't be read"):
        open_image(image)


def test_random_pictures():
    counts = fuzz_pictures.fuzz(150, seed=0)
    assert counts["valid"] == 50 and counts["refused"] > 10
    assert not counts["wrong"] + counts["tracebacks"] + counts["refused_wrongly"], counts["examples"]
