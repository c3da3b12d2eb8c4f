"""The main job at a size that takes a second, and its report."""

import json
import re
from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.config import Sampler
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.studies.demo import DemoOptions, run_demo, step_flops
from multistage_diffusion.studies.report import chosen_steps, summary, verdict, write_report

CONFIG = replace(
    tiny.run_config(batch_size=16, warmup_images=16, save_every=100), sampling=Sampler(solver="ddim", steps=2)
)
OPTIONS = DemoOptions(tflops=1e-4, points=2, samples=8, shown=4)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSD_CACHE", str(folder / "cache"))
        said = []
        yield run_demo(CONFIG, folder / "out", OPTIONS, say=said.append), folder / "out", said


def test_both_models_spend_the_same_training_flops(demo):
    result, _, _ = demo
    budget = OPTIONS.tflops * 1e12
    for model in result.models.values():
        spent = model.points[-1].tflops * 1e12
        assert abs(spent - budget) <= step_flops(model.config, model.cost)
        assert sum(model.stage_images) == model.steps * 16
    assert result.models["multistage"].config.training == result.models["unified"].config.training
    assert result.models["multistage"].config.stages.edges == result.clustering.stages.edges


def test_report_is_one_self_contained_file(demo, tmp_path):
    result, _, _ = demo
    write_report(result, tmp_path / "report.html", "msd demo")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text
    assert text.count("data:image/png;base64,") == 4 and text.count("<svg") == 3
    assert f"{result.models['unified'].points[-1].fd:.2f}" in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert text.index(summary(result)["verdict"][:40]) < text.index("<section") < text.index("<svg")  # the answer first
    titles = re.findall(r"<title>(unified: held-out denoising loss [^<]*)</title>", text)
    assert len(titles) == OPTIONS.points and f"{result.models['unified'].points[-1].loss:.4g}" in titles[-1]
    write_report(result, tmp_path / "again.html", "msd demo")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_steps_shown_are_those_where_the_estimate_moves():
    still, ramp = [torch.zeros(1, 1, 2, 2)] * 10, [torch.full((1, 1, 2, 2), float(step)) for step in range(1, 6)]
    assert chosen_steps([*still, *ramp], 6) == [0, 10, 11, 12, 13, 14]
    assert chosen_steps(ramp, 9) == [0, 1, 2, 3, 4]
    assert set(chosen_steps(still, 4)) >= {0, 9}


def test_summary_holds_what_the_command_promises(demo):
    result, _, _ = demo
    document = json.loads(json.dumps(summary(result), allow_nan=False))
    assert len(document["stages"]["edges"]) == 2
    for model in document["models"].values():
        assert model.keys() >= {"fd", "val_loss", "gflops", "training_pflops"}
    assert document["models"]["unified"]["gflops"] > document["models"]["multistage"]["gflops"]


def test_verdict_follows_the_figures(demo):
    result, _, _ = demo

    def with_last(name, **figures):
        model = result.models[name]
        return replace(model, points=(*model.points[:-1], replace(model.points[-1], **figures)))

    better = dict(fd=1.0, fd_error=0.1, loss=0.1, loss_error=0.001)
    worse = dict(fd=2.0, fd_error=0.1, loss=0.2, loss_error=0.001)
    ahead = {"multistage": with_last("multistage", **better), "unified": with_last("unified", **worse)}
    behind = {"multistage": with_last("multistage", **worse), "unified": with_last("unified", **better)}
    assert "(50% lower)" in verdict(replace(result, models=ahead))
    assert "(100% higher)" in verdict(replace(result, models=behind))
    assert "within two standard errors" in verdict(replace(result, models={**ahead, "unified": ahead["multistage"]}))


def test_a_finished_demo_is_not_trained_again_and_another_is_refused(demo, monkeypatch):
    result, folder, _ = demo
    monkeypatch.setenv("MSD_CACHE", str(folder.parent / "cache"))
    again = run_demo(CONFIG, folder, OPTIONS, say=lambda line: None)
    assert {name: model.points for name, model in again.models.items()} == {
        name: model.points for name, model in result.models.items()
    }
    with pytest.raises(ConfigError, match="demo with other options"):
        run_demo(CONFIG, folder, replace(OPTIONS, seed=1), say=lambda line: None)


def test_a_folder_of_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    from multistage_diffusion.studies import demo as module

    with pytest.raises(ConfigError, match="holds other files"):
        module._claim(tmp_path / "out", CONFIG, OPTIONS)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"
