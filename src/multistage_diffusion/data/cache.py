"""Where things that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The cache folder: `$MSD_CACHE`, else `multistage-diffusion` in `$XDG_CACHE_HOME` or `~/.cache`.

    Returns:
        The folder; it need not exist yet.
    """
    if own := os.environ.get("MSD_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "multistage-diffusion"
