"""From seeds to images to figures: what a model is worth, as one document."""

from multistage_diffusion.evaluation.held_out import HeldOutLoss, SigmaBin, held_out_loss
from multistage_diffusion.evaluation.images import describe, distances, generated
from multistage_diffusion.evaluation.report import METRICS, evaluate, evaluate_images

__all__ = [
    "METRICS",
    "HeldOutLoss",
    "SigmaBin",
    "describe",
    "distances",
    "evaluate",
    "evaluate_images",
    "generated",
    "held_out_loss",
]
