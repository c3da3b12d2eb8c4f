"""Published statistics of real images in place of the images."""

import numpy as np
import pytest
import torch

import tiny
from multistage_diffusion.config import Sampler
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.evaluation import evaluate, evaluate_images
from multistage_diffusion.metrics.classifier import Classifier
from multistage_diffusion.metrics.reference import read_moments


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def extractor():
    return Classifier("untrained", tiny.SHAPE, ("a", "b", "c"), 0.5).eval()


def saved(path, extractor, data, **more):
    """A file as EDM and pytorch-fid write it."""
    features = extractor(data.floats()).features.double().numpy()
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False), **more)
    return path


def test_the_distance_to_statistics_is_that_to_their_images(extractor, tmp_path):
    images, real = tiny.images(300), tiny.images(200, seed=1)
    pixels = real.images.numpy()  # ADM's files hold the images, too
    statistics = read_moments(saved(tmp_path / "real.npz", extractor, real, arr_0=pixels, mu_s=np.zeros(3)))
    there = evaluate_images(images, real, ["fd", "is"], features=extractor)
    here = evaluate_images(images, None, ["fd", "is"], features=extractor, statistics=statistics)
    assert here.figures.keys() == there.figures.keys()
    for name in ("fd", "fd_infinity", "is"):
        assert here.figures[name] == pytest.approx(there.figures[name], rel=1e-6)
    document = here.to_dict()
    assert document["statistics"] == {"source": str(tmp_path / "real.npz"), "digest": statistics.digest}
    assert "reference" not in document and len(statistics.digest) == 64


@pytest.mark.parametrize("layout", ["edm", "pytorch-fid", "adm"])
def test_each_published_layout_is_read(layout, tmp_path):
    """EDM: float64 in no order; pytorch-fid: compressed; ADM: spatial features and the images beside them."""
    mu, sigma = np.arange(4.0), np.eye(4) * 2
    file = tmp_path / "statistics.npz"
    if layout == "edm":
        np.savez(file, sigma=sigma, mu=mu)
    elif layout == "pytorch-fid":
        np.savez_compressed(file, mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    else:
        images = np.zeros((6, 8, 8, 3), dtype=np.uint8)
        np.savez(file, arr_0=images, mu=mu, sigma=sigma, mu_s=np.zeros(9), sigma_s=np.eye(9))
    moments = read_moments(file)
    assert torch.equal(moments.mean(), torch.from_numpy(mu)) and moments.mean().dtype == torch.float64
    assert torch.equal(moments.covariance(), torch.from_numpy(sigma))


def test_the_loss_is_still_that_of_the_images(extractor, tmp_path):
    statistics = read_moments(saved(tmp_path / "real.npz", extractor, tiny.images(200)))
    options = {"num": 20, "sampler": Sampler(solver="ddim", steps=1), "statistics": statistics}
    evaluation = evaluate(tiny.denoiser(), tiny.images(8), features=extractor, **options)
    assert evaluation.fd > 0 and evaluation.loss > 0 and evaluation.reference.images == 8
    assert evaluate(tiny.denoiser(), None, ["fd"], features=extractor, **options).fd == evaluation.fd
    with pytest.raises(ConfigError, match="the metric loss needs real images"):
        evaluate(tiny.denoiser(), None, features=extractor, **options)


def test_what_does_not_fit_is_refused(extractor, tmp_path):
    statistics, images = read_moments(saved(tmp_path / "real.npz", extractor, tiny.images(200))), tiny.images(20)
    with pytest.raises(ConfigError, match=r"metrics kid, prdc need the features .* leave them out"):
        evaluate_images(images, None, ["kid", "fd", "prdc"], features=extractor, statistics=statistics)
    with pytest.raises(ConfigError, match="metrics fd compare with real images"):
        evaluate_images(images, None, ["fd"], features=extractor)
    with pytest.raises(ConfigError, match="the features classifier need images"):
        evaluate_images(images, None, ["fd"], statistics=statistics)
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ConfigError, match=r"other.npz is of 5 features, and untrained gives 64; choose other features"):
        evaluate_images(images, None, features=extractor, statistics=read_moments(tmp_path / "other.npz"))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mean": np.zeros(3)}, "statistics are the arrays mu and sigma, and the file holds mean"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"must have shapes \(n,\) and \(n, n\), got \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros((3, 3)), "sigma": np.eye(3)}, "must have shapes"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "NaN"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "arrays of object are not read"),
    ],
)
def test_files_without_statistics_are_refused(arrays, words, tmp_path):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(DataError, match=words):
        read_moments(tmp_path / "file.npz")


def test_files_that_are_no_npz_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        read_moments(tmp_path / "none.npz")
    torch.save({"mu": torch.zeros(3)}, tmp_path / "pickle.npz")
    with pytest.raises(DataError):
        read_moments(tmp_path / "pickle.npz")
