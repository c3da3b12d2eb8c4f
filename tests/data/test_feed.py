"""A set is the same from memory and from disk, however many threads read; a disk that hangs or fails is named."""

import gc
import threading
import time

import pytest
import torch

import tiny
from multistage_diffusion import devices
from multistage_diffusion.config import DataConfig
from multistage_diffusion.data import feed, load_data, shards
from multistage_diffusion.data.collection import Reading
from multistage_diffusion.data.feed import Resident, Streamed, make_feed
from multistage_diffusion.data.sources import convert
from multistage_diffusion.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 5_000)
    convert("digits", tmp_path / "digits", None, Reading())
    return load_data(f"shards:{tmp_path / 'digits'}")


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_batches_from_disk_are_those_from_memory(workers, digits):
    resident, streamed = Resident(digits, CPU), Streamed(digits, CPU, workers=workers, timeout=10.0)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, len(digits), (32,), generator=generator) for _ in range(20)]
    for number, batch in enumerate(batches):
        for later in batches[number + 1 : number + 1 + streamed.ahead]:
            streamed.prefetch(later)
        assert torch.equal(streamed.floats(batch), resident.floats(batch))
    for batch in reversed(batches):  # what nobody announced, while something else was
        streamed.prefetch(batches[0])
        assert torch.equal(streamed.floats(batch), resident.floats(batch))
        assert len(streamed._coming) <= len(batches)


def test_what_fits_is_held_and_what_does_not_is_streamed(digits, monkeypatch):
    assert isinstance(make_feed(digits, "cpu"), Resident)
    assert isinstance(make_feed(digits, "cpu", DataConfig(memory=0.0)), Streamed)
    monkeypatch.setattr(feed, "memory_of", lambda device: 4 * digits.images.nbytes - 1)
    assert isinstance(make_feed(digits, "cpu"), Streamed)
    assert isinstance(make_feed(digits, "cpu", DataConfig(memory=0.3)), Resident)
    assert isinstance(make_feed(tiny.images(), "cpu", DataConfig(memory=0.0)), Resident)  # is in memory already
    assert isinstance(make_feed(tiny.images(), "meta", DataConfig(memory=0.0)), Streamed)


def test_the_memory_is_what_the_control_group_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_CGROUP", tmp_path / "memory.max")
    whole = devices.memory_of(CPU)
    assert whole > 2**28
    for text, expected in (("1000000\n", 1_000_000), ("max\n", whole), (str(2**60), whole)):
        (tmp_path / "memory.max").write_text(text)
        assert devices.memory_of(CPU) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_by_whoever_read_it(workers, digits):
    path = digits.images.folder / "shard-00002.bin"
    content = bytearray(path.read_bytes())
    content[64 * 3] ^= 1
    path.write_bytes(content)
    streamed = Streamed(digits, CPU, workers=workers, timeout=10.0)
    with pytest.raises(DataError, match=r"shard-00002\.bin: row 3 is damaged"):
        for rows in torch.arange(len(digits)).split(50):
            streamed.floats(rows)
    assert len(streamed.floats(torch.tensor([0]))) == 1  # the threads live on


def test_a_disk_that_does_not_answer_is_noticed_in_time(digits, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(shards.Shards, "__getitem__", lambda *words: answer.wait(60))
    streamed = Streamed(digits, CPU, workers=2, timeout=0.5)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"4 images were not read within 0\.5 seconds; the disk or network"):
        streamed.floats(torch.arange(4))
    assert time.monotonic() - start < 2
    answer.set()


def test_the_threads_end_with_the_feed_whatever_is_still_announced(digits):
    """A thread that outlived it would be inside torch when the interpreter ends, which aborts the process."""
    before = set(threading.enumerate())
    streamed = Streamed(digits, CPU, workers=3, timeout=10.0)
    for number in range(400):
        streamed.prefetch(torch.arange(number, number + 200))
    threads = set(threading.enumerate()) - before
    assert len(threads) == 3
    del streamed
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)


def test_a_disk_that_hangs_does_not_keep_the_program(digits, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(shards.Shards, "__getitem__", lambda *words: answer.wait(60))
    streamed = Streamed(digits, CPU, workers=2, timeout=10.0)
    streamed.prefetch(torch.arange(4))
    start = time.monotonic()
    del streamed
    gc.collect()
    assert time.monotonic() - start < 2
    answer.set()
