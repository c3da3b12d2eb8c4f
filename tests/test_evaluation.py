"""The held-out loss and the distances of a model."""

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from closed_forms import GaussianDenoiser
from multistage_diffusion.config import ModelConfig, Sampler
from multistage_diffusion.data import Images, load_data
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.evaluation import (
    FeatureMetric,
    ModelMetric,
    evaluate,
    evaluate_images,
    generated,
    held_out_loss,
)
from multistage_diffusion.metrics import held_out
from multistage_diffusion.metrics.classifier import Classifier
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.metrics.metric import Metric
from multistage_diffusion.stages import Stages

SAMPLING = Sampler(solver="dpmpp-2m", steps=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def extractor():
    return Classifier("untrained", tiny.SHAPE, ("a", "b", "c"), 0.5).eval()


def test_loss_of_the_constant_answer_has_a_closed_form():
    # A fresh network's head is zero, so F = 0; under v prediction D = s^2 x, and with black images (x0 = -1)
    # the loss is E[(1 + 1/sigma^2) (s^2 (x0 + sigma eps) - x0)^2] = E[sigma^2 x0^2 + eps^2] / (1 + sigma^2) = 1.
    black = Images("black", torch.zeros(64, 1, 8, 8, dtype=torch.uint8))
    config = tiny.run_config().process.__class__(prediction="v")
    model = ModelConfig(architecture="unified", width=8, multipliers=(1,), blocks=1, attention=())
    denoiser = tiny.Denoiser.from_backbone(model, config, tiny.SHAPE)
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


def test_loss_by_noise_level_is_that_of_the_draws_between_two_levels():
    denoiser, data = tiny.denoiser(), tiny.images(12)
    loss = held_out_loss(denoiser, data, repeats=20)
    assert sum(part.draws for part in loss.bins) == 240
    assert sum(part.draws * part.loss for part in loss.bins) / 240 == pytest.approx(loss.loss)
    assert [part.low for part in loss.bins] == sorted(part.low for part in loss.bins)
    by_stage = held_out_loss(denoiser, data, repeats=20, stages=held_out.BINS).stage_loss  # the bins as a partition
    assert [part.loss for part in loss.bins] == [loss for loss in by_stage if loss is not None]
    one = next(part for part in loss.bins if part.low == pytest.approx(0.316, rel=1e-2))
    assert one.high == 1.0 and 0 < one.error < one.loss


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
        denoiser, "forward", lambda x, sigma, given: seen.append(given.labels) or forward(x, sigma, given)
    )
    list(generated(denoiser, 60, Sampler(solver="ddim", steps=1)))
    assert seen[0].bincount(minlength=4).tolist()[3] == 0 and min(seen[0].bincount(minlength=3).tolist()) > 10


def test_evaluation_names_what_it_was_measured_with():
    evaluation = evaluate(tiny.denoiser(), tiny.images(40), features=extractor(), num=20, sampler=SAMPLING)
    document = evaluation.to_dict()
    assert document["fd"] > 0 and document["loss"] > 0 and len(document["stage_loss"]) == 3
    assert document["features"]["name"] == "untrained" and "32 pixels" in document["features"]["resize"]
    assert document["reference"]["shape"] == [1, 8, 8]
    assert (document["samples"], document["nfe"], document["reference"]["images"]) == (20, 3, 40)


def test_cost_is_that_of_the_calls_and_of_the_images_of_each_stage():
    evaluation = evaluate(tiny.denoiser(), tiny.images(40), sampler=SAMPLING, stage_images=(7, 0, 2))
    document = evaluation.to_dict()
    cost = network_cost(tiny.MODEL, tiny.SHAPE)
    assert sum(document["stage_calls"]) == document["nfe"] == 3
    assert document["stage_gmacs"] == [stage.flops / 2e9 for stage in cost.stages]
    assert document["gflops_per_sample"] == pytest.approx(
        sum(2 * calls * gmacs for calls, gmacs in zip(document["stage_calls"], document["stage_gmacs"], strict=True))
    )
    assert document["training_images"] == 9
    spent = 7 * cost.stages[0].training_flops + 2 * cost.stages[2].training_flops
    assert document["training_pflops"] == pytest.approx(spent / 1e15)
    assert "attention included" in document["flops"] and document["samples"] == 0
    json.dumps(document, allow_nan=False)


def test_the_limit_comes_with_the_plain_distance_and_says_how_many_images():
    data = tiny.images(300)
    for num, more in ((255, []), (256, ["fd_infinity", "fd_infinity_images"])):
        document = evaluate_images(data.take(torch.arange(num)), data, features=extractor()).to_dict()
        assert [key for key in document if key.startswith("fd_")] == more and document["samples"] == num
    assert document["fd_infinity_images"] == [128, 256]


def test_only_inception_s_distance_is_called_fid(monkeypatch):
    data, named = tiny.images(60), extractor()
    assert "fid" not in evaluate_images(data, data, features=named).figures
    named.name = "inception-v3"
    evaluation = evaluate_images(tiny.images(60, seed=1), data, ["fd", "kid"], features=named)
    assert evaluation.fid == evaluation.fd > 0
    assert "fid" not in evaluate_images(data, data, ["kid"], features=named).figures


