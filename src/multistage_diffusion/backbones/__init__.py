"""Families of networks that can be split into encoders and decoders; records of their options, without torch.

A backbone needs one file with its record and one line in `BACKBONES`, from which files and recipes know it; one of a
user's own needs its class alone.
"""

from multistage_diffusion.backbones.protocol import Architecture, Backbone, CustomNetwork
from multistage_diffusion.backbones.transformer import Transformer
from multistage_diffusion.backbones.unet import UNet

BACKBONES: tuple[type[Backbone], ...] = (UNet, Transformer)

__all__ = ["BACKBONES", "Architecture", "Backbone", "CustomNetwork", "Transformer", "UNet"]
