"""A noise process of your own: ln sigma is Laplace-distributed in training, as in Hang et al. 2024.

python examples/own_process.py
"""

from dataclasses import dataclass
from typing import Literal

import multistage_diffusion as msd
from multistage_diffusion.noise import Levels, VariancePreserving


@dataclass(frozen=True, kw_only=True)
class Laplace(VariancePreserving):  # has the scale, the loss and the preconditioning of VP
    kind: Literal["laplace"] = "laplace"  # its name in files; they can be read wherever this class is imported
    width: float = 0.7

    @property
    def times(self) -> tuple[float, float]:  # t is the share of the training distribution
        return 1e-3, 0.999

    def sigma(self, t: Levels) -> Levels:
        return (-self.width * (t - 0.5).sign() * (-2 * (t - 0.5).abs()).log1p()).exp()

    def t(self, sigma: Levels) -> Levels:
        z = sigma.log() / self.width
        return 0.5 - z.sign() * z.abs().neg().expm1() / 2


def main(out: str = "runs/laplace", steps: int = 1_000) -> None:
    data = msd.load_data("digits")
    denoiser = msd.Denoiser.from_backbone(msd.recipe("digits").model, Laplace(), data.shape, msd.Stages((0.5, 4.0)))
    msd.fit(msd.Trainer(denoiser, data, msd.TrainingConfig(steps=steps, ema_half_life=6_400.0)), out)
    samples = msd.sample(msd.load_run(out).denoiser, 16, solver="dpmpp-2m", steps=20)
    print(f"drew {tuple(samples.images.shape)} with {samples.nfe} network calls each")


if __name__ == "__main__":
    main()
