"""The staged transformer trains: resumed to the bit, in several processes, recomputed, compiled, allocated."""

import json
from dataclasses import replace

import pytest
import torch

import ranks
import tiny
from multistage_diffusion.allocation.laws import Law
from multistage_diffusion.allocation.proxies import candidate_widths, proxy_widths, widths_for_sampling
from multistage_diffusion.backbones import Transformer
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import EngineConfig
from multistage_diffusion.process_group import join
from multistage_diffusion.recipes import recipe
from multistage_diffusion.runs import load_run
from multistage_diffusion.studies.budgets import BUDGETS, PUBLISHED, budget
from multistage_diffusion.studies.cells import widths
from multistage_diffusion.training.distributed import gather, put
from multistage_diffusion.training.run import build_trainer, train
from runs import same_run, train_until

MODEL = Transformer(
    width=16, depth=3, trunk=2, decoder_widths=(24, 16, 8), decoder_blocks=(2, 1, 1), head_channels=8, qk_norm=True
)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    config = tiny.run_config(MODEL)
    train(config, tmp_path / "whole", data=tiny.images())
    train_until(5, tmp_path / "cut", config)
    assert train(config, tmp_path / "cut", data=tiny.images()).resumed == 3
    same_run(tmp_path / "whole", tmp_path / "cut")


def trained(engine, processes=None, batches="mixed"):
    """A few steps from weights random everywhere: zeros would hide mistakes."""
    config = replace(tiny.run_config(MODEL, batches=batches, warmup_images=0, learning_rate=1e-4), engine=engine)
    options = {} if processes is None else {"processes": processes}
    trainer = build_trainer(config, tiny.images(), **options)
    start = tiny.randomise(MODEL.network(tiny.SHAPE)).state_dict()
    for name, target in trainer.denoiser.network.state_dict().items():
        put(target, start[name] / 2)
    losses = [result.loss for result in trainer.run(4)]
    return {"weights": gather(trainer.denoiser.network.state_dict()), "losses": losses}


def in_processes(rank):
    with join(torch.device("cpu"), 1.0) as processes:
        cases = (("ddp", "mixed"), ("fsdp", "mixed"), ("fsdp", "single-uniform"))
        return [trained(EngineConfig(parallel=kind), processes, batches) for kind, batches in cases]


def without_keys(weights):
    """Without what a softmax does not see, the biases of keys, of which Adam makes steps out of rounding."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith("qkv.bias")}


@pytest.mark.slow
def test_two_processes_and_recomputed_blocks_train_as_one_process_does(tmp_path):
    alone = {batches: trained(EngineConfig(), batches=batches) for batches in ("mixed", "single-uniform")}
    found, _ = ranks.run(in_processes, tmp_path)
    found.append(trained(EngineConfig(activation_checkpointing=True)))
    for result, batches in zip(found, ("mixed", "mixed", "single-uniform", "mixed"), strict=True):
        expected = alone[batches]
        torch.testing.assert_close(
            without_keys(result["weights"]), without_keys(expected["weights"]), atol=1e-5, rtol=0
        )
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.slow
def test_capacities_under_a_budget_are_those_that_heads_can_have():
    config = recipe("digits-dit")
    candidates = candidate_widths(config.model)
    assert config.model.capacity in candidates and len(proxy_widths(config.model)) == 4
    for capacity in (*candidates, *proxy_widths(config.model)):
        assert config.model.with_capacities((capacity,)).capacities == (capacity,)
    law = Law(0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    chosen = widths_for_sampling(config, (1, 8, 8), [law] * 3, candidates, 2e8, 1e4)
    assert set(chosen.capacities) <= set(candidates)


@pytest.mark.parametrize("name", BUDGETS)
def test_studies_vary_the_transformer_as_they_vary_the_unet(name):
    base = budget(name, "fashion-mnist", "dit").base
    model, side = base.model, base.data.resolution or 32
    assert isinstance(model, Transformer) and base.process == budget(name, "fashion-mnist").base.process
    for factor in (0.25, 0.5, 0.75):
        narrow = model.with_width(factor)
        assert narrow.width == factor * model.width and narrow.capacity < model.capacity
        narrow.unified().check_shape((1, side, side))
    for factors in (PUBLISHED, (1.0, 1.0, 0.5, 0.25)):
        capacities = widths(model, *factors)
        assert model.with_capacities(capacities).capacities == capacities
        assert [round(capacity / model.capacity, 1) for capacity in capacities] == pytest.approx(factors, abs=0.15)


def compiled(rank):
    """Under no test hook, which torch.compile could not look through."""
    from multistage_diffusion.multidecoder import MultiDecoder

    whole = MultiDecoder.compile_parts
    MultiDecoder.compile_parts = lambda self: whole(self, "aot_eager")
    return trained(EngineConfig(compile=True))


@pytest.mark.slow
def test_compiled_parts_train_as_the_others_do(tmp_path):
    (found,), expected = ranks.run(compiled, tmp_path, size=1, seconds=600), trained(EngineConfig())
    torch.testing.assert_close(without_keys(found["weights"]), without_keys(expected["weights"]), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("allocated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_from_clusters_to_figures_by_the_commands(tmp_path, capsys, allocated):
    stages, run = str(tmp_path / "stages.json"), str(tmp_path / "run")
    cluster = ["cluster", "digits", "--recipe", "digits-dit", "--stages", "3", "--samples", "500", "--out", stages]
    budget = ["--allocate", "0.5", "--allocate-for", "sampling", "--proxy-steps", "4"]
    assert dispatch([*cluster, *(budget if allocated else [])]) == 0
    document = json.loads((tmp_path / "stages.json").read_text())
    if not allocated:
        document["decoder_widths"] = [192, 128, 32]
        (tmp_path / "stages.json").write_text(json.dumps(document))
    assert len(document["decoder_widths"]) == 3
    words = ["--stages", stages, "--training.steps", "4", "--training.batch-size", "8", "--model.classes", "10"]
    assert dispatch(["train", "digits-dit", "--out", run, *words]) == 0
    model = load_run(run).denoiser.backbone
    assert isinstance(model, Transformer) and list(model.capacities) == document["decoder_widths"]
    capsys.readouterr()
    assert (
        dispatch(["sample", run, "--num", "2", "--steps", "3", "--class", "3", "--out", str(tmp_path / "x"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["images"] == 2
    assert dispatch(["evaluate", run, "--metrics", "loss", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    assert dispatch(["export", run, "--out", str(tmp_path / "model.safetensors")]) == 0
    assert (tmp_path / "model.safetensors").stat().st_size > 0


def test_the_option_model_backbone_chooses_the_family(capsys):
    words = ["--model.backbone", "dit", "--model.width", "64", "--model.decoder-widths", "64", "64", "64", "--dry-run"]
    assert dispatch(["train", "digits", *words, "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert (model["backbone"], model["width"], model["depth"], model["decoder_widths"]) == ("dit", 64, 12, [64] * 3)
    assert dispatch(["train", "digits-dit", "--model.backbone", "unet", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["decoder_widths"] == [128] * 3
    assert dispatch(["train", "digits", "--model.backbone", "dot", "--dry-run"]) == 2
    assert 'no backbone dot (a class of your own must be imported first); did you mean "dit"' in capsys.readouterr().err
    assert dispatch(["train", "digits", "--model.backbone", "custom", "--dry-run"]) == 2
    assert "model.backbone must be a family that a configuration can build" in capsys.readouterr().err
