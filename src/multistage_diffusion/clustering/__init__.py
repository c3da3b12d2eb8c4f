"""Timestep clustering: the stages of a data set, found exactly, for any process and any number of stages."""

from multistage_diffusion.clustering.find import Clustering, cluster
from multistage_diffusion.clustering.levels import MEASURES
from multistage_diffusion.clustering.options import METHODS, OBJECTIVES
from multistage_diffusion.clustering.similarity import REFERENCES, Similarities, Similarity

__all__ = ["MEASURES", "METHODS", "OBJECTIVES", "REFERENCES", "Clustering", "Similarities", "Similarity", "cluster"]
