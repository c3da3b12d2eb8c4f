"""Feature extractors by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from multistage_diffusion.data import Images
from multistage_diffusion.errors import ConfigError, DataError, suggest
from multistage_diffusion.metrics.classifier import classifier_features
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.records import check

NAMES = ("classifier", "efficientnet-lite0", "inception", "dinov2")


def load_extractor(
    name: str, train: Images | None, test: Images | None = None, *, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """A feature extractor.

    Args:
        name: One of `NAMES`; behind a colon the file of its weights (`inception`, `efficientnet-lite0`) or its folder
            or name on the hub (`dinov2`).
        train: Images to train the `classifier` on; other features need none.
        test: Held-out images of the same source, for its accuracy.
        device: Where the extractor will work.

    Returns:
        The extractor, in evaluation mode.

    Raises:
        ConfigError: No such extractor, its weights or package are missing, or `classifier` has no labels to learn from.
    """
    check(isinstance(name, str), "features", "a name or an extractor", name)
    kind, _, where = name.partition(":")
    path = Path(where) if where else None
    if kind == "source":
        warnings.warn('the features "source" are called "classifier" now', DeprecationWarning, stacklevel=2)
        kind = "classifier"
    match kind:
        case "classifier":
            if train is None:
                raise ConfigError("the features classifier need images to be trained on, and none were given")
            try:
                return classifier_features(train, test, device=device)
            except DataError as error:
                others = ", ".join(NAMES[1:])
                raise ConfigError(f"{error}; choose other features ({others})") from error
        case "efficientnet-lite0":
            from multistage_diffusion.metrics.imagenet import EfficientNetLite0

            return EfficientNetLite0(path).to(device)
        case "inception":
            from multistage_diffusion.metrics.inception import InceptionV3

            return InceptionV3(path).to(device)
        case "dinov2":
            from multistage_diffusion.metrics.dino import DEFAULT, DINOv2

            return DINOv2(where or DEFAULT).to(device)
        case _:
            raise ConfigError(f"no features {kind}{suggest(kind, NAMES)}")
