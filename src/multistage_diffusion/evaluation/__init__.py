"""From seeds to images to figures: what a model is worth."""

from multistage_diffusion.evaluation.images import distances, drawable_classes, generated
from multistage_diffusion.evaluation.report import Evaluation, evaluate, evaluate_images
from multistage_diffusion.metrics.held_out import HeldOutLoss, SigmaBin, held_out_loss
from multistage_diffusion.metrics.metric import FeatureMetric, ModelMetric
from multistage_diffusion.metrics.table import METRICS

__all__ = [
    "METRICS",
    "Evaluation",
    "FeatureMetric",
    "HeldOutLoss",
    "ModelMetric",
    "SigmaBin",
    "distances",
    "drawable_classes",
    "evaluate",
    "evaluate_images",
    "generated",
    "held_out_loss",
]
