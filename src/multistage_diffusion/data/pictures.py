"""Pictures for people: grids of images, and strips whose frames are coloured by stage."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from multistage_diffusion.data.images import to_uint8
from multistage_diffusion.stages import STAGE_COLOURS


def picture(image: UInt8[Tensor, "channels height width"]) -> Image.Image:
    """One image as a Pillow image.

    Args:
        image: 1 channel (grey) or 3 (RGB); of any other number the first is shown.

    Returns:
        A picture of the same size.
    """
    if len(image) == 3:
        return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return Image.fromarray(image[0].contiguous().numpy())


def grid(
    images: Float[Tensor, "num channels height width"],
    *,
    columns: int | None = None,
    scale: int = 1,
    gap: int = 2,
    frames: Sequence[int] | None = None,
    smooth: bool = False,
) -> Image.Image:
    """Images side by side on white.

    Args:
        images: Images in [-1, 1]; values outside are clipped.
        columns: Images a row; by default about a square.
        scale: Size of a pixel in the picture.
        gap: Space between images, in pixels of the picture.
        frames: The stage of each image, drawn as a coloured frame of the gap's width.
        smooth: Enlarge by bicubic interpolation, easier to read for people, instead of showing pixels as squares.

    Returns:
        The picture.
    """
    pixels = to_uint8(images.detach().cpu())
    num, channels, high, wide = pixels.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    cell_high, cell_wide = high * scale + 2 * gap, wide * scale + 2 * gap
    sheet = Image.new("RGB" if channels == 3 or frames else "L", (columns * cell_wide, rows * cell_high), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(num):
        left, top = index % columns * cell_wide, index // columns * cell_high
        if frames is not None:
            box = (left, top, left + cell_wide - 1, top + cell_high - 1)
            draw.rectangle(box, fill=STAGE_COLOURS[frames[index] % len(STAGE_COLOURS)])
        tile = picture(pixels[index]).resize(
            (wide * scale, high * scale), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        )
        sheet.paste(tile, (left + gap, top + gap))
    return sheet


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file.

    Args:
        image: The picture.

    Returns:
        The file's content.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def stack(images: Sequence[Tensor]) -> Tensor:
    """Put sequences of images (one sequence a step) in reading order: a row an image, a column a step.

    Args:
        images: One (B, C, H, W) tensor for each step.

    Returns:
        (B * steps, C, H, W).
    """
    return torch.stack(list(images), dim=1).flatten(0, 1)
