"""Routing takes any modules: whatever record an encoder gives, an image's output is that of its stage's decoder."""

import copy
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pytest
import torch
from torch import nn

import multistage_diffusion as msd
import tiny
from multistage_diffusion.backbones import Backbone
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.config import StagesConfig
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.multidecoder import MultiDecoder, split

X, NOISE = torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 7)
STAGE = torch.tensor([2, 0, 1, 2, 2, 0, 1])
COUNTS = [2, 2, 3]


class Pair(NamedTuple):
    maps: torch.Tensor
    noise: torch.Tensor | None


@dataclass
class Record:
    maps: torch.Tensor
    rest: tuple


RECORDS = {
    "tensor": (lambda h: h, lambda r: r),
    "tuple": (lambda h: (h, None), lambda r: r[0]),
    "list": (lambda h: [[h]], lambda r: r[0][0]),
    "named": (lambda h: Pair(h, None), lambda r: r.maps),
    "dictionary": (lambda h: {"h": h, "more": {"h": h}}, lambda r: r["more"]["h"]),
    "dataclass": (lambda h: Record(h, (h, [h])), lambda r: r.rest[1][0]),
    "no skips": (lambda h: (h, ()), lambda r: r[0]),
}


class Encoder(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.layer, self.pack = nn.Conv2d(1, 3, 1), pack

    def forward(self, x, c_noise, conditioning):
        h = self.layer(x) * c_noise[:, None, None, None]
        return self.pack(h if conditioning.labels is None else h + conditioning.labels[:, None, None, None])


class Decoder(nn.Module):
    def __init__(self, unpack, width):
        super().__init__()
        self.layers, self.unpack = nn.Sequential(nn.Conv2d(3, width, 1), nn.Tanh(), nn.Conv2d(width, 1, 1)), unpack

    def forward(self, record):
        return self.layers(self.unpack(record))


def network(kind="tensor", encoders=1):
    torch.manual_seed(0)
    pack, unpack = RECORDS[kind]
    return MultiDecoder([Encoder(pack) for _ in range(encoders)], [Decoder(unpack, width) for width in (2, 5, 3)])


@pytest.mark.parametrize("encoders", [1, 3])
@pytest.mark.parametrize("kind", RECORDS)
def test_an_image_goes_through_its_stages_decoder_however_the_stage_is_given(kind, encoders):
    routed, labels = network(kind, encoders), torch.arange(7)
    by_hand = torch.cat(
        [
            routed.decoders[k](
                routed.encoders[k if encoders > 1 else 0](
                    X[i : i + 1], NOISE[i : i + 1], Conditioning(labels[i : i + 1])
                )
            )
            for i, k in enumerate(STAGE.tolist())
        ]
    )
    torch.testing.assert_close(routed(X, NOISE, STAGE, Conditioning(labels)), by_hand)
    order = STAGE.argsort(stable=True)
    grouped = routed(X[order], NOISE[order], COUNTS, Conditioning(labels[order]))
    torch.testing.assert_close(grouped, by_hand[order])
    for stage in range(3):
        rows = STAGE == stage
        torch.testing.assert_close(routed(X[rows], NOISE[rows], stage, Conditioning(labels[rows])), by_hand[rows])


def test_a_decoder_gets_no_gradient_from_other_stages():
    routed = network("dictionary")
    routed(X[:4], NOISE[:4], [4, 0, 0]).sum().backward()
    grads = [any(p.grad is not None for p in decoder.parameters()) for decoder in routed.decoders]
    assert grads == [True, False, False] and routed.encoders[0].layer.weight.grad is not None


def test_the_pieces_of_a_record_are_views_of_it():
    whole = torch.arange(12.0).reshape(6, 2)
    pieces = split({"a": whole, "b": (None, [whole])}, [1, 3, 2])
    assert [piece["a"].tolist() for piece in pieces] == [whole[:1].tolist(), whole[1:4].tolist(), whole[4:].tolist()]
    assert all(piece["b"][1][0].data_ptr() == piece["a"].data_ptr() for piece in pieces)
    with pytest.raises(TypeError, match="an encoder must give tensors"):
        split("words", [1, 1])


def test_the_number_of_encoders_must_fit():
    with pytest.raises(ConfigError, match="got 2 encoders and 3 decoders"):
        network(encoders=2)


def test_checkpointed_activations_have_the_same_gradients_and_survive_a_copy():
    plain, saving = network("tuple"), network("tuple")
    saving.checkpoint_activations()
    for routed in (plain, saving):
        routed(X, NOISE, STAGE).square().sum().backward()
    for first, second in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad)
    copied = copy.deepcopy(saving)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(X, NOISE, STAGE).any() and saving(X, NOISE, STAGE).any()