def test_figures_do_not_depend_on_the_batch():
    metrics = ["fd", "kid", "is", "prdc"]
    data, features = tiny.images(40, labels=True), extractor()
    whole, parts = (
        evaluate(
            tiny.denoiser(), data, metrics, features=features, num=30, sampler=SAMPLING, seed=5, batch_size=size
        ).figures
        for size in (30, 7)
    )
    for name in ("fd", "kid", "is"):
        assert parts[name] == pytest.approx(whole[name], rel=2e-3, abs=1e-4)  # a pixel may be rounded the other way
    assert parts["prdc"] == pytest.approx(whole["prdc"], abs=0.1)


def test_figures_do_not_depend_on_the_kind_of_file(tmp_path):
    data, real, features = tiny.images(40), tiny.images(50, seed=1), extractor()
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(data.images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "pictures" / f"{i:03}.png")
    np.savez(tmp_path / "bytes.npz", images=data.images.numpy())
    np.savez(tmp_path / "floats.npz", images=data.floats().numpy())
    sources = [f"folder:{tmp_path}/pictures", f"npz:{tmp_path}/bytes.npz", f"npz:{tmp_path}/floats.npz"]
    first, *others = (
        evaluate_images(load_data(source, split="all"), real, ["fd", "kid", "prdc"], features=features).figures
        for source in sources
    )
    for other in others:
        for name in ("fd", "kid", "prdc"):
            assert other[name] == pytest.approx(first[name], abs=1e-9)


def test_images_against_themselves_are_at_distance_zero():
    data = tiny.images(200)
    assert evaluate_images(data, data, features=extractor()).fd == pytest.approx(0, abs=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match='no metric fdd; did you mean "fd"'):
        evaluate(tiny.denoiser(), tiny.images(), metrics=["fdd"])
    with pytest.raises(ConfigError, match="need features, and no extractor"):
        evaluate(tiny.denoiser(), tiny.images(), metrics=["fd"])
    with pytest.raises(ConfigError, match="needs a run"):
        evaluate_images(tiny.images(), tiny.images(), ["loss"], features=extractor())
    with pytest.raises(ConfigError, match="neither the name of a metric, nor"):
        evaluate(tiny.denoiser(), tiny.images(), [Metric()])


def test_the_defaults_measure_the_loss():
    evaluation = evaluate(tiny.denoiser(), tiny.images(40))
    assert evaluation.loss == held_out_loss(tiny.denoiser(), tiny.images(40)).loss
    assert (evaluation.samples, evaluation.features, evaluation.sampling_seconds) == (0, None, None)
    with pytest.warns(DeprecationWarning, match="to_dict"):
        assert evaluation["loss"] == evaluation.loss
    with pytest.raises(AttributeError, match="no figure fd; measured: loss, "):
        evaluation.fd  # noqa: B018
    assert copy.deepcopy(evaluation) == pickle.loads(pickle.dumps(evaluation)) == evaluation


def test_features_by_name_are_trained_on_the_reference_where_nothing_else_is_given():
    data = tiny.images(40, labels=True)
    alone = evaluate(tiny.denoiser(), data, features="classifier", num=20, sampler=SAMPLING)
    assert alone.fd > 0 and alone.features.accuracy is None and "by default on the reference" in alone.cautions[-1]
    more = evaluate(tiny.denoiser(), data, ["fd"], features="classifier", train=data, num=20, sampler=SAMPLING)
    assert more.features.accuracy is not None and more.fd == alone.fd
    assert not any("on the reference" in line for line in more.cautions)


def test_metrics_of_the_user_stand_beside_the_library_s():
    class Shift(FeatureMetric):
        name, keeps = "shift", "generated"

        def measure(self, real, generated, *, seed):
            return {"shift": float((real.mean() - generated.features.double().mean(0)).norm())}

    class Bias(ModelMetric):
        name = "bias"

        def measure(self, denoiser, examples, **_):
            x = examples.floats()
            return {"bias": float((denoiser(x, 0.1) - x).mean())}

    evaluation = evaluate(
        tiny.denoiser(), tiny.images(40), ["loss", Bias(), Shift()], features=extractor(), num=20, sampler=SAMPLING
    )
    assert next(iter(evaluation.figures)) == "shift" and evaluation.shift > 0 and evaluation.bias != 0
    json.dumps(evaluation.to_dict(), allow_nan=False)


def test_guidance_is_named_and_costs_two_passes_of_the_network():
    model = replace(tiny.MODEL, classes=3)
    costs = [
        evaluate(tiny.denoiser(model), tiny.images(8, labels=True), sampler=Sampler(solver="ddim", steps=4, **options))
        for options in ({}, {"guidance": 2.0}, {"guidance": 2.0, "guidance_interval": (0.0, 1e-9)})
    ]
    plain, guided, nowhere = (each.cost for each in costs)
    assert guided.gflops_per_sample == 2 * plain.gflops_per_sample == 2 * nowhere.gflops_per_sample
    assert guided.nfe == plain.nfe == 4
    assert "guidance" not in costs[0].to_dict() and costs[1].to_dict()["guidance"] == 2.0
