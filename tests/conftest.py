"""One thread for every test: results repeat to the bit only with the same number, and two cores are shared."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # after the variable, which is read once
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("here", deadline=None, max_examples=30, derandomize=True)  # the same tests on every machine
settings.load_profile("here")
