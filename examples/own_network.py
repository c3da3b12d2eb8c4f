"""A network of your own, in stages: trained, resumed, sampled, evaluated, its cost counted. python own_network.py OUT"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multistage_diffusion as msd


class Encoder(nn.Module):
    """Maps (x, c_noise, conditioning) to any record of tensors with the images along dimension 0."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.noise = nn.Conv2d(1, width, 3, padding=1), nn.Linear(1, width)

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: msd.Conditioning) -> dict[str, Tensor]:
        return {"maps": F.silu(self.stem(x) + self.noise(c_noise[:, None])[:, :, None, None]), "x": x}


class Decoder(nn.Module):
    """Maps that record to the raw output F, of the shape of x; each stage has one, as wide as you like."""

    def __init__(self, width: int, inputs: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1)
        )

    def forward(self, record: dict[str, Tensor]) -> Tensor:
        return self.layers(record["maps"])


def network() -> msd.MultiDecoder:
    return msd.MultiDecoder(Encoder(), [Decoder(width) for width in (24, 16, 8)])


def main(out: str, steps: int = 200) -> msd.Evaluation:
    data, test = msd.load_data("digits"), msd.load_data("digits", split="test")
    denoiser = msd.Denoiser(network(), msd.EDM(sigma_data=0.54), msd.Stages((0.2, 0.8)), shape=data.shape)
    print([stage.flops for stage in msd.denoiser_cost(denoiser).stages])
    training = msd.TrainingConfig(steps=steps, batch_size=32, learning_rate=2e-3)
    msd.fit(msd.Trainer(denoiser, data, training), out)  # the same call again goes on where it stopped
    trained = msd.load_run(out, network=network()).denoiser  # a folder names the class; the object comes from you
    images = msd.sample(trained, 4, steps=6).images
    assert images.shape == (4, *data.shape) and torch.isfinite(images).all()
    return msd.evaluate(trained, test)


if __name__ == "__main__":
    print(main(sys.argv[1]).loss)
