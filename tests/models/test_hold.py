"""Keeping one stage on the device."""

import torch

from multistage_diffusion.config import ModelConfig
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.stages import Stages


def test_hold_moves_the_other_stages_away_and_back() -> None:
    model = ModelConfig(
        architecture="separate", width=8, decoder_widths=(8, 8), multipliers=(1,), blocks=1, attention=()
    )
    denoiser = Denoiser.from_backbone(model, "vp", (1, 4, 4), Stages((1.0,))).to(
        "meta"
    )  # stands in for a device other than the CPU

    def places() -> list[str]:
        groups = (denoiser.network.encoders, denoiser.network.decoders)
        return [next(module.parameters()).device.type for group in groups for module in group]

    # Weights on meta have no values to copy to the CPU: give the ones that move some.
    denoiser.network.to_empty(device="cpu")
    assert denoiser.device == torch.device("meta")
    assert places() == ["cpu"] * 4
    denoiser.offload(1)
    assert places() == ["cpu", "meta", "cpu", "meta"]
    assert denoiser.device == torch.device("meta")
    denoiser.offload(None)
    assert places() == ["meta"] * 4


def test_moved_while_sampling_the_weights_can_still_be_trained() -> None:
    model = ModelConfig(width=8, decoder_widths=(8, 8), multipliers=(1,), blocks=1, attention=())
    denoiser = Denoiser.from_backbone(model, "vp", (1, 4, 4), Stages((1.0,))).to("meta")
    denoiser.network.to_empty(device="cpu")
    with torch.inference_mode():
        denoiser.offload(1)
    assert not any(parameter.is_inference() for parameter in denoiser.parameters())
    assert all(parameter.requires_grad for parameter in denoiser.parameters())
