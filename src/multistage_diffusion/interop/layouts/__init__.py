"""Names and orders of published U-Nets beside ours: EDM's, score SDE's, latent diffusion's, and the paper's of each.

A layout gives the configuration that it reads from names and shapes, and the weights by our names. Where queries, keys
and values, sines and cosines, or labels lie in another order, they are put into ours.
"""

from multistage_diffusion.interop.layouts.base import Official
from multistage_diffusion.interop.layouts.edm import Preconditioned, from_edm
from multistage_diffusion.interop.layouts.latent_diffusion import from_latent_diffusion
from multistage_diffusion.interop.layouts.score_sde import from_score_sde

__all__ = ["Official", "Preconditioned", "from_edm", "from_latent_diffusion", "from_score_sde"]
