"""Two metrics of your own, one of features and one of the model, measured beside the library's."""

import torch

import multistage_diffusion as msd
from multistage_diffusion.evaluation import FeatureMetric, ModelMetric


class MeanShift(FeatureMetric):
    """Distance between the mean features of the two sets."""

    name = "mean_shift"

    def measure(self, real, generated, *, seed):
        return {"mean_shift": float((real.mean() - generated.mean()).norm())}


class Psnr(ModelMetric):
    """How well the model removes noise of a fifth of the range from real images, in decibels."""

    name = "psnr"

    def measure(self, denoiser, examples, *, seed, **_):
        x = examples.floats(torch.arange(64)).to(denoiser.device)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
        error = denoiser(x + 0.4 * noise, 0.4) - x
        return {"psnr": float(10 * torch.log10(4 / error.square().mean()))}


def main(run: str, num: int = 1_000) -> None:
    denoiser, images = msd.load_run(run).denoiser, msd.load_data("digits", split="test")
    evaluation = msd.evaluate(denoiser, images, [MeanShift(), Psnr(), "fd", "loss"], features="classifier", num=num)
    print({name: evaluation.figures[name] for name in ("mean_shift", "psnr", "fd", "loss")})


if __name__ == "__main__":
    main("runs/digits")
