"""DINOv2, from a folder or the hub. Its features agree with people's judgement better than Inception's. An extra.

Source: Oquab et al. 2023; Stein et al. 2023, "Exposing flaws of generative model evaluation metrics".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.metrics.extractor import FeatureExtractor, coloured_pixels

DEFAULT = "facebook/dinov2-large"  # ViT-L/14, as Stein et al. 2023 and Karras et al. 2024 use it
_SIDE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, in [0, 1]


@final
class DINOv2(FeatureExtractor):
    """The class token behind the last norm, of images resized to 224 x 224 by an antialiased cubic filter."""

    resize = f"{_SIDE}x{_SIDE}, cubic, antialiased"
    num_classes = 0
    block = 32

    def __init__(self, where: str = DEFAULT) -> None:
        """Read the model.

        Args:
            where: A folder in the layout of transformers, with safetensors, or a name on the hub.

        Raises:
            ConfigError: transformers is not installed, or there is no such model.
        """
        super().__init__()
        try:
            from transformers import Dinov2Model  # pyright: ignore[reportMissingImports]  (an extra)
        except (ImportError, RuntimeError) as error:
            raise ConfigError(
                f"the features dinov2 need transformers ({error}): pip install 'multistage-diffusion[dinov2]'"
            ) from error
        try:
            place = str(Path(where).absolute()) if Path(where).is_dir() else where
            model: Any = Dinov2Model.from_pretrained(place, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"cannot read DINOv2 at {where} ({' '.join(str(error).split())[:160]}); give a folder as dinov2:PATH"
            ) from error
        self.model = model.float().eval().requires_grad_(False)
        self.num_features = int(model.config.hidden_size)
        self.name = f"dinov2-{model.config.num_hidden_layers}x{self.num_features}"

    def extract(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch 0"]]:
        """Features of images in [-1, 1], and no logits."""
        x = F.interpolate(coloured_pixels(x) / 255.0, (_SIDE, _SIDE), mode="bicubic", antialias=True)
        mean, deviation = (torch.tensor(values, device=x.device)[:, None, None] for values in (_MEAN, _DEVIATION))
        features = self.model(pixel_values=(x - mean) / deviation).pooler_output
        return features, features.new_zeros(len(features), 0)
