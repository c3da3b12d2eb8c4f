"""What processes tell one another outside of the steps: each may fail or be slow, and all go on alike, or none."""

import contextlib
import os
import signal
import time

import pytest
import torch

import ranks
from multistage_diffusion import process_group
from multistage_diffusion.errors import ConfigError, DataError, PeerError, UserError
from multistage_diffusion.process_group import SINGLE, ProcessGroup, _require_gpus, join


def talk(rank):
    """Everything that is said, twice over under the same names: what is said later is not taken for what was before."""
    heard = []
    with join(torch.device("cpu"), 1.0) as processes:
        for turn in range(2):
            heard.append(processes.gather_objects(10 * turn + rank))
            try:
                with processes.all_or_none():
                    if rank == turn:
                        raise DataError(f"file {turn} is damaged")
            except DataError as error:
                heard.append(str(error))
            except PeerError as error:
                heard.append([str(error), error.exit_code])
            with processes.all_or_none():
                heard.append(turn)
            with processes.local_main_first():
                heard.append(processes.store.check([f"first {turn}"]))
                processes.store.set(f"first {turn}", "")
            with contextlib.suppress(PeerError if rank else DataError), processes.section() as section:
                if rank == 0:
                    raise DataError("left early")
                section.barrier()
                heard.append("not reached")
            with pytest.raises(PeerError if rank else DataError, match="no network"), processes.local_main_first():
                raise DataError("no network")
        differs = pytest.raises(ConfigError, match="the options of process 1 are not")
        with differs if rank else contextlib.nullcontext():
            processes.require_same("the options", f"{rank}")
    return heard


def test_all_go_on_alike_or_none(tmp_path):
    assert ranks.run(talk, tmp_path) == [
        [[0, 1], "file 0 is damaged", 0, False, [10, 11], ["process 1 failed: file 1 is damaged", 3], 1, False],
        [[0, 1], ["process 0 failed: file 0 is damaged", 3], 0, True, [10, 11], "file 1 is damaged", 1, True],
    ]


def wait_for_a_silent_one(rank, number):
    """Process 1 computes for longer than the silence that is borne, or is killed, or halted."""
    process_group._SILENCE = 2.0
    try:
        with join(torch.device("cpu"), 1.0) as processes:
            if rank == 1 and number is None:
                end = time.monotonic() + 5
                while time.monotonic() < end:
                    sum(range(1000))
            elif rank == 1:
                os.kill(os.getpid(), number)
            return processes.gather_objects(rank)
    except UserError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_who_waits_for_a_killed_or_halted_process_names_it(number, tmp_path):
    found, _ = ranks.run(wait_for_a_silent_one, tmp_path, number, hangs=[1] if number == signal.SIGSTOP else [])
    assert found.startswith("no word from process 1 of 2: killed")


@pytest.mark.slow
def test_a_process_that_only_takes_long_is_waited_for(tmp_path):
    assert ranks.run(wait_for_a_silent_one, tmp_path, None) == [[0, 1], [0, 1]]


def test_one_process_alone_needs_nobody():
    assert SINGLE.gather_objects(3) == [3] and SINGLE.broadcast("a") == "a" and not SINGLE.is_cancelled()
    with pytest.raises(DataError), SINGLE.all_or_none():
        raise DataError("a file is damaged")
    with SINGLE.local_main_first():
        assert SINGLE.is_main


@pytest.mark.parametrize(("num", "size"), [(10, 1), (10, 3), (2, 3), (0, 2)])
def test_the_parts_follow_each_other(num, size):
    parts = [ProcessGroup(rank, size).shard(num) for rank in range(size)]
    assert [index for part in parts for index in part] == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_processes_than_gpus_are_refused_once(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    _require_gpus(8)
    for rank, kind in (("0", ConfigError), ("1", PeerError)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(
            kind, match=r"8 processes were started on a machine with 4 GPUs: .* --nproc-per-node 4"
        ) as e:
            _require_gpus(4)
        assert e.value.exit_code == 2
