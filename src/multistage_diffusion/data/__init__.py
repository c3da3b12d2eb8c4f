"""Sources of images, read safely into one form: uint8 tensors that become float32 in [-1, 1]."""

from multistage_diffusion.data.images import Images, to_uint8
from multistage_diffusion.data.sources import Split, load_data, load_parts

__all__ = ["Images", "Split", "load_data", "load_parts", "to_uint8"]
