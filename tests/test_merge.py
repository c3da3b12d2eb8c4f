"""From stages back to one network: equal decoders are the network itself, and the search finds the better one."""

import json
from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.inherit import branch
from multistage_diffusion.interop.merge import merge
from multistage_diffusion.runs import load_run
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.run import train

TRUNK = replace(tiny.SMALLEST, architecture="unified")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    out = tmp_path_factory.mktemp("merge") / "trunk"
    train(tiny.run_config(TRUNK, steps=40, log_every=40), out, data=tiny.images())
    return load_run(out).denoiser


@pytest.mark.parametrize("with_trunk", [True, False])
def test_equal_decoders_merge_to_the_network_itself(trunk, with_trunk):
    staged = branch(trunk, Stages(tiny.EDGES))
    merged = merge(staged, trunk=trunk if with_trunk else None)
    assert merged.weights == pytest.approx((1 / 3,) * 3) and merged.loss is None
    for a, b in zip(merged.denoiser.parameters(), trunk.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert merged.denoiser.network.stages == 1


def test_given_weights_are_taken(trunk):
    staged = branch(trunk, Stages(tiny.EDGES))
    tiny.randomise(staged.network.decoders[1])
    merged = merge(staged, weights=(0.0, 1.0, 0.0)).denoiser.network.decoders[0]
    for a, b in zip(merged.parameters(), staged.network.decoders[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    half = merge(staged, trunk=trunk, weights=(0.0, 0.5, 0.0)).denoiser.network.decoders[0]
    decoders = (half, staged.network.decoders[1], trunk.network.decoders[0])
    pairs = zip(*(decoder.parameters() for decoder in decoders), strict=True)
    for a, b, c in pairs:
        torch.testing.assert_close(a, (b + c) / 2)


@pytest.mark.slow
def test_the_search_leaves_out_a_decoder_that_was_spoilt(trunk):
    staged = branch(trunk, Stages(tiny.EDGES))
    tiny.randomise(staged.network.decoders[2])
    equal = merge(staged, weights=(1 / 3,) * 3).denoiser
    merged = merge(staged, tiny.images(40, seed=3), steps=80)
    assert sum(merged.weights) == pytest.approx(1, abs=1e-4) and abs(merged.weights[2]) < 0.12
    from multistage_diffusion.metrics.held_out import held_out_loss

    images = tiny.images(40, seed=3).take(torch.arange(20, 40))
    assert merged.loss == pytest.approx(held_out_loss(merged.denoiser, images, repeats=4).loss)
    assert merged.loss is not None and merged.loss < held_out_loss(equal, images, repeats=4).loss


def test_what_cannot_be_merged_is_one_line(trunk):
    with pytest.raises(ConfigError, match=r"decoders of its capacity 8; the network has 1 encoders and decoders of"):
        merge(tiny.denoiser(tiny.MODEL))
    staged = branch(trunk, Stages(tiny.EDGES))
    with pytest.raises(ConfigError, match="one for each of 3 stages"):
        merge(staged, weights=(0.5, 0.5))
    with pytest.raises(ConfigError, match="the trunk has another network"):
        merge(staged, trunk=tiny.denoiser(tiny.architecture("unified")))


def test_the_command_writes_a_model_that_starts_a_run(tmp_path, capsys):
    words = "--model.width 8 --model.decoder-widths 8 8 8 --model.multipliers 1 --model.blocks 1 --threads 1".split()
    words += "--training.steps 4 --training.batch-size 8 --training.branch-at 0.5".split()
    assert dispatch(["train", "digits", *words, "--out", str(tmp_path / "run")]) == 0
    options = ["--max-images", "32", "--steps", "10", "--threads", "1"]
    capsys.readouterr()
    merged = tmp_path / "merged"
    assert dispatch(["merge", str(tmp_path / "run"), "--out", str(merged), *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["weights"]) == 3 and document["loss"] > 0
    assert load_run(merged).denoiser.network.stages == 1
    again = ["--training.steps", "1", "--training.batch-size", "8", "--model.architecture", "unified", "--threads", "1"]
    assert dispatch(["train", "digits", "--init", str(merged), *again, "--out", str(tmp_path / "again")]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert dispatch(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "mine"), *options]) == 2
    assert "holds other files" in capsys.readouterr().err
