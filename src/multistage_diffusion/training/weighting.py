"""Weights of noise levels in training, beside the process's own.

All are weights w(sigma) of the squared error of the denoised image; SNR = 1 / sigma^2, as x = x0 + sigma eps. What a
weight does to the training distribution of sigma, and to the held-out loss, is nothing: levels are drawn as before, and
losses are reported with the process's weight.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.config.run import Weighting
from multistage_diffusion.noise import Process

MIN_SNR = 5.0  # gamma of Hang et al. 2023
P2_OFFSET, P2_POWER = 1.0, 1.0  # k and gamma of Choi et al. 2022


def relative_weight(weighting: Weighting, process: Process, sigma: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """What a weighting makes of the process's weight, as a factor.

    - `process`: 1.
    - `min-snr`: w = min(SNR, 5), so that no low noise level outweighs the rest (Hang et al. 2023: for noise
      prediction min(SNR, 5) / SNR times the process's weight, for velocity min(SNR, 5) / (SNR + 1)).
    - `p2`: w = SNR / (1 + SNR): the weight of noise prediction, SNR, less where SNR is high (Choi et al. 2022).

    Args:
        weighting: Which.
        process: The process.
        sigma: Noise levels above 0.

    Returns:
        The factors.
    """
    snr = sigma.square().reciprocal()
    match weighting:
        case "process":
            return sigma.new_ones(sigma.shape)
        case "min-snr":
            weight = snr.clamp(max=MIN_SNR)
        case "p2":
            weight = snr / (P2_OFFSET + snr) ** P2_POWER
    return weight / process.loss_weight(sigma)
