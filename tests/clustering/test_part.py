"""Of a set on disk only the images chosen are read, and they are those that a set in memory would give."""

import pytest
import torch
from torch import nn

from multistage_diffusion.cli import dispatch
from multistage_diffusion.clustering import cluster, find
from multistage_diffusion.data import load_data
from multistage_diffusion.data.autoencoder import Autoencoder
from multistage_diffusion.data.collection import Reading
from multistage_diffusion.data.latents import LatentCodec, Latents
from multistage_diffusion.data.shards import Shards
from multistage_diffusion.data.sources import convert
from multistage_diffusion.errors import DataError
from multistage_diffusion.noise import VP


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, sigma):
        return self.scale * x


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Digits as shards."""
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    convert("digits", tmp_path / "shards", None, Reading())
    return tmp_path / "shards"


@pytest.fixture
def rows_read(monkeypatch):
    """How many rows of shards have been read."""
    counts, read = [], Shards.__getitem__

    def counted(self, index):
        rows = read(self, index)
        counts.append(len(rows))
        return rows

    monkeypatch.setattr(Shards, "__getitem__", counted)
    return counts


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"max_images": 400}, 400),
        ({"max_images": 400, "stages": 2}, 400),
        ({}, 1297),
        ({"method": "gradient", "samples": 1000, "max_images": 400}, 10),
        ({"method": "timestep"}, 0),
        ({"method": "snr"}, 0),
    ],
)
def test_only_the_images_chosen_are_read_and_the_edges_are_those_of_memory(options, rows, on_disk, rows_read):
    options = {"samples": 1000, "resamples": 0, "denoiser": Scale(), **options}
    stored = load_data(f"shards:{on_disk}")
    found = cluster(stored, VP(), **options)
    assert sum(rows_read) == rows
    whole = cluster(load_data("digits"), VP(), **options)
    assert found.stages.edges == whole.stages.edges
    assert found.stages.provenance["data"]["sha256"] == whole.stages.provenance["data"]["sha256"] == stored.digest
    assert found.stages.provenance["data"]["source"] == f"shards:{on_disk}"
    assert found.stages.provenance["data"]["images"] == 1297
    assert cluster(stored.images, VP(), **options).stages.edges == whole.stages.edges
    assert cluster(load_data("digits").pixels(), VP(), **options).stages.edges == whole.stages.edges


@pytest.mark.slow
def test_the_command_and_its_strip_read_no_more(on_disk, rows_read, tmp_path):
    words = [f"shards:{on_disk}", "--max-images", "200", "--samples", "1000", "--strip", str(tmp_path / "strip.svg")]
    assert dispatch(["cluster", *words]) == 0
    assert rows_read == [1297, 200, 200]  # for the range of the values, of a large set a part; the edges; the strip


def test_latents_are_read_as_a_model_sees_them():
    values = torch.randn(60, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    network = nn.Linear(1, 1)
    network.config = {"in_channels": 1}
    latents = Latents("made", values, codec=LatentCodec(Autoencoder(network, "AutoencoderKL", "made"), 0.5, 1), key="0")
    assert torch.equal(latents.values(torch.tensor([3, 1])), values[[3, 1]] / 2)


def test_images_that_do_not_fit_into_memory_are_refused_unread(on_disk, rows_read, monkeypatch):
    monkeypatch.setattr(find, "memory_of", lambda device: 2**17)  # 409 digits at 5 bytes a pixel
    stored = load_data(f"shards:{on_disk}")
    with pytest.raises(DataError, match=r"clustering 1,297 images takes .* choose max-images, like 204") as caught:
        cluster(stored, VP())
    assert rows_read == [] and "\n" not in str(caught.value)
    assert cluster(stored, VP(), samples=1000, max_images=204).stages.edges
