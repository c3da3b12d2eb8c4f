"""Several processes of one program: how they meet, what they tell one another, how they end."""

from multistage_diffusion.world.processes import ALONE, World, join, local_device

__all__ = ["ALONE", "World", "join", "local_device"]
