"""One of two processes fails, is killed, hangs, hears a signal: both end, one line says why, nothing is lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lives import MODEL
from rank_life import life

import ranks
import tiny
from multistage_diffusion.runs.checkpoints import list_checkpoints
from runs import log, tensors

SAVE_EVERY = 4
HERE = Path(__file__).parent


def words(out, steps=12, *options):
    return ["train", "digits", "--out", str(out), *MODEL, "--training.steps", str(steps), "--training.save-every",
            str(SAVE_EVERY), *options]  # fmt: skip


def live(tmp_path, name, words, fault=None, **named):
    errors = tmp_path / name
    codes = ranks.run(life, errors, words, errors, fault, **named)
    return codes, *ranks.printed(errors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    codes, out, err = live(folder, "life", words(folder / "run", 12, "--json"))
    assert codes == [0, 0] and err == [line for line in err if not line.startswith("error")]
    document = json.loads("\n".join(out))  # one process prints, once
    assert document["step"] == 12 and document["images"] == 48
    return folder / "run"


def same(run, whole):
    assert tiny.bits_equal(tensors(run), tensors(whole))
    assert log(run) == log(whole)
    model = Path("model", "model.safetensors")
    assert (run / model).read_bytes() == (whole / model).read_bytes()


def only_error(lines):
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert not any("Traceback" in other for other in lines)
    return line


def seconds_since(folder):
    """Since the fault struck, by the clock of the file system."""
    (folder / "now").touch()
    seconds = (folder / "now").stat().st_mtime - (folder / "struck").stat().st_mtime
    print(f"over {seconds:.2f} s after the fault")
    return seconds


@pytest.mark.slow
def test_an_error_in_one_process_is_said_once_and_ends_both(tmp_path):
    codes, out, err = live(tmp_path, "life", words(tmp_path / "run", 12, "--json"), "6:error")
    assert seconds_since(tmp_path / "life") < 30
    assert codes == [3, 3] and out == []
    assert only_error(err) == "error: images/broken.png is damaged: replace it"
    assert [found.step for found in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4]


@pytest.mark.slow
def test_a_mistake_of_the_first_process_ends_both(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    codes, out, err = live(tmp_path, "life", words(tmp_path / "run"))
    assert codes == [2, 2] and out == []
    assert "holds files but no run" in only_error(err)


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_goes_on(whole, tmp_path):
    codes, _, err = live(tmp_path, "life", words(tmp_path / "run"), "6:kill")
    assert seconds_since(tmp_path / "life") < 30
    assert codes == [1, None]
    assert "no word from process 1 of 2" in only_error(err)
    assert [found.step for found in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4]
    assert live(tmp_path, "again", words(tmp_path / "run"))[0] == [0, 0]
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(whole, tmp_path):
    codes, _, err = live(tmp_path, "life", words(tmp_path / "run"), "5:term")
    assert codes == [143, 143]
    assert only_error(err).startswith("error: stopped by SIGTERM after step 6; the same command")
    assert [found.step for found in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4, 6]
    assert live(tmp_path, "again", words(tmp_path / "run"))[0] == [0, 0]
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_weights_that_differ_are_found_and_named(tmp_path):
    codes, _, err = live(tmp_path, "life", words(tmp_path / "run", 12, "--training.log-every", "3"), "0:perturb")
    assert codes == [4, 4]
    assert "weight decoders.1.head.bias differs between the processes after step 3" in only_error(err)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.slow
def test_a_spike_in_one_process_is_clipped_by_both(tmp_path):
    codes, _, _ = live(tmp_path, "life", words(tmp_path / "run", 6), "3:spike")
    assert codes == [0, 0]  # weights are compared after each step, and agree
    lines = [json.loads(line) for line in log(tmp_path / "run")]
    assert lines[3]["loss"] > 100 * lines[2]["loss"]
    assert lines[3]["clipped"] == 1 and lines[3]["gradient_norm"] > 100


@pytest.mark.slow
def test_a_process_that_hangs_is_named_when_time_is_up(tmp_path):
    began = time.monotonic()
    codes, _, err = live(tmp_path, "life", words(tmp_path / "run", 12, "--engine.timeout", "0.1"), "6:stop", hangs=[1])
    assert codes[0] == 1 and time.monotonic() - began < 120
    assert "no word from process 1 of 2" in only_error(err)


def torchrun(tmp_path, out, fault, *options):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(ranks.free_port()), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, str(HERE / "rank_life.py"), fault, *words(out, 12, "--json")], env=environment,
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_prints_one_document(whole, tmp_path):
    done = torchrun(tmp_path, tmp_path / "run", "none")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 12
    same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["6:kill", "6:error"])
def test_torchrun_restarts_once_and_ends_the_same(fault, whole, tmp_path):
    done = torchrun(tmp_path, tmp_path / "run", fault, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 12
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_torchrun_reports_our_line_as_the_cause(tmp_path):
    done = torchrun(tmp_path, tmp_path / "run", "6:error")
    assert seconds_since(tmp_path) < 30
    assert done.returncode == 1 and done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: images/broken.png is damaged: replace it"]
    assert "traceback : error: images/broken.png is damaged" in done.stderr
    assert "exitcode  : 3" in done.stderr


@pytest.mark.slow
def test_torchrun_ends_soon_after_a_kill_and_names_the_process(tmp_path):
    done = torchrun(tmp_path, tmp_path / "run", "6:kill")
    assert seconds_since(tmp_path) < 30
    assert done.returncode == 1 and done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "no word from process 1 of 2" in said[0]
