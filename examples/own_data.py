"""Data of your own: a torch Dataset of float fields with five channels, drawn again in their own unit."""

import sys
from dataclasses import replace

import torch
from torch.utils.data import Dataset

import multistage_diffusion as msd


class Waves(Dataset):
    """Five quantities on an 8x8 grid, around 280 with a spread of about 10."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> torch.Tensor:
        phase = torch.rand(5, 1, 1, generator=torch.Generator().manual_seed(index)) * 6.28
        return 280 + 14 * torch.sin(torch.arange(8)[:, None] * 0.8 + torch.arange(8) * 0.4 + phase)


def main(out: str, steps: int = 300) -> torch.Tensor:
    data = msd.as_data(Waves(), scale="standardise", name="waves")  # (512, 5, 8, 8); the statistics stay in the run
    backbone = replace(msd.recipe("digits").model, decoder_widths=(16, 8), width=16)
    denoiser = msd.Denoiser.from_backbone(backbone, msd.VP(prediction="v"), data.shape, msd.Stages((1.0,)))
    training = msd.TrainingConfig(steps=steps, batch_size=32, learning_rate=2e-3)
    msd.fit(msd.Trainer(denoiser, data, training), out)
    samples = msd.sample(msd.load_run(out).denoiser, 16, steps=10).images
    return data.codec.decode(samples)  # back in the unit of the data


if __name__ == "__main__":
    fields = main(sys.argv[1])
    print(f"drew {tuple(fields.shape)}, mean {fields.mean():.1f}, deviation {fields.std():.1f}")
