"""Edges in converters: a time that was made from an edge is the edge, in whatever type it comes."""

import pytest
import torch
from torch import nn

import multistage_diffusion as msd
import tiny
from multistage_diffusion.config import to_dict
from multistage_diffusion.interop.multistage_unet import MultistageUNet
from multistage_diffusion.noise import EDM, VP, Cosine, Flow


def test_a_level_that_was_made_from_an_edge_is_the_edge_in_each_type():
    """A number of Python is no float32, and a float32 number is the edge that it was made from."""

    class OfSigma(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Conv2d(1, 1, 1)

        def forward(self, x, sigma):
            return self.out(x)

    class OfTime(OfSigma):
        def forward(self, x, timestep):
            return self.out(x)

    edges = (0.6, 5.71)
    staged = msd.stage_module(OfSigma(), ["out"], edges)
    assert [staged.stage_of(sigma).item() for sigma in (0.6, 5.71, torch.tensor(5.71), torch.tensor([5.71]))] == [
        0, 1, 1, 1,
    ]  # fmt: skip
    assert staged.stage_of(torch.tensor([0.6, 5.71]).bfloat16()).tolist() == [0, 1]
    staged = msd.stage_module(OfTime(), ["out"], edges, EDM())
    times = torch.tensor(edges, dtype=torch.float64).log() / 4
    assert staged.stage_of(times.float()).tolist() == [0, 1]
    assert staged.stage_of(times.float().nextafter(torch.tensor(torch.inf))).tolist() == [1, 2]


@pytest.mark.parametrize("process", [VP(), Cosine(), EDM(), Flow()])
def test_the_time_of_an_edge_lies_in_the_stage_of_the_edge(process):
    """A scheduler's float32 time, and the same number of Python's, run the decoder that the edge belongs to."""
    unet = MultistageUNet(model=to_dict(tiny.MODEL), process=to_dict(process), edges=list(tiny.EDGES),
                          shape=list(tiny.SHAPE)).eval()  # fmt: skip
    tiny.randomise(unet)
    times = process.preconditioning(torch.tensor(tiny.EDGES, dtype=torch.float64)).c_noise / unet._time_scale
    ran = []
    for stage, decoder in enumerate(unet.network.decoders):
        decoder.register_forward_pre_hook(lambda *_, stage=stage: ran.append(stage))
    x = torch.zeros(1, *tiny.SHAPE)
    for time in times:
        single = time.float()
        (
            unet(x, single),
            unet(x, single.nextafter(torch.tensor(2000.0))),
            unet(x, float(time) - 1e-12 * abs(float(time))),
        )
    assert ran == [0, 1, 0, 1, 2, 1]
