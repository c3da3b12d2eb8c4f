"""Several processes of one program: how they meet, what they tell one another, how they end."""

from multistage_diffusion.world.processes import SINGLE, ProcessGroup, join, local_device

__all__ = ["SINGLE", "ProcessGroup", "join", "local_device"]
