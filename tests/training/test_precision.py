"""Half precision, loss scaling, recomputation, memory format and compilation change how a step computes, not what."""

import math
from dataclasses import replace

import pytest
import torch

import ranks
import tiny
from multistage_diffusion.config import EngineConfig
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.runs.checkpoints import list_checkpoints
from multistage_diffusion.training.precision import LossScale
from multistage_diffusion.training.run import build_trainer, train
from runs import log, same_run, tensors, train_until


def configuration(model=tiny.SMALLEST, **engine):
    return replace(tiny.run_config(model, batch_size=6, weight_decay=0.1), engine=EngineConfig(**engine))


def trainer(model=tiny.SMALLEST, **engine):
    made = build_trainer(configuration(model, **engine), tiny.images())
    tiny.randomise(made.denoiser.network)
    return made


def weights(made):
    return {name: tensor.clone() for name, tensor in made.denoiser.network.state_dict().items()}


def test_an_overflow_moves_nothing_and_the_step_is_repeated_at_half_the_scale():
    seen, calls = [], []
    made = trainer(precision="fp16")
    made.scale = LossScale(value=2.0**26)
    step, batch = made.optimizer.step, made.batches.__call__
    made.optimizer.step = lambda: (seen.append(weights(made)), step())  # what the first update begins from
    made.batches = lambda *words: (calls.append(words), batch(*words))[1]
    before, average = weights(made), {name: tensor.clone() for name, tensor in made.ema.average.items()}
    result = next(made.run(1))
    assert 0 < result.overflows <= 20 and made.scale.value == 2.0 ** (26 - result.overflows)
    assert calls == [(0, 0, 1)] * (result.overflows + 1)  # no image is lost
    assert len(seen) == 1 and tiny.bits_equal(seen[0], before)
    assert not tiny.bits_equal(made.ema.average, average)
    assert made.step == 1 and result.learning_rate == pytest.approx(3e-3 / 2)  # of the 6 first images of 12


def test_too_many_overflows_in_a_row_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(math.inf))
    with pytest.raises(NumericsError, match="overflowed 21 times in a row at step 1 in fp16") as caught:
        train(configuration(precision="fp16"), tmp_path / "run", data=tiny.images())
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_calm_scale_grows_and_goes_on_after_a_stop(tmp_path):
    scale = LossScale()
    for _ in range(2_000):
        scale.keep()
    assert (scale.value, scale.calm) == (131_072.0, 0)
    config = configuration(precision="fp16")
    train(config, tmp_path / "whole", data=tiny.images())
    train_until(5, tmp_path / "run", config)
    train(config, tmp_path / "run", data=tiny.images())
    same_run(tmp_path / "run", tmp_path / "whole")
    state = list_checkpoints(tmp_path / "run" / "checkpoints")[-1].state()
    assert state["loss_scale"] == {"value": 65_536.0, "calm": 8}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_only_activations_are_half(precision):
    made, exact = trainer(precision=precision), trainer()
    pairs = list(zip(made.run(4), exact.run(4), strict=True))
    assert all(half.loss == pytest.approx(full.loss, rel=0.02) for half, full in pairs)
    assert any(half.loss != full.loss for half, full in pairs)
    state = [tensor for entry in made.optimizer.state.values() for tensor in entry.values()]
    for tensor in (*made.denoiser.network.state_dict().values(), *made.ema.average.values(), *state):
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"channels_last": True}])
def test_recomputation_and_memory_format_change_nothing_but_rounding(options):
    model = replace(tiny.MODEL, dropout=0.3)
    made, plain = trainer(model, **options), trainer(model)
    pairs = list(zip(made.run(3), plain.run(3), strict=True))
    assert all(a.loss == pytest.approx(b.loss, rel=1e-5) for a, b in pairs)
    torch.testing.assert_close(pairs[0][0].gradient_norm, pairs[0][1].gradient_norm, rtol=1e-5, atol=0)


