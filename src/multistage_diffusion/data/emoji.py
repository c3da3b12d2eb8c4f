"""Noto's colour emoji: pictures in RGB from Debian's font, for experiments without a download."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from multistage_diffusion.data.collection import Collection, Reading, collect
from multistage_diffusion.data.decode import read_regular
from multistage_diffusion.data.layout import Entry
from multistage_diffusion.errors import DataError

_FILE = "NotoColorEmoji.ttf"
_DEBIAN = Path("/usr/share/fonts/truetype/noto")
_MAX_FONT_BYTES = 64 * 2**20


def read_emoji(root: str | None, reading: Reading) -> Collection:
    """The font's bitmaps (136 x 128), on white; of equal pictures the first.

    Args:
        root: Folder to look for the font in first.
        reading: How its pictures are read.

    Returns:
        The set, in the order of the glyphs' names; a tenth is held out by content. There are no labels.

    Raises:
        DataError: The font is missing, or has no bitmaps.
    """
    path = _find(root)
    try:
        glyphs = _bitmaps(path)
    except Exception as error:  # fontTools raises almost anything on a damaged font
        raise DataError(f"noto-emoji: {path} cannot be read ({' '.join(str(error).split())[:100]})") from error
    unique = dict[bytes, str]()
    for name in sorted(glyphs):
        unique.setdefault(glyphs[name], name)
    entries = [Entry(f"{name}.png", lambda content=content: content) for content, name in unique.items()]
    copies = len(glyphs) - len(unique)
    skipped = [f"{copies} glyphs: the same picture as another"] if copies else []
    return collect("noto-emoji", entries, reading, skipped)


def _bitmaps(path: Path) -> dict[str, bytes]:
    """PNG file of each glyph that has one."""
    from fontTools.ttLib import TTFont  # comes with matplotlib

    with TTFont(io.BytesIO(read_regular(path, _MAX_FONT_BYTES)), lazy=True) as font:
        table: Any = font["CBDT"]
        strikes: list[dict[str, Any]] = table.strikeData
        return {name: bytes(glyph.imageData) for name, glyph in strikes[0].items() if hasattr(glyph, "imageData")}


def _find(root: str | None) -> Path:
    places = [*([Path(root)] if root is not None else []), _DEBIAN]
    for place in places:
        if (place / _FILE).is_file():
            return place / _FILE
    looked = " or ".join(str(place) for place in places)
    raise DataError(f"noto-emoji: no {_FILE} in {looked}; on Debian and Ubuntu: apt-get install fonts-noto-color-emoji")
