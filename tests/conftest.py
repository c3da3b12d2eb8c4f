"""One thread for every test: results repeat to the bit only with the same number, and two cores are shared."""

import os
import signal

if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup leaves it: tests and their processes want to be told
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # after the variable, which is read once
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("here", deadline=None, max_examples=30, derandomize=True)  # the same tests on every machine
settings.load_profile("here")
