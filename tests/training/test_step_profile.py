"""Where a step's time goes: every part is there, the parts are the whole, and what is trained is the same."""

import json
import time
from dataclasses import replace

import pytest

import tiny
from multistage_diffusion.backbones.unet_parts import UNetDecoder
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import EngineConfig
from multistage_diffusion.errors import CheckpointError
from multistage_diffusion.training.profile import _network_scopes, profile
from multistage_diffusion.training.run import build_trainer

BACKWARD = ["backward", "optimizer", "averages", "rest"]


def profiled(config, **options):
    return profile(build_trainer(config, tiny.images()), steps=2, **options)


def parts(config):
    return {part.part: part.seconds for part in profiled(config).parts}


def test_the_parts_of_a_step_and_their_order():
    step = profiled(tiny.run_config())
    forward = ["forward: encoder", *(f"forward: decoder {k}" for k in range(3)), "forward: rest"]
    assert [part.part for part in step.parts] == ["batch", *forward, *BACKWARD]
    assert all(part.seconds > 0 and part.gpu_seconds is None for part in step.parts)
    assert step.profiled_seconds == pytest.approx(sum(part.seconds for part in step.parts))
    assert step.images_per_second == pytest.approx(4 / step.seconds)
    assert step.tflops > 0 and step.gpu_memory_gib is None


@pytest.mark.slow
def test_separate_encoders_have_their_parts():
    names = list(parts(tiny.run_config(tiny.architecture("separate", tiny.SMALLEST))))
    forward = [f"forward: {kind} {k}" for k in range(3) for kind in ("encoder", "decoder")]
    assert names == ["batch", *forward, "forward: rest", *BACKWARD]


def test_batches_of_one_stage_accumulation_and_checkpointing():
    config = tiny.run_config(batches="single-p")
    engine = EngineConfig(gradient_accumulation=2, activation_checkpointing=True)
    names = parts(replace(config, engine=engine))
    assert 1 <= len([name for name in names if name.startswith("forward: decoder")]) <= 3


def test_a_slow_part_is_the_one_that_is_slow(monkeypatch):
    forward = UNetDecoder.forward

    def slow(self, features):
        if self.norm.num_channels == 4:  # the narrow one of stage 2
            time.sleep(0.2)
        return forward(self, features)

    monkeypatch.setattr(UNetDecoder, "forward", slow)
    seconds = parts(tiny.run_config())
    assert seconds["forward: decoder 2"] > 0.2 > max(seconds["forward: decoder 0"], seconds["forward: decoder 1"])


def test_profiling_changes_nothing():
    watched, alone = (build_trainer(tiny.run_config(), tiny.images()) for _ in range(2))
    names = list(watched.denoiser.state_dict())
    with _network_scopes(watched.denoiser.network):
        results = list(watched.run(3))
    assert results == list(alone.run(3)) and list(watched.denoiser.state_dict()) == names
    assert tiny.bits_equal(watched.denoiser.state_dict(), alone.denoiser.state_dict())


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write .*/file/trace.json: .*; choose another --profile-trace"):
        profiled(tiny.run_config(), trace=tmp_path / "file" / "trace.json")


def test_the_command_prints_it_and_writes_the_trace_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "digits", "--model.width", "8", "--model.decoder-widths", "8", "8", "4", "--model.blocks", "1"]
    words += ["--model.attention", "--model.multipliers", "1", "--training.batch-size", "4", "--device", "cpu"]
    words += ["--threads", "1", "--profile", "--profile-steps", "2"]
    assert dispatch([*words, "--profile-trace", "trace.json", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert sum(row["ms"] for row in document["parts"]) == pytest.approx(document["watched_step_ms"])
    assert (document["steps"], document["device"]) == (2, "cpu")
    assert "forward: decoder 1" in err and "images/s" in err
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert names >= {"batch", "forward", "forward: decoder 1", "backward", "optimizer", "averages"}
    assert dispatch([*words[:-1], "0"]) == 2
