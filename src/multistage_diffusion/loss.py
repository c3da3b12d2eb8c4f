"""The denoising loss."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.conditioning import NO_CONDITIONING, Conditioning
from multistage_diffusion.denoiser import Denoiser


def denoising_loss(
    denoiser: Denoiser,
    images: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    sigma: Float[Tensor, " batch"],
    conditioning: Conditioning = NO_CONDITIONING,
    *,
    counts: Sequence[int] | None = None,
) -> Float[Tensor, " batch"]:
    """Weighted squared error of the denoised image, one value an image.

    Args:
        denoiser: The denoiser.
        images: Clean images x0 in [-1, 1].
        noise: Standard normal eps.
        sigma: Noise level of each image.
        conditioning: Labels, augmentation and dropout seeds of the images.
        counts: How many images each stage has, when images of a stage lie side by side in order.

    Returns:
        w(sigma) mean_pixels (D(x0 + sigma eps) - x0)^2, with the process's weight w. For noise prediction this is the
        mean squared error of the predicted noise.

    Source: Karras et al. 2022, Eq. 2 and 8.
    """
    scale = sigma.to(images)[:, None, None, None]
    denoised = denoiser(images + scale * noise, sigma, conditioning, counts=counts)
    return denoiser.process.loss_weight(sigma).to(images) * (denoised - images).square().mean(dim=(1, 2, 3))
