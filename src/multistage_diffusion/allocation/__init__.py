"""Decoder capacities under a budget of FLOPs, from laws that short proxy runs are measured for."""

from multistage_diffusion.allocation.laws import (
    Allocation,
    Law,
    Measurement,
    allocate_sampling,
    allocate_training,
    fit_law,
)
from multistage_diffusion.allocation.proxies import Choice, allocate, candidate_widths, proxy_widths, run_proxies

__all__ = [
    "Allocation",
    "Choice",
    "Law",
    "Measurement",
    "allocate",
    "allocate_sampling",
    "allocate_training",
    "candidate_widths",
    "fit_law",
    "proxy_widths",
    "run_proxies",
]
