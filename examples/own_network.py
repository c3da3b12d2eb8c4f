"""A network of your own, in stages: trained, resumed, sampled, evaluated, its FLOPs counted."""

import sys

import torch.nn.functional as F
from torch import Tensor, nn

import multistage_diffusion as msd


class Encoder(nn.Module):  # (x, c_noise, conditioning) -> any record of tensors with the images along dimension 0
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.noise = nn.Conv2d(1, width, 3, padding=1), nn.Linear(1, width)

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: msd.Conditioning) -> dict[str, Tensor]:
        return {"maps": F.silu(self.stem(x) + self.noise(c_noise[:, None])[:, :, None, None])}


class Decoder(nn.Module):  # that record -> the raw output F, of the shape of x; each stage has its own, of any width
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(16, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, record: dict[str, Tensor]) -> Tensor:
        return self.layers(record["maps"])


def main(out: str, steps: int = 200) -> float:
    data, network = msd.load_data("digits"), msd.MultiDecoder(Encoder(), [Decoder(width) for width in (24, 16, 8)])
    denoiser = msd.Denoiser(network, msd.EDM(sigma_data=0.54), msd.Stages((0.2, 0.8)), shape=data.shape)
    print("FLOPs of a stage:", [stage.flops for stage in msd.denoiser_cost(denoiser).stages])
    training = msd.TrainingConfig(steps=steps, batch_size=32, learning_rate=2e-3)
    msd.fit(msd.Trainer(denoiser, data, training), out)  # the same call again goes on where it stopped
    trained = msd.load_run(out, network=network).denoiser  # a folder names the class; the object comes from you
    print("images:", msd.sample(trained, 4, steps=6).images.shape)
    return msd.evaluate(trained, msd.load_data("digits", split="test")).loss


if __name__ == "__main__":
    print("held-out loss:", main(sys.argv[1]))
