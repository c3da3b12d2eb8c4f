"""One picture file into pixels: what each kind becomes, what is refused, and limits before memory is taken.

    stored as                           becomes
    1-bit, 8-bit grey                   grey
    16-bit grey                         grey, 0..65535 scaled to 0..255 and rounded
    8- or 16-bit RGB, palette           RGB
    alpha, or a transparent colour      shown on white; a colour hidden under full transparency does not show
    CMYK                                RGB by (1 - ink)(1 - black); colour profiles are ignored
    EXIF orientation                    turned upright
    several pictures in a JPEG          the first
    animation, pages; float; 32-bit     refused

Pixels decide: damage in texts, EXIF data, TIFF tags or the index of several pictures is noted, and the picture is read.
Only PNG, JPEG, GIF, WebP, BMP and TIFF are tried, so that no other decoder of Pillow sees the file.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from multistage_diffusion import files

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".bmp", ".tif", ".tiff")
MAX_FILE_BYTES = 128 * 2**20
MAX_PIXELS = 25_000_000  # 6000 x 4000 passes; decoded with transparency, less than 300 MB


_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_OF_PIXELS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")  # chunks of a PNG that change pixels, or say that it is animated


class PictureError(Exception):
    """One picture cannot be used; the message says why, in a few words, without the file's name."""


def is_picture_name(name: str, *, hidden: bool = False) -> bool:
    """Whether a file's name ends as pictures do, in any case; by default not of a hidden file."""
    return name.lower().endswith(ENDINGS) and (hidden or not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether a file or a folder that it lies in is hidden, like `.ipynb_checkpoints`, or of macOS's archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def read_regular(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file; a pipe or a device is never waited for.

    Args:
        path: The file, or a link to it.
        limit: Largest size allowed, in bytes.

    Returns:
        The content.

    Raises:
        PictureError: Missing, not a regular file, or too large.
    """
    try:
        return files.read_regular(path, limit)
    except OSError as error:
        raise PictureError(error.strerror or "cannot be read") from error


def decode(
    content: bytes, *, reduce: bool = False, notices: list[str] | None = None
) -> UInt8[Tensor, "channels height width"]:
    """Pixels of a picture file.

    Args:
        content: The whole file.
        reduce: Read JPEGs of more than `MAX_PIXELS` pixels at a half, a quarter or an eighth of their size, the first
            that fits: for pictures that are to be made smaller anyway.
        notices: Gets a line for metadata that a decoder stumbled over.

    Returns:
        1 channel (grey) or 3 (RGB), as the table above says.

    Raises:
        PictureError: Not a picture, damaged, too large, or of a kind that is refused.
    """
    try:
        return _decode(content, reduce, notices)
    except PictureError:
        raise
    except Exception as error:  # a hostile file makes Pillow raise almost anything
        bare = _without_metadata(content)
        if bare != content:
            picture = decode(bare, reduce=reduce)
            _note(notices, error)
            return picture
        if isinstance(error, Image.UnidentifiedImageError):
            raise PictureError(f"not a picture of a known kind ({', '.join(FORMATS)})") from error
        words = " ".join(str(error).split())[:100]
        raise PictureError(f"damaged ({words or type(error).__name__})") from error


def _decode(content: bytes, reduce: bool, notices: list[str] | None) -> Tensor:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Image.open would read the index of several pictures, and refuse what `_refuse` may let be reduced.
        is_jpeg = content.startswith(_JPEG)
        opened = JpegImageFile(io.BytesIO(content)) if is_jpeg else Image.open(io.BytesIO(content), formats=FORMATS)
        with opened as image:
            if is_jpeg and reduce:
                _reduce(image)
            _refuse(image)
            picture = _pixels(image, notices)
    for warning in caught:
        _note(notices, warning.message)
    return picture


def _reduce(image: Image.Image) -> None:
    """Let a JPEG that is too large be decoded at the largest of a half, a quarter and an eighth that is not."""
    high, wide = image.size
    for factor in (2, 4, 8):
        if image.size[0] * image.size[1] > MAX_PIXELS:
            image.draft(None, (high // factor, wide // factor))


def _refuse(image: Image.Image) -> None:
    """Checks on the header, before pixels are decoded."""
    wide, high = image.size
    if wide * high > MAX_PIXELS or min(wide, high) < 1:
        mend = "choose a resolution, or make it smaller" if image.format == "JPEG" else "make it smaller first"
        raise PictureError(f"{wide} x {high} pixels, more than the {MAX_PIXELS:,} allowed; {mend}")
    if getattr(image, "is_animated", False):
        raise PictureError("an animation, or several pages: save the picture that is meant as a file of its own")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise PictureError(f"{'float' if image.mode == 'F' else '32-bit'} pixels have no agreed range: save 8 bits")


def _note(notices: list[str] | None, message: object) -> None:
    if notices is not None:
        notices.append(" ".join(str(message).split())[:100])


def _without_metadata(content: bytes) -> bytes:
    """A PNG without the chunks that no pixel needs; other files as they are."""
    if not content.startswith(_PNG):
        return content
    parts, at = [content[: len(_PNG)]], len(_PNG)
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4])
        if content[at + 4 : at + 8] in _OF_PIXELS or content[at + 4 : at + 5].isupper():
            parts.append(content[at:end])
        at = end
    return b"".join(parts)


def _upright(image: Image.Image, notices: list[str] | None) -> Image.Image:
    """Turned as the EXIF data say, where they can be read."""
    image.load()  # fails where pixels are damaged, so that what fails below is metadata
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        _note(notices, error)
        return image


def _pixels(image: Image.Image, notices: list[str] | None) -> UInt8[Tensor, "channels height width"]:
    """Decode, turn upright, convert."""
    transparent = "transparency" in image.info
    image = _upright(image, notices)
    if image.mode.startswith("I"):  # 16-bit grey
        if transparent:
            raise PictureError("16-bit grey with a transparent colour: save it with 8 bits")
        wide = np.asarray(image).astype(np.uint32)
        return torch.from_numpy(((wide * 255 + 32767) // 65535).astype(np.uint8))[None]
    if image.mode in ("LA", "RGBA", "PA") or transparent:
        image = _on_white(image)
    elif image.mode in ("P", "CMYK"):
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    if image.mode not in ("L", "RGB"):
        raise PictureError(f"pixels of kind {image.mode} are not supported: save it as RGB")
    pixels = np.array(image)
    planes = pixels[None] if image.mode == "L" else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    return torch.from_numpy(planes)


def _on_white(image: Image.Image) -> Image.Image:
    """What a viewer shows of a transparent picture on a white page."""
    grey = image.mode in ("1", "L", "LA")
    image = image.convert("LA" if grey else "RGBA")
    page = Image.new("L" if grey else "RGB", image.size, "white")
    page.paste(image.convert(page.mode), mask=image.getchannel("A"))
    return page
