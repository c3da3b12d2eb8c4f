"""Where memory does not suffice for a batch, half of it is drawn at once; the images are the same."""

import subprocess
import sys

import pytest
import torch

import tiny
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import is_out_of_memory
from multistage_diffusion.sampling import Trace, sample


def scarce(monkeypatch, most, error=torch.OutOfMemoryError):
    """Let the network run out of memory above a number of images, in the middle of a batch."""
    sizes, forward = [], Denoiser.forward

    def run(self, x, sigma, *words, **named):
        sizes.append(len(x))
        if len(x) > most and len(sizes) > 2:
            raise error("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return forward(self, x, sigma, *words, **named)

    monkeypatch.setattr(Denoiser, "forward", run)
    return sizes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize(("most", "batches"), [(3, [5, 3]), (1, [5, 3, 2, 1])])
def test_the_batch_is_halved_and_no_image_changes(error, most, batches, monkeypatch):
    denoiser = tiny.denoiser()
    whole = sample(denoiser, 7, steps=4, solver="dpmpp-2m", batch_size=1)
    sizes = scarce(monkeypatch, most, error)
    with pytest.warns(UserWarning, match="memory does not suffice") as caught:
        found = sample(denoiser, 7, steps=4, solver="dpmpp-2m", batch_size=5)
    assert str(caught[0].message) == "memory does not suffice for 5 images at once: going on with 3"
    assert len(caught) == len(batches) - 1
    assert list(dict.fromkeys(sizes))[: len(batches)] == batches
    assert found.seeds == whole.seeds
    torch.testing.assert_close(found.images, whole.images, rtol=1e-4, atol=1e-4)


def test_other_errors_and_a_single_image_are_not_tried_again(monkeypatch):
    scarce(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        sample(tiny.denoiser(), 1, steps=4)
    with pytest.raises(torch.OutOfMemoryError):
        sample(tiny.denoiser(), 4, steps=4, callback=Trace(1))
    assert not is_out_of_memory(RuntimeError("sizes differ"))


@pytest.mark.slow
def test_with_little_memory():
    """A limit on the address space, an allocation that the CPU refuses, and the images all the same."""
    code = """
import resource, warnings, torch, tiny
from multistage_diffusion.sampling import sample
torch.set_num_threads(1)
denoiser = tiny.denoiser()
whole = sample(denoiser, 5, steps=1, solver="euler", batch_size=5)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = sample(denoiser, 20_000, steps=1, solver="euler", batch_size=20_000)
torch.testing.assert_close(found.images[:5], whole.images, rtol=1e-4, atol=1e-4)
print(len(caught), len(found.images))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="tests", env={"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    halvings, images = done.stdout.split()
    assert int(halvings) >= 1 and images == "20000"
