"""The held-out loss and the distances of a model."""

from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.analytic import GaussianDenoiser
from multistage_diffusion.config import ModelConfig, SamplingConfig
from multistage_diffusion.data import Images
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.evaluation import evaluate, evaluate_images, generated, held_out_loss
from multistage_diffusion.metrics.features import SourceClassifier
from multistage_diffusion.stages import Stages

SAMPLING = SamplingConfig(solver="dpmpp-2m", steps=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def extractor():
    return SourceClassifier("untrained", tiny.SHAPE, ("a", "b", "c"), 0.5).eval()


def test_loss_of_the_constant_answer_has_a_closed_form():
    # A fresh network's head is zero, so F = 0; under v prediction D = s^2 x, and with black images (x0 = -1)
    # the loss is E[(1 + 1/sigma^2) (s^2 (x0 + sigma eps) - x0)^2] = E[sigma^2 x0^2 + eps^2] / (1 + sigma^2) = 1.
    black = Images("black", torch.zeros(64, 1, 8, 8, dtype=torch.uint8))
    config = tiny.run_config().process.__class__(prediction="v")
    denoiser = tiny.Denoiser(ModelConfig(architecture="unified", width=8, multipliers=(1,), blocks=1, attention=()),
                             config, tiny.SHAPE)  # fmt: skip
    assert held_out_loss(denoiser.eval(), black, repeats=4).loss == pytest.approx(1.0, abs=0.02)


def test_loss_does_not_depend_on_the_batch_and_splits_into_stages():
    denoiser, data = tiny.denoiser(), tiny.images(12)
    whole, parts = (held_out_loss(denoiser, data, batch_size=size) for size in (96, 7))
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    assert whole.stage_loss == pytest.approx(parts.stage_loss, rel=1e-5)
    sigma_share = [denoiser.process.cdf(torch.tensor(edge, dtype=torch.float64)) for edge in (*tiny.EDGES, torch.inf)]
    shares = torch.stack(sigma_share).diff(prepend=torch.zeros(1, dtype=torch.float64))
    mixed = sum(float(share) * loss for share, loss in zip(shares, whole.stage_loss, strict=True))
    assert mixed == pytest.approx(whole.loss, rel=0.05)  # the strata are cut at the edges only up to one cell


def test_loss_by_stage_can_be_read_on_another_partition():
    denoiser, data = tiny.denoiser(tiny.architecture("unified")), tiny.images(12)
    assert len(held_out_loss(denoiser, data).stage_loss) == 1
    assert len(held_out_loss(denoiser, data, stages=Stages(tiny.EDGES)).stage_loss) == 3


def test_optimal_denoiser_has_the_lowest_loss():
    # On Gaussian data the exact denoiser's error is v sigma^2 / (v + sigma^2) a pixel; ours can only be worse.
    exact = GaussianDenoiser(0.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(4000, *tiny.SHAPE, generator=generator)
    for sigma in (0.1, 1.0, 10.0):
        x = x0 + sigma * torch.randn(x0.shape, generator=generator)
        error = (exact(x, sigma) - x0).square().mean()
        assert float(error) == pytest.approx(0.25 * sigma**2 / (0.25 + sigma**2), rel=0.02)


def test_generated_images_are_those_of_their_seeds_in_8_bits():
    denoiser = tiny.denoiser()
    images = torch.cat(list(generated(denoiser, 5, SAMPLING, seed=3, batch_size=2)))
    again = torch.cat(list(generated(denoiser, 5, SAMPLING, seed=3, batch_size=5)))
    assert (images - again).abs().max() <= 2 / 255 + 1e-6
    levels = (images.double() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


def test_a_conditional_model_draws_every_class(monkeypatch):
    seen = []
    model = replace(tiny.MODEL, classes=3)
    denoiser = tiny.denoiser(model)
    forward = denoiser.forward
    monkeypatch.setattr(
        denoiser, "forward", lambda x, sigma, labels=None: seen.append(labels) or forward(x, sigma, labels)
    )
    list(generated(denoiser, 60, SamplingConfig(solver="ddim", steps=1)))
    assert seen[0].bincount(minlength=4).tolist()[3] == 0 and min(seen[0].bincount(minlength=3).tolist()) > 10


def test_evaluation_names_what_it_was_measured_with():
    document = evaluate(
        tiny.denoiser(), tiny.images(40), metrics=["fd", "loss"], extractor=extractor, num=20, sampling=SAMPLING
    )
    assert document["fd"] > 0 and document["loss"] > 0 and len(document["stage_loss"]) == 3
    assert document["features"]["name"] == "untrained"
    assert (document["samples"], document["nfe"], document["reference"]["images"]) == (20, 3, 40)


def test_images_against_themselves_are_at_distance_zero():
    data = tiny.images(200)
    document = evaluate_images(data, data, extractor(), ["fd"])
    assert document["fd"] == pytest.approx(0, abs=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match='no metric fdd; did you mean "fd"'):
        evaluate(tiny.denoiser(), tiny.images(), metrics=["fdd"])
    with pytest.raises(ConfigError, match="need features, and no extractor"):
        evaluate(tiny.denoiser(), tiny.images(), metrics=["fd"])
    with pytest.raises(ConfigError, match="needs a run"):
        evaluate_images(tiny.images(), tiny.images(), extractor(), ["loss"])
