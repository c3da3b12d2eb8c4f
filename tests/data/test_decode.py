"""Every kind of picture file against its table of pixels; hostile files."""

import io
import resource
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from hostile import KINDS, encoded, png, write_hostile
from PIL import Image

from multistage_diffusion.data import load_data
from multistage_diffusion.data.decode import PictureError, decode, read_regular
from multistage_diffusion.errors import DataError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_near(picture, expected, tolerance=0):
    expected = torch.from_numpy(np.array(expected)).int()
    expected = expected[None] if expected.dim() == 2 else expected.permute(2, 0, 1)
    assert picture.shape == expected.shape
    assert (picture.int() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey_and_colour_as_they_are(kind):
    assert_near(decode(saved(Image.fromarray(RAMP), kind)), RAMP)
    if kind != "GIF":
        assert_near(decode(saved(Image.fromarray(COLOUR), kind)), COLOUR)


def test_lossy_kinds_keep_shape():
    for kind in ("JPEG", "WEBP"):
        assert decode(saved(Image.fromarray(COLOUR), kind)).shape == (3, 16, 16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 4096).round().astype(np.uint16).reshape(64, 64)
    picture = decode(saved(Image.fromarray(ramp), kind))
    assert_near(picture, np.round(ramp / 257.0))
    assert (picture.min(), picture.max()) == (0, 255)


def test_16_bit_colour():
    ramp = np.linspace(0, 65535, 256 * 3).round().astype(">u2").reshape(16, 16, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in ramp)
    assert_near(decode(png(16, 16, depth=16, colour=2, data=zlib.compress(rows))), np.round(ramp / 257.0), 1)


def test_one_bit():
    bits = (RAMP % 3 == 0).astype(np.uint8) * 255
    assert_near(decode(saved(Image.fromarray(bits).convert("1"))), bits)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_shown_on_white(kind):
    alpha = RAMP.T
    image = Image.fromarray(np.dstack([COLOUR, alpha]))
    opacity = alpha[..., None] / 255.0
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert_near(decode(saved(image, kind, **options)), np.round(COLOUR * opacity + 255 * (1 - opacity)), 1)


def test_grey_with_alpha_stays_grey():
    image = Image.merge("LA", (Image.fromarray(RAMP), Image.fromarray(RAMP.T)))
    opacity = RAMP.T / 255.0
    assert_near(decode(saved(image)), np.round(RAMP * opacity + 255 * (1 - opacity)), 1)


def test_hidden_colours_do_not_show():
    alpha = np.where(RAMP % 2 == 0, 255, 0).astype(np.uint8)
    hidden = np.where(alpha[..., None] == 0, 77, COLOUR).astype(np.uint8)
    first, second = (decode(saved(Image.fromarray(np.dstack([rgb, alpha])))) for rgb in (COLOUR, hidden))
    assert torch.equal(first, second)
    assert (first[:, RAMP % 2 == 1] == 255).all()


def test_palettes_and_transparent_colours():
    image = Image.fromarray(COLOUR).quantize(16)
    assert_near(decode(saved(image)), np.asarray(image.convert("RGB")))
    index = image.getpixel((3, 3))
    for kind in ("PNG", "GIF"):
        picture = decode(saved(image, kind, transparency=index))
        expected = np.asarray(image.convert("RGB")).copy()
        expected[np.asarray(image) == index] = 255
        assert_near(picture, expected)
    grey = decode(saved(Image.fromarray(RAMP), transparency=9))
    assert_near(grey, np.where(RAMP == 9, 255, RAMP))
    keyed = decode(saved(Image.fromarray(COLOUR), transparency=tuple(int(value) for value in COLOUR[2, 5])))
    assert (keyed[:, 2, 5] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    flat = np.zeros((16, 16, 4), dtype=np.uint8)
    flat[..., 0], flat[..., 2], flat[..., 3] = 200, 30, 60
    expected = (255 - flat[..., :3].astype(float)) * (255 - flat[..., 3:]) / 255
    options = {"quality": 100} if kind == "JPEG" else {}
    content = saved(Image.frombytes("CMYK", (16, 16), flat.tobytes()), kind, **options)
    assert_near(decode(content), np.round(expected), 2 if kind == "JPEG" else 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((8, 12), dtype=np.uint8)
    upright[:4, :3] = 255
    store = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_near(decode(saved(Image.fromarray(np.ascontiguousarray(store)), exif=exif)), upright)


def test_what_is_refused_by_name():
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        with pytest.raises(PictureError, match="animation, or several pages"):
            decode(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
    with pytest.raises(PictureError, match="float pixels"):
        decode(saved(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"))
    with pytest.raises(PictureError, match="32-bit pixels"):
        decode(saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"))
    with pytest.raises(PictureError, match="not a picture of a known kind"):
        decode(saved(Image.fromarray(COLOUR), "PPM"))


def test_of_several_pictures_in_a_jpeg_the_first_counts():
    first = Image.fromarray(np.full((8, 8), 40, dtype=np.uint8))
    second = Image.fromarray(np.full((8, 8), 200, dtype=np.uint8))
    picture = decode(saved(first, "MPO", save_all=True, append_images=[second]))
    assert (picture.int() - 40).abs().max() <= 2


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "large").write_bytes(bytes(101))
    with pytest.raises(PictureError, match="101 bytes, more than the 100 allowed"):
        read_regular(tmp_path / "large", 100)
    with pytest.raises(PictureError):
        read_regular(tmp_path)


def test_two_hundred_hostile_files_are_named_or_read(tmp_path):
    names = write_hostile(tmp_path)
    assert len(names) >= 200
    for ending, kind in KINDS.items():
        (tmp_path / f"good.{ending}").write_bytes(encoded(kind))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    images = load_data(f"folder:{tmp_path}", split="all", resolution=16, max_bad=1.0)
    assert time.perf_counter() - begin < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    named = {line.partition(": ")[0] for line in images.skipped}
    unnamed = [name for name in names if name not in named]
    assert len(images) == len(unnamed) + len(KINDS)  # all others decode to pixels
    readable = {"idat.png", "iccp.png", "itxt.png", "ztxt.png"}  # read as far as needed; texts are not pixels
    assert {name for name in unnamed if not name.startswith(("cut", "flip"))} <= readable
    assert "1 link to a folder: not followed" in images.skipped
    with pytest.raises(DataError, match=r"^folder:.*; remove it, or leave it out \(on-bad-file skip\)$"):
        load_data(f"folder:{tmp_path}", resolution=16)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def of_several():
    buffer = io.BytesIO()
    image = Image.fromarray(COLOUR)
    image.save(buffer, "MPO", save_all=True, append_images=[image.rotate(90)])
    return buffer.getvalue()


def damaged_metadata():
    """Pictures whose pixels are whole: each with a text, a profile, EXIF data or an index that is not."""
    picture, photo, several = saved(Image.fromarray(COLOUR)), saved(Image.fromarray(COLOUR), "JPEG"), of_several()
    long = zlib.compress(b"a" * 3_000_000)
    texts = {
        "zTXt": chunk(b"zTXt", b"k\0\0" + long),
        "iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + long),
        "iCCP": chunk(b"iCCP", b"k\0\0" + long),
        "tEXt of another checksum": chunk(b"tEXt", b"k\0v")[:-1] + b"\0",
    }
    cases = {name: (picture, picture[:33] + text + picture[33:]) for name, text in texts.items()}
    index = several.index(b"MPF\0")
    cases["index"] = (several, several[: index + 20] + b"\xff" * 12 + several[index + 32 :])
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"x" * 30
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    return {**cases, "EXIF": (photo, photo[:2] + segment + photo[2:])}


@pytest.mark.parametrize("name", damaged_metadata())
def test_metadata_are_no_pixels(name, tmp_path):
    whole, damaged = damaged_metadata()[name]
    notices = []
    assert torch.equal(decode(damaged, notices=notices), decode(whole))
    assert all("\n" not in line for line in notices)
    for i, content in enumerate((damaged, whole, saved(Image.fromarray(COLOUR[::-1])))):
        (tmp_path / f"{i}.png").write_bytes(content)
    assert ("metadata" in load_data(f"folder:{tmp_path}", split="all").notes) == bool(notices)
    with pytest.raises(PictureError):
        decode(damaged[: len(damaged) // 2])


def test_a_photograph_of_many_pixels_is_reduced_where_it_is_made_smaller(tmp_path):
    high, wide = 5000, 6000
    x, y = np.meshgrid(np.linspace(0, 255, wide), np.linspace(0, 255, high))
    photo = Image.fromarray(((x + y) / 2).astype(np.uint8))
    (tmp_path / "a.jpg").write_bytes(saved(photo, "JPEG"))
    with pytest.raises(DataError, match="6000 x 5000 pixels, more than the 25,000,000 allowed; choose a resolution"):
        load_data(f"folder:{tmp_path}")
    small = load_data(f"folder:{tmp_path}", resolution=16).images[0]
    expected = photo.crop((500, 0, 5500, 5000)).resize((16, 16), Image.Resampling.BILINEAR)
    assert_near(small, expected, 2)
