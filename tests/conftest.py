"""One thread for every test: results repeat to the bit only with the same number, and two cores are shared."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # after the variable, which is read once

torch.set_num_threads(1)
