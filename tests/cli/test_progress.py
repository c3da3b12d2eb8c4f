"""The bar on a terminal, the lines elsewhere."""

import io

import torch
from rich.console import Console

import tiny
from multistage_diffusion.cli import progress
from multistage_diffusion.cli.progress import reading_progress, training_progress
from multistage_diffusion.training.trainer import StepResult


def result(step, loss=0.5):
    return StepResult(step, step * 4, loss, (0.25, None, 1.0), 1e-3, 2.0)


def shown(monkeypatch, *, terminal=False, device=None, steps=(1, 2, 3, 4)):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    console = Console(file=out, force_terminal=terminal, width=200, soft_wrap=True)
    with training_progress(console, tiny.run_config(steps=100).training, device=device) as on_step:
        for step in steps:
            now[0] += 2.0
            on_step(result(step), 100)
    return out.getvalue()


def test_lines_where_there_is_no_terminal(monkeypatch):
    assert shown(monkeypatch).splitlines() == [
        "training step 2/100  loss 0.5000 (smoothed, weighted; stages 0.250 - 1.000)  2 images/s  0:03:16 left",
        "training step 4/100  loss 0.5000 (smoothed, weighted; stages 0.250 - 1.000)  2 images/s  0:03:12 left",
    ]


def test_the_memory_of_a_gpu_is_shown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**30)
    total = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    assert "2 images/s  3.0/80 GiB  0:03:16 left" in shown(monkeypatch, device=torch.device("cuda"))
    assert "GiB" not in shown(monkeypatch, device=torch.device("cpu"))


def test_a_bar_on_a_terminal(monkeypatch):
    text = shown(monkeypatch, terminal=True)
    assert "4/100" in text and "2 images/s" in text and "left" not in text


def test_the_longest_run_has_a_time_left(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 0.0)
    with training_progress(Console(file=out, width=200), tiny.run_config().training) as on_step:
        on_step(result(2), 10**12)
    assert "0 images/s" in out.getvalue() and out.getvalue().rstrip().endswith("left")


def test_reading_is_told_of_ever_less_often(monkeypatch):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    on_read = reading_progress(Console(file=out, width=200))
    for done in range(1000):
        on_read(done, 1000)
        now[0] += 0.125  # exact in binary
    lines = out.getvalue().splitlines()
    assert lines[0] == "read 40 of 1,000 pictures, 8 a second"
    assert [line.split()[1] for line in lines] == ["40", "80", "160", "320", "640"]
