"""The pieces by hand, for your own training loop: process, stages, network, loss, sampler; nothing is hidden.

python examples/by_hand.py
"""

import torch

import multistage_diffusion as msd
from multistage_diffusion.config import ModelConfig
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.noise import VP


def main(steps: int = 300) -> None:
    images = msd.load_data("digits").floats()  # (N, 1, 8, 8) in [-1, 1]
    stages = msd.cluster(images, VP()).stages
    model = ModelConfig(width=32, decoder_widths=(32, 16, 8), multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0)
    denoiser = msd.Denoiser.from_backbone(model, VP(prediction="v"), (1, 8, 8), stages)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)

    for step in range(steps):
        x0 = images[torch.randint(len(images), (128,), generator=generator)]
        sigma = denoiser.process.icdf(torch.rand(128, dtype=torch.float64, generator=generator).clamp(1e-6, 1 - 1e-6))
        noise = torch.randn(x0.shape, generator=generator)
        loss = denoising_loss(denoiser, x0, noise, sigma).mean()  # each image goes through the decoder of its stage
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    samples = msd.sample(denoiser, 8, solver="dpmpp-2m", steps=20)
    print(f"calls of each stage's decoder: {samples.stage_calls}")


if __name__ == "__main__":
    main()
