"""Sources of pictures and fields, read safely into one form."""

from multistage_diffusion.data.images import Images, to_uint8
from multistage_diffusion.data.sources import Split, load_data, load_parts

__all__ = ["Images", "Split", "load_data", "load_parts", "to_uint8"]
