"""Trackers and callbacks: what they get, the same run again, and that no tracker can stop or delay a training."""

import json
import sys
import threading
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import tiny
from multistage_diffusion.config import LoggingConfig, to_dict
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.training import trackers
from multistage_diffusion.training.callbacks import LogRecord
from multistage_diffusion.training.report import flat_numbers
from multistage_diffusion.training.run import train
from multistage_diffusion.training.trackers import RECORD, TrackedRun, Trackers, require_installed
from runs import train_until

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


class Recorder:
    """A package that remembers its calls, and can fail or hang."""

    def __init__(self):
        self.calls, self.fails, self.gate = [], False, threading.Event()
        self.gate.set()

    def __call__(self, *words, **named):
        self.gate.wait(10)
        if self.fails:
            raise ConnectionError("the network is down\nfor long")
        self.calls.append((words, named))


@pytest.fixture
def wandb(monkeypatch):
    """As much of wandb as is used."""
    calls = Recorder()
    module = types.ModuleType("wandb")

    def init(**named):
        print("wandb says hello")
        if calls.fails:
            raise ConnectionError("the network is down")
        calls.init = named
        finish = lambda exit_code: calls("finish", exit_code)  # noqa: E731
        return types.SimpleNamespace(log=calls, finish=finish, define_metric=calls)

    module.init, module.Image, module.Settings = init, lambda path: f"image of {path}", dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def run_of(folder, reported=None):
    return TrackedRun(folder, "project", "name", to_dict(tiny.run_config()), reported or {})


def scalars(step, **values):
    return LogRecord(step, 4 * step, values)


def picture(step, folder):
    return LogRecord(step, 4 * step, picture=folder / "grid.png")


def logged(wandb):
    return [words[0] for words, _ in wandb.calls if words and isinstance(words[0], dict)]


def test_what_a_tracker_gets(wandb, tmp_path, capsys):
    with Trackers(("wandb",), run_of(tmp_path)) as callback:
        callback.on_log(scalars(1, loss=0.5))
        callback.on_log(picture(1, tmp_path))
    assert logged(wandb) == [{"loss": 0.5, "step": 1}, {"samples": f"image of {tmp_path / 'grid.png'}", "step": 1}]
    assert wandb.calls[-1] == (("finish", 0), {})
    assert wandb.init["config"]["training"]["batch_size"] == 4
    assert (wandb.init["project"], wandb.init["name"], wandb.init["resume"]) == ("project", "name", "allow")
    assert capsys.readouterr().out == ""


def test_a_resumed_run_is_the_same_run_and_repeats_nothing(wandb, tmp_path):
    with Trackers(("wandb",), run_of(tmp_path)) as callback:
        callback.on_log(scalars(1, loss=0.5))
    first = wandb.init["id"]
    wandb.calls.clear()
    for reported in ({"loss": 4, "fd": 2, "samples": 2}, {"loss": 2}):  # the second life ended before step 4
        with Trackers(("wandb",), run_of(tmp_path, reported)) as callback:
            assert wandb.init["id"] == first
            callback.on_log(scalars(4, loss=0.4, fd=7.0))
            callback.on_log(picture(2, tmp_path))
            callback.on_log(scalars(5, loss=0.3))
        assert logged(wandb) == [{"fd": 7.0, "step": 4}, {"loss": 0.3, "step": 5}]
        wandb.calls.clear()
    assert json.loads((tmp_path / RECORD).read_text())["reported"] == {"fd": 2, "loss": 4, "samples": 2}


def test_a_network_that_is_down_costs_a_warning(wandb, tmp_path):
    with pytest.warns(UserWarning) as caught, Trackers(("wandb",), run_of(tmp_path)) as callback:
        wandb.fails = True
        for step in range(3):
            callback.on_log(scalars(step + 1, loss=0.5))
    said = [str(warning.message) for warning in caught]
    assert said[0] == "wandb did not take a report: ConnectionError: the network is down"
    assert said[1:] == ["wandb did not take 4 reports in all; metrics.jsonl has them"]


def test_one_that_cannot_start_is_left_out(wandb, tmp_path):
    wandb.fails = True
    with pytest.warns(UserWarning, match="wandb is left out of this run: ConnectionError: the network is down"):
        callback = Trackers(("wandb",), run_of(tmp_path))
    with callback:
        callback.on_log(scalars(1, loss=0.5))


def test_one_that_hangs_delays_nothing(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_END", 0.05)
    monkeypatch.setattr(trackers, "_MAX_WAITING", 3)
    with pytest.warns(UserWarning) as caught:
        with Trackers(("wandb",), run_of(tmp_path)) as callback:
            wandb.gate.clear()
            begin = time.monotonic()
            for step in range(100):
                callback.on_log(scalars(step + 1, loss=0.5))
            assert time.monotonic() - begin < 1
    said = [str(warning.message) for warning in caught]
    assert said[0] == "wandb did not take a report: TimeoutError: 3 reports wait already"
    assert said[-1] == "wandb did not take everything within 0 s"
    wandb.gate.set()


def hangs(wandb, monkeypatch):
    """A second tracker whose server does not answer at the start."""
    started = threading.Event()

    def start(run, ids):
        started.set()
        wandb.gate.wait(120)
        return trackers._wandb(run, ids)

    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setitem(trackers._TRACKERS, "mlflow", start)
    monkeypatch.setattr(trackers, "_START", 0.2)
    monkeypatch.setattr(trackers, "_END", 0.2)
    wandb.gate.clear()
    return started


def test_a_server_that_hangs_at_the_start_delays_a_run_for_a_limited_time_and_no_other_tracker(
    wandb, tmp_path, monkeypatch
):
    started, steps, closed = hangs(wandb, monkeypatch), [], []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(
        trackers._TRACKERS, "tensorboard", lambda run, ids: ids.update(id="kept") or (steps.append, closed.append)
    )
    config = replace(tiny.run_config(), logging=LoggingConfig(trackers=("mlflow", "tensorboard")))
    begin = time.monotonic()
    with pytest.warns(UserWarning) as caught:
        train(config, tmp_path / "run", data=tiny.images())
    assert time.monotonic() - begin < 60 and started.is_set()
    assert [str(warning.message) for warning in caught] == [
        "mlflow is not up after 0 s; training goes on", "mlflow did not take everything within 0 s"
    ]  # fmt: skip
    assert [record.step for record in steps] == [2, 4, 6, 8] and closed == [False]
    assert json.loads((tmp_path / "run" / RECORD).read_text())["tensorboard"] == {"id": "kept"}
    wandb.gate.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "tracker mlflow"]:
        thread.join(10)  # with this test's package


