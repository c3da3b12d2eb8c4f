"""The denoising loss."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion.models.denoiser import Denoiser


def denoising_loss(
    denoiser: Denoiser,
    images: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    sigma: Float[Tensor, " batch"],
    labels: Int[Tensor, " batch"] | None = None,
    *,
    augment: Float[Tensor, "batch numbers"] | None = None,
    counts: Sequence[int] | None = None,
    number: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Weighted squared error of the denoised image, one value an image.

    Args:
        denoiser: The denoiser.
        images: Clean images x0 in [-1, 1].
        noise: Standard normal eps.
        sigma: Noise level of each image.
        labels: Class of each image, for a conditional network.
        augment: How each image was augmented, for a network that is told so.
        counts: How many images each stage has, when rows of a stage lie side by side in order.
        number: Random 64-bit number of each image, from which its dropout is drawn; none draws from torch's generator.

    Returns:
        w(sigma) mean_pixels (D(x0 + sigma eps) - x0)^2, with the process's weight w. For noise prediction this is the
        mean squared error of the predicted noise.

    Source: Karras et al. 2022, Eq. 2 and 8.
    """
    level = sigma.to(images)[:, None, None, None]
    denoised = denoiser(images + level * noise, sigma, labels, augment=augment, counts=counts, number=number)
    return denoiser.process.loss_weight(sigma).to(images) * (denoised - images).square().mean(dim=(1, 2, 3))