def test_what_another_engine_made_is_loaded_and_said(tmp_path):
    data = tiny.images()
    train(configuration(channels_last=True, activation_checkpointing=True), tmp_path / "whole", data=data)
    train_until(5, tmp_path / "run", configuration(channels_last=True, activation_checkpointing=True))
    with pytest.warns(UserWarning) as said:
        train(configuration(gradient_accumulation=2), tmp_path / "run", data=data)
    texts = [str(warning.message) for warning in said]
    for name in ("gradient-accumulation 1 and is continued with 2", "checkpointing True and is continued with False"):
        assert sum(f"{name}: equal up to rounding" in text for text in texts) == 1
    assert len(texts) == 3
    torch.testing.assert_close(tensors(tmp_path / "run"), tensors(tmp_path / "whole"), atol=1e-4, rtol=1e-2)
    assert len(log(tmp_path / "run")) == len(log(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation": 0}, "engine.gradient-accumulation must be in"),
        ({"timeout": 0.0}, "engine.timeout"),
        ({"channels_last": True, "parallel": "fsdp"}, "engine.channels-last must be false with fsdp"),
    ],
)
def test_engines_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)
    with pytest.raises(ConfigError, match=r"engine.gradient-accumulation must be at most training.batch-size 6"):
        configuration(gradient_accumulation=7)


def test_dropout_masks_belong_to_the_image():
    from multistage_diffusion import rng
    from multistage_diffusion.backbones.layers import Dropout

    layer = Dropout(0.13)
    x, number = torch.ones(256, 16, 8, 8), rng.bits(0, "dropout", torch.arange(256), 1)[:, 0]
    dropped = layer(x, number)
    assert torch.equal(layer(x[5:9], number[5:9]), dropped[5:9])
    assert torch.equal(dropped.unique(), torch.tensor([0.0, 1 / 0.87]))
    mask = (dropped == 0).double().flatten(1) - 0.13
    scale = 0.13 * 0.87
    assert abs(mask.mean()) < 4 * math.sqrt(scale / mask.numel())
    for dim, count in ((1, 1024), (0, 256)):  # shares of images, and of places, vary as independent draws do
        assert mask.mean(dim).var() * count / scale == pytest.approx(1.0, abs=0.3)
    between = mask @ mask.T / 1024 / scale
    assert between.fill_diagonal_(0).square().mean() * 1024 == pytest.approx(1.0, abs=0.1)  # pairs of images
    other = Dropout(0.13)
    other.layer = 1
    assert abs(((other(x, number) == 0).double().flatten(1) - 0.13).mul(mask).mean()) < 4 * scale / 512
    assert torch.equal(layer.eval()(x, number), x)


def compiled(rank, backend):
    """Under no test hook, which torch.compile could not look through."""
    from multistage_diffusion.multidecoder import MultiDecoder

    whole = MultiDecoder.compile_parts
    MultiDecoder.compile_parts = lambda self: whole(self, backend)
    model = replace(tiny.MODEL, dropout=0.3)
    runs = [list(trainer(model, compile=on, activation_checkpointing=on).run(3)) for on in (True, False)]
    return [[(result.loss, result.gradient_norm) for result in results] for results in runs]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_parts_compute_the_same(backend, tmp_path):
    """Inductor needs a C++ compiler on the CPU."""
    ((mine, plain),) = ranks.run(compiled, tmp_path, backend, size=1, seconds=600)
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(plain), rtol=1e-4, atol=1e-5)


def compiled_many(rank, networks):

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else a decoder is left as it is, with a line in a log
    kept = [replace(tiny.MODEL, dropout=0.3).network(tiny.SHAPE) for _ in range(networks)]
    for network in kept:
        network.compile_parts("eager")
        for each in (1, 2):
            network(torch.zeros(3 * each, *tiny.SHAPE), torch.zeros(3 * each), (each,) * 3)
    return len(kept)


@pytest.mark.slow
def test_no_decoder_of_many_networks_is_left_uncompiled(tmp_path):
    assert ranks.run(compiled_many, tmp_path, 4, size=1, seconds=600) == [4]


def compiled_among_others(rank, kind):
    from multistage_diffusion.multidecoder import MultiDecoder
    from multistage_diffusion.process_group import join

    whole = MultiDecoder.compile_parts
    MultiDecoder.compile_parts = lambda self: whole(self, "aot_eager")
    with join(torch.device("cpu"), 5.0) as processes:
        found = []
        for on in (True, False):
            made = build_trainer(
                configuration(tiny.MODEL, compile=on, parallel=kind), tiny.images(), processes=processes
            )
            found.append([(result.loss, result.gradient_norm) for result in made.run(3)])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_compiled_parts_of_several_processes_compute_the_same(kind, tmp_path):
    for mine, plain in ranks.run(compiled_among_others, tmp_path, kind, seconds=600):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(plain), rtol=1e-4, atol=1e-5)
