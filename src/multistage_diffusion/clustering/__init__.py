"""Timestep clustering: the stages of a data set, found exactly, for any process and any number of stages."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multistage_diffusion.clustering.find import Clustering, cluster
    from multistage_diffusion.clustering.options import MEASURES, METHODS, OBJECTIVES, REFERENCES, ClusterOptions
    from multistage_diffusion.clustering.posterior import OptimalDenoiser
    from multistage_diffusion.clustering.similarity import Similarities, Similarity

__all__ = [
    "MEASURES",
    "METHODS",
    "OBJECTIVES",
    "REFERENCES",
    "ClusterOptions",
    "Clustering",
    "OptimalDenoiser",
    "Similarities",
    "Similarity",
    "cluster",
]

# Imported when they are first used: the options need no torch.
_MODULES = {
    "Clustering": "find",
    "OptimalDenoiser": "posterior",
    "Similarities": "similarity",
    "Similarity": "similarity",
    "cluster": "find",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'options')}"), name)