class Plain(nn.Module):
    def __init__(self, classes=0):
        super().__init__()
        self.layer, self.label = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(classes + 1, 1) if classes else None

    def forward(self, x, c_noise, labels=None):
        shift = 0 if self.label is None else self.label(labels)[:, :, None, None]
        return self.layer(x) + c_noise[:, None, None, None] + shift


def test_a_module_without_parts_is_a_network_of_one_stage():
    module = Plain(classes=4)
    denoiser = msd.Denoiser(module, "vp", shape=(1, 4, 4), classes=4).eval()
    assert len(denoiser.stages) == 1 and denoiser.backbone.architecture == "unified"
    labels = torch.full((7,), 4)
    assert torch.equal(denoiser(X, 1.0), denoiser(X, 1.0, labels))  # the label `classes` stands for none
    assert not torch.equal(denoiser(X, 1.0), denoiser(X, 1.0, labels - 1))
    assert torch.equal(denoiser(X, 1.0), denoiser(X, torch.tensor(1.0, dtype=torch.float64)))


def small(steps=6):
    return msd.TrainingConfig(steps=steps, batch_size=4, learning_rate=1e-2, save_every=3, log_every=1)


def trainer(steps=6):
    denoiser = msd.Denoiser(network("dataclass"), msd.EDM(), msd.Stages((0.3, 1.0)), shape=(1, 8, 8))
    return msd.Trainer(denoiser, tiny.images(), small(steps))


def losses(run):
    return [record["loss"] for record in msd.Run.open(run).metrics() if "loss" in record]


def test_a_network_of_ones_own_trains_resumes_and_is_loaded_by_its_object_alone(tmp_path):
    msd.fit(trainer(), tmp_path / "whole")
    msd.fit(trainer(3), tmp_path / "parts")
    assert msd.fit(trainer(), tmp_path / "parts").resumed == 3
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    first = msd.load_run(tmp_path / "whole", network=network("dataclass")).denoiser
    second = msd.load_run(tmp_path / "parts" / "model", network=network("dataclass")).denoiser
    assert torch.equal(first(X[:, :, :, :].repeat(1, 1, 2, 2), 0.5), second(X.repeat(1, 1, 2, 2), 0.5))
    assert torch.isfinite(msd.sample(first, 2, steps=3).images).all()
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model"]["network_class"].endswith(".Decoder")
    for folder, kind in ((tmp_path / "whole", ConfigError), (tmp_path / "whole" / "model", CheckpointError)):
        with pytest.raises(kind, match=r"is of the class .*Decoder, which is not imported .*; pass it: network="):
            msd.load_run(folder)
    with pytest.raises(CheckpointError, match="belongs to another architecture"):
        msd.load_run(tmp_path / "whole", network=Plain())


def test_the_cost_of_a_network_of_ones_own_is_counted():
    cost = msd.denoiser_cost(trainer().denoiser)
    # 1x1 convolutions on 64 pixels: 1 to 3 channels, 3 to w, w to 1; 2 FLOPs a multiply-accumulate.
    assert [stage.flops for stage in cost.stages] == [2 * 64 * (3 + 3 * w + w) for w in (2, 5, 3)]
    assert cost.encoder == 6 and cost.decoders == tuple(3 * w + w + w + 1 for w in (2, 5, 3))


def test_images_of_another_shape_are_refused():
    denoiser = msd.Denoiser(network(), msd.EDM(), msd.Stages((0.3, 1.0)), shape=(1, 4, 4))
    with pytest.raises(ConfigError, match=r"made for images of shape \(1, 4, 4\), and tiny has \(1, 8, 8\)"):
        msd.Trainer(denoiser, tiny.images(), small())


@dataclass(frozen=True, kw_only=True)
class Pointwise(Backbone):
    """A backbone in one file: what a configuration, a run directory and the command line need of it."""

    backbone: Literal["pointwise"] = "pointwise"
    widths: tuple[int, ...] = (2, 2)

    @property
    def capacity(self):
        return 3

    @property
    def capacities(self):
        return (self.capacity,) if self.architecture == "unified" else self.widths

    def with_capacities(self, capacities):
        return Pointwise(widths=capacities)

    def encoder(self, shape):
        return Encoder(lambda h: h)

    def decoder(self, capacity, encoder, shape):
        return Decoder(lambda r: r, capacity)


def test_a_backbone_of_ones_own_is_configured_trained_and_read_like_ours(tmp_path):
    config = msd.RunConfig(
        model=Pointwise(widths=(4, 2)), process=msd.VP(), stages=StagesConfig(edges=(1.0,)), training=small()
    )
    run = msd.train(config, tmp_path / "run", data=tiny.images()).run
    loaded = msd.load_run(run)
    assert loaded.config == config and loaded.denoiser.backbone == Pointwise(widths=(4, 2))
    assert msd.network_cost(Pointwise(), (1, 8, 8)).stages[0].flops == 2 * 64 * (3 + 6 + 2)
    assert msd.sample(loaded.denoiser, 2, steps=3).images.shape == (2, 1, 8, 8)
