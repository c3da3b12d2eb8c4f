"""Two hundred files that nobody should trust, under the names of pictures."""

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

KINDS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF"}


def encoded(kind, mode="RGB", side=16, **options):
    """A small valid file."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, *, depth=8, colour=0, data=b"", extra=()):
    """A PNG file put together by hand, with checksums that are right."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*pair) for pair in extra), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(megabytes):
    """A deflate stream that expands to so many megabytes."""
    squeeze = zlib.compressobj(9)
    return b"".join(squeeze.compress(bytes(2**20)) for _ in range(megabytes)) + squeeze.flush()


def write_hostile(folder):
    """Write the files and return their names."""
    files = {}
    generator = np.random.default_rng(1)
    for ending, kind in KINDS.items():
        whole = encoded(kind)
        for i, cut in enumerate(np.linspace(0, len(whole) - 1, 14).astype(int)):
            files[f"cut-{i:02}.{ending}"] = whole[:cut]
        for i in range(14):
            flipped = bytearray(whole)
            flipped[generator.integers(0, len(whole) if i % 2 else 60)] ^= 1 << generator.integers(0, 8)
            files[f"flip-{i:02}.{ending}"] = bytes(flipped)
        files[f"text.{ending}"] = b"not a picture"
        files[f"page.{ending}"] = b"<html><body>404</body></html>"
    bomb, line = zeros(100), zlib.compress(bytes(17))
    for name, content in {
        "empty": png(0, 0), "wide": png(2**31 - 1, 1), "huge": png(2**31, 2**31), "negative": png(-1, -1),
        "16k": png(16_000, 16_000, depth=1, data=zeros(31)), "50k": png(50_000, 50_000, data=line),
        "ztxt": png(4, 4, data=zlib.compress(bytes(20)), extra=[(b"zTXt", b"a\0\0" + bomb)]),
        "iccp": png(4, 4, data=zlib.compress(bytes(20)), extra=[(b"iCCP", b"a\0\0" + bomb)]),
        "itxt": png(4, 4, data=zlib.compress(bytes(20)), extra=[(b"iTXt", b"a\0\1\0\0\0" + bomb)]),
        "idat": png(4, 4, data=bomb), "depth": png(4, 4, depth=7), "colour": png(4, 4, colour=5),
        "short": png(400, 400, data=line), "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "pickle": b"\x80\x04cos\nsystem\n(S'touch marker'\ntR.",
    }.items():  # fmt: skip
        files[f"{name}.png"] = content
    jpeg = bytearray(encoded("JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65_500, 65_500)
    gif = bytearray(encoded("GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    bitmap = bytearray(encoded("BMP"))
    bitmap[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    files |= {"bomb.jpg": bytes(jpeg), "bomb.gif": bytes(gif), "bomb.bmp": bytes(bitmap)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name, target in {
        "loop.png": "loop.png", "passwd.png": "/etc/passwd", "zero.png": "/dev/zero", "gone.png": "nowhere",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    (folder / "up").symlink_to("..")
    return [*files, "pipe.png", "loop.png", "passwd.png", "zero.png", "gone.png"]
