"""Which checkpoints are kept: the newest ones, and every n-th for good."""

import pytest

import tiny
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.runs.checkpoints import list_checkpoints, newest
from multistage_diffusion.training.run import train
from runs import train_until


def steps(out):
    found = list_checkpoints(out / "checkpoints")
    assert all(checkpoint.damage() is None for checkpoint in found)
    return [checkpoint.step for checkpoint in found]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, 0, [20]), (2, 0, [18, 20]), (1, 6, [6, 12, 18, 20]), (2, 12, [12, 18, 20]), (1, 7, [7, 14, 20]),
     (3, 3, [3, 6, 9, 12, 15, 18, 20])],
)  # fmt: skip
def test_the_newest_and_every_nth(keep, keep_every, left, tmp_path):
    train(tiny.run_config(steps=20, keep=keep, keep_every=keep_every), tmp_path / "run", data=tiny.images())
    assert steps(tmp_path / "run") == left


def test_they_outlive_a_resume_with_other_numbers(tmp_path):
    out = tmp_path / "run"
    train_until(8, out, tiny.run_config(keep=1, keep_every=3))
    assert steps(out) == [3, 6]
    train(tiny.run_config(steps=12, keep=1, keep_every=6), out, data=tiny.images())
    assert steps(out) == [6, 12]
    assert newest(out).step == 12


def test_a_negative_number_is_refused():
    with pytest.raises(ConfigError, match=r"training.keep-every must be at least 0, got -1"):
        tiny.run_config(keep_every=-1)