def test_one_that_comes_up_late_gets_what_was_reported_before(wandb, tmp_path, monkeypatch):
    hangs(wandb, monkeypatch)
    monkeypatch.setattr(trackers, "_END", 20.0)
    with pytest.warns(UserWarning, match=r"mlflow is not up after 0 s; training goes on"):
        callback = Trackers(("mlflow",), run_of(tmp_path))
    with callback:
        callback.on_log(scalars(1, loss=0.5))
        wandb.gate.set()
        callback.on_log(scalars(2, loss=0.25))
    assert logged(wandb) == [{"loss": 0.5, "step": 1}, {"loss": 0.25, "step": 2}]
    assert json.loads((tmp_path / RECORD).read_text())["mlflow"] == {"id": wandb.init["id"]}


def test_a_run_that_fails_is_closed_as_failed(wandb, tmp_path):
    with pytest.raises(KeyError), Trackers(("wandb",), run_of(tmp_path)):
        raise KeyError
    assert wandb.calls[-1] == (("finish", 1), {})


def test_nothing_is_started_or_written_unasked(tmp_path):
    before = threading.active_count()
    with Trackers((), run_of(tmp_path)) as callback:
        callback.on_log(scalars(1, loss=0.5))
        assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ConfigError) as caught:
        require_installed((name,))
    assert str(caught.value).startswith(f"logging.trackers {name} cannot be imported (")
    assert str(caught.value).endswith(f"pip install 'multistage-diffusion[{name}]'")


def test_every_tracker_has_its_extra():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert PACKAGES.keys() == trackers._TRACKERS.keys() and PACKAGES.keys() <= project["optional-dependencies"].keys()


def test_numbers_of_a_line():
    line = {"loss": 1, "stage_loss": [0.5, None], "prdc": {"recall": 0.1}, "solver": "heun", "good": True}
    assert flat_numbers(line) == {"loss": 1.0, "stage_loss/0": 0.5, "prdc/recall": 0.1}


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_the_package_itself_where_installed(name, tmp_path, monkeypatch, capsys):
    """Two lives of a run, the second one asked to repeat what the first has told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    pytest.importorskip(PACKAGES[name])
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "grid.png")
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        for reported, steps in (({}, (1, 2, 3)), ({"loss": 3, "samples": 3}, (2, 3, 4, 5))):
            with Trackers((name,), run_of(folder, reported)) as callback:
                for step in steps:
                    callback.on_log(scalars(step, loss=1 / step))
                callback.on_log(picture(3, folder))
    assert not [warning for warning in caught if "did not take" in str(warning.message)]
    assert capsys.readouterr().out == ""
    record = json.loads((folder / RECORD).read_text())
    if name != "wandb":  # its offline files are its own
        assert read_back(name, folder, record[name]) == [1, 2, 3, 4, 5]
    else:
        files = sorted(path.name for path in (folder / "wandb").rglob("*.wandb"))
        assert files == [f"run-{record[name]['id']}.wandb"] * 2


def read_back(name, folder, record):
    """The steps of the loss."""
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Images("samples")] == [3]
        assert "config/text_summary" in events.Tags()["tensors"]
        return [event.step for event in events.Scalars("loss")]
    if name == "mlflow":
        from mlflow import MlflowClient

        found = MlflowClient().get_run(record["id"])
        assert found.info.status == "FINISHED" and found.data.params["training.batch_size"] == "4"
        return [metric.step for metric in MlflowClient().get_metric_history(record["id"], "loss")]
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("project") == [record["name"]]
    return [line["step"] for line in SQLiteStorage.get_logs("project", record["name"]) if line.get("loss")]


@pytest.mark.slow
def test_a_run_that_dies_twice_is_reported_once(wandb, tmp_path):
    """Steps 2, 4, 6 and 8 have lines, 3 and 6 checkpoints: a kill after step 5 takes the line of step 4 back."""
    config = replace(tiny.run_config(), logging=LoggingConfig(trackers=("wandb",), grid_every=4, grid_images=1))
    for step in (5, 7):
        train_until(step, tmp_path / "run", config)
    train(config, tmp_path / "run", data=tiny.images())
    lines = logged(wandb)
    assert [report["step"] for report in lines if "loss" in report] == [2, 4, 6, 8]
    assert [report["step"] for report in lines if "samples" in report] == [4, 8]
    assert lines[0].keys() >= {"stage_loss/0", "learning_rate", "gradient_norm", "images_per_second"}
    assert wandb.init["name"] == "run"


def test_a_missing_package_is_said_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = replace(tiny.run_config(), logging=LoggingConfig(trackers=("wandb",)))
    with pytest.raises(ConfigError, match=r"logging.trackers wandb"):
        train(config, tmp_path / "run", data=tiny.images())
    assert not (tmp_path / "run").exists()
