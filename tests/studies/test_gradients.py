"""Interference and splicing: gradients that add up, cosines freed of noise, images of several networks."""

from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion import rng
from multistage_diffusion.config import Sampler
from multistage_diffusion.evaluation import generated
from multistage_diffusion.stages import Stages
from multistage_diffusion.studies.interference import corrected_cosines, stage_gradients
from multistage_diffusion.studies.intervals import spliced


def test_gradients_of_stages_add_up_to_the_whole(monkeypatch):
    """With two stages of equal share, one image and no noise, the levels of 2 x 4 rows are those of 8."""
    monkeypatch.setattr(rng, "uniform", lambda seed, stream, index, size: torch.full((len(index), size), 0.5).double())
    monkeypatch.setattr(rng, "normal", lambda seed, stream, index, shape: torch.zeros(len(index), *shape))
    denoiser = tiny.denoiser(tiny.architecture("unified"))
    halves = Stages((float(denoiser.process.icdf(torch.tensor([0.5], dtype=torch.float64))[0]),))
    image = tiny.images(1).floats()
    parts = [stage_gradients(denoiser, image.repeat(4, 1, 1, 1), halves, stage, 0) for stage in range(2)]
    whole = stage_gradients(denoiser, image.repeat(8, 1, 1, 1), Stages(), 0, 0)
    shares = halves.shares(denoiser.process)
    assert shares == pytest.approx((0.5, 0.5))
    for name in ("encoder", "decoder"):
        total = sum(share * part[name] for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(total, whole[name], rtol=1e-4, atol=1e-6)
        assert whole[name].abs().sum() > 0


def test_a_gradient_does_not_depend_on_the_batch(monkeypatch):
    from multistage_diffusion.studies import interference

    denoiser, images = tiny.denoiser(), tiny.images(6).floats()
    first = stage_gradients(denoiser, images, denoiser.stages, 1, 3)
    monkeypatch.setattr(interference, "_BATCH", 2)
    second = stage_gradients(denoiser, images, denoiser.stages, 1, 3)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_decoders_of_their_own_have_disjoint_gradients():
    denoiser, images = tiny.denoiser(), tiny.images(4).floats()
    found = [stage_gradients(denoiser, images, denoiser.stages, stage, 0)["decoder"] for stage in range(3)]
    for low, high in ((0, 1), (0, 2), (1, 2)):
        assert not ((found[low] != 0) & (found[high] != 0)).any()
        assert float(found[low] @ found[high]) == 0.0


@pytest.mark.parametrize("cosine", [-0.8, 0.0, 0.3, 1.0])
def test_cosines_are_freed_of_noise(cosine):
    generator = torch.Generator().manual_seed(0)
    first, other = torch.eye(2, 4_000, dtype=torch.float64)
    truth = [first, cosine * first + (1 - cosine**2) ** 0.5 * other]
    found, naive = [], []

    def noise():
        return torch.randn(4_000, generator=generator).double() / 8_000**0.5

    for _ in range(200):  # noise as large as the gradient; half of it is that of the images, which all stages see
        images = [noise(), noise()]
        halves = [tuple(gradient + images[half] + noise() for half in range(2)) for gradient in truth]
        found.append(corrected_cosines([(low, high) for low, high in halves])["0-1"])
        naive.append(float(torch.cosine_similarity(halves[0][0], halves[1][0], dim=0)))
    assert sum(found) / 200 == pytest.approx(cosine, abs=0.02)
    assert sum(naive) / 200 == pytest.approx(cosine / 2 + 0.25, abs=0.02)


def test_exact_gradients_have_their_cosines():
    vectors = [torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0], [1.0, 1.0], [-2.0, 0.0], [0.0, 0.0])]
    found = corrected_cosines([(vector, vector) for vector in vectors])
    expected = {"0-1": 0.5**0.5, "0-2": -1.0, "1-2": -(0.5**0.5), "0-3": 0.0, "1-3": 0.0, "2-3": 0.0}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("solver", ["ddim", "dpm-3", "dpmpp-2m", "heun"])
def test_equal_parts_draw_the_images_of_one_model(solver):
    denoiser, sampling = tiny.denoiser(process="edm"), Sampler(solver=solver, steps=4)
    own = torch.cat(list(spliced([denoiser] * 3, denoiser.stages, 5, sampling, seed=7, batch_size=3)))
    assert (own.abs() < 1).any()  # not all of it is clipped
    assert torch.equal(own, torch.cat(list(generated(denoiser, 5, sampling, seed=7, batch_size=3))))
    whole = torch.cat(list(spliced([denoiser] * 3, denoiser.stages, 5, sampling, seed=7)))
    assert (own - whole).abs().max() <= 1 / 127.5 + 1e-6


def test_a_part_acts_on_its_stage_alone():
    ours, others = tiny.denoiser(process="edm"), tiny.randomise(tiny.denoiser(process="edm"), seed=1)
    sampling = Sampler(solver="ddim", steps=4)

    def drawn(*parts, edges=tiny.EDGES):
        return torch.cat(list(spliced(parts, Stages(edges), 3, sampling, seed=0)))

    alone = drawn(others, others, others)
    assert not torch.equal(drawn(ours, others, others), alone)
    assert torch.equal(drawn(ours, others, others, edges=(1e-6, 3.0)), alone)  # no level of the schedule lies there


def test_a_unified_model_can_stand_beside_others():
    unified = tiny.denoiser(replace(tiny.architecture("unified"), decoder_widths=(8,)))
    images = list(spliced([tiny.denoiser(), unified, unified], Stages(tiny.EDGES), 2, Sampler(steps=3), seed=0))
    assert images[0].shape == (2, *tiny.SHAPE)
