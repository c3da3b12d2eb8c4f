"""Where a step's time goes: every part is there, the parts are the whole, and what is trained is the same."""

import json
import time
from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import EngineConfig
from multistage_diffusion.multidecoder import Decoder
from multistage_diffusion.training import profile as module
from multistage_diffusion.training.profile import profile
from multistage_diffusion.training.run import build_trainer

BEFORE, AFTER = ["batch", "forward: input"], ["norm of the gradient, figures", "clipping", "optimiser", "averages"]


def parts(config, **options):
    return profile(config, tiny.images(), steps=2, **options)


def test_the_parts_of_a_step_and_their_order():
    found = parts(tiny.run_config())
    assert list(found.parts) == [
        *BEFORE, "forward: encoder", *(f"forward: decoder {k}" for k in range(3)), "forward: loss", "backward: loss",
        *(f"backward: decoder {k}" for k in (2, 1, 0)), "backward: encoder", *AFTER,
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in found.parts.values())
    assert found.watched_seconds == pytest.approx(sum(found.parts.values()))
    assert found.images_per_second == pytest.approx(4 / found.seconds)
    assert found.tflops > 0 and found.gpu_memory_gib is None


def test_separate_encoders_have_their_parts():
    found = parts(tiny.run_config(tiny.architecture("separate", tiny.SMALLEST), clip_norm=None))
    forward = [f"forward: {kind} {k}" for k in range(3) for kind in ("encoder", "decoder")]
    backward = [f"backward: {kind} {k}" for k in (2, 1, 0) for kind in ("decoder", "encoder")]
    expected = [*BEFORE, *forward, "forward: loss", "backward: loss", *backward]
    assert list(found.parts) == expected + [part for part in AFTER if part != "clipping"]


def test_batches_of_one_stage_and_accumulation():
    config = tiny.run_config(batches="single-p")
    found = parts(replace(config, engine=EngineConfig(gradient_accumulation=2)))
    stages = {part[-1] for part in found.parts if part.startswith("backward: decoder")}
    assert stages == {part[-1] for part in found.parts if part.startswith("forward: decoder")} and len(stages) >= 1


def test_a_slow_part_is_the_one_that_is_slow(monkeypatch):
    forward = Decoder.forward

    def slow(self, features):
        if self.norm.num_channels == 4:  # the narrow one of stage 2
            time.sleep(0.05)
        return forward(self, features)

    monkeypatch.setattr(Decoder, "forward", slow)
    found = parts(tiny.run_config()).parts
    assert found["forward: decoder 2"] > 0.05 > max(found["forward: decoder 0"], found["forward: decoder 1"])


def test_watching_changes_nothing():
    watched, alone = (build_trainer(tiny.run_config(), tiny.images()) for _ in range(2))
    module._listen(watched, module._Clock(torch.device("cpu")))
    watched.lap("")
    assert list(watched.run(3)) == list(alone.run(3))
    assert tiny.bits_equal(watched.denoiser.state_dict(), alone.denoiser.state_dict())


def test_the_command_prints_it_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "digits", "--model.width", "8", "--model.decoder-widths", "8", "8", "4", "--model.blocks", "1",
             "--model.attention", "--model.multipliers", "1", "--training.batch-size", "4", "--device", "cpu",
             "--threads", "1", "--profile", "--profile-steps", "2"]  # fmt: skip
    assert dispatch([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert sum(row["ms"] for row in found["parts"]) == pytest.approx(found["watched_step_ms"])
    assert (found["steps"], found["device"]) == (2, "cpu")
    assert "backward: decoder 1" in err and "images/s" in err
    assert list(tmp_path.iterdir()) == []
    assert dispatch([*words[:-1], "0"]) == 2
