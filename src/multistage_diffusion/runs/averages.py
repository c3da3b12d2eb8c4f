"""Averages of any length (sigma_rel) put together from the snapshots of power-function averages that a run kept.

A snapshot's profile is known in closed form, and so is the one wanted. The combination of snapshots whose profile comes
nearest in the mean square has the weights of a small linear system; it is solved in float64, under the condition that
the weights sum to 1.

Source: Karras et al. 2024, Sec. 3.2 and App. C. The condition is ours: without it, a few snapshots far from the
length wanted shrink the network (two of them at 0.05 and 0.10 of training give 0.2 only 76 % of its size).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import check_directory, read_json

FOLDER = "ema"
STATE = "state.json"
_STEP = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"ema-(\d\.\d+)\.safetensors")
LONGEST = 0.28  # relative width; a power function with exponent 0, the plain mean over all of training, has 0.2887
_FAR = 0.1  # share of the wanted profile that may be missed without a word


@dataclass(frozen=True)
class Profile:
    """The profile of an average.

    Attributes:
        length: Its relative width, sigma_rel.
        images: Images seen when it was taken.
    """

    length: float
    images: int


@dataclass(frozen=True)
class Combination:
    """How to put an average together.

    Attributes:
        weights: Share of each snapshot, float64; they sum to 1, and some may be negative.
        error: Norm of the difference between the profile wanted and the one had, as a share of the former's.
    """

    weights: Float[Tensor, " snapshots"]
    error: float


def file_name(length: float) -> str:
    """The file of an average, in a checkpoint or a snapshot.

    Args:
        length: Its relative width.

    Returns:
        `ema-0.05.safetensors`, for example.
    """
    return f"ema-{length}.safetensors"


def list_snapshots(run: Path) -> list[Path]:
    """The snapshots of a run, oldest first, valid or not.

    Args:
        run: The run directory.

    Returns:
        Their directories.
    """
    folder = run / FOLDER
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def rebuild(run: Path, checkpoint: Path, length: float, network: nn.Module) -> Combination:
    """Give a network the average of a length, as training up to a checkpoint would have tracked it.

    Args:
        run: The run directory, whose snapshots up to the checkpoint are used.
        checkpoint: A valid checkpoint of the run, whose averages are used too.
        length: Relative width, sigma_rel.
        network: Takes the average.

    Returns:
        How it was put together. The error is small for lengths near the tracked ones and those between.

    Raises:
        ConfigError: The run tracked no averages, or the length is out of range.
        CheckpointError: A file is unreadable, or belongs to another architecture.
    """
    power_exponent(length)
    now = _images(checkpoint)
    known: dict[Profile, Path] = {}
    for folder in [*list_snapshots(run), checkpoint]:
        if folder != checkpoint and (damage := check_directory(folder, (STATE,))):
            warnings.warn(f"{damage}; the snapshot is left out", stacklevel=2)
        elif (images := _images(folder)) <= now:
            files = ((_FILE.fullmatch(path.name), path) for path in folder.iterdir())
            known |= {Profile(float(match[1]), images): path for match, path in files if match}
    if not known:
        raise ConfigError(
            f"{run} tracked no average that another length could be made of: train with --training.sigma-rel 0.05 0.1"
        )
    combination = combine(tuple(known), Profile(length, now))
    if combination.error > _FAR:
        warnings.warn(
            f"the {len(known)} averages that {run} stored come only within {combination.error:.0%} of the profile of "
            f"length {length}; choose a length nearer to those tracked, or take snapshots more often",
            stacklevel=2,
        )
    _add_up(list(known.values()), combination.weights.tolist(), network)
    return combination


def combine(known: Sequence[Profile], wanted: Profile) -> Combination:
    """The combination of profiles that is nearest to another one in the mean square, and sums to 1.

    Args:
        known: Profiles of the snapshots, all different.
        wanted: The profile to come near to.

    Returns:
        The weights and what is left of the difference.
    """
    profiles = [*known, wanted]
    power = torch.tensor([power_exponent(profile.length) + 1.0 for profile in profiles], dtype=torch.float64)
    time = torch.tensor([profile.images / wanted.images for profile in profiles], dtype=torch.float64)
    products = _products(power, time)
    norms = products.diagonal().sqrt()
    cosines = products / (norms[:, None] * norms)
    count = len(known)
    system = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    system[:count, :count] = cosines[:count, :count]
    system[count, :count] = system[:count, count] = 1.0 / norms[:count]  # Lagrange's multiplier of the sum
    right = torch.cat((cosines[:count, count], (1.0 / norms[count])[None]))
    solution = torch.linalg.lstsq(system, right[:, None], rcond=1e-14, driver="gelsd").solution[:count, 0]
    missed = 1.0 - 2.0 * solution @ cosines[:count, count] + solution @ cosines[:count, :count] @ solution
    return Combination(solution * norms[count] / norms[:count], float(missed.clamp(min=0.0).sqrt()))


def _products(power: Tensor, time: Tensor) -> Tensor:
    """Integrals of the product of each two profiles p tau^(p-1) / t^p, which end at their t."""
    p, q, t, s = power[:, None], power, time[:, None], time
    ratio = torch.where(t <= s, (t / s) ** q, (s / t) ** p)  # a profile's share before the end of the other one
    return p * q / (p + q - 1.0) * ratio / torch.minimum(t, s)


@torch.no_grad()
def _add_up(files: Sequence[Path], weights: Sequence[float], network: nn.Module) -> None:
    """Tensor by tensor in float64, so that memory holds one of them, whatever the number of files."""
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
            for name, parameter in network.named_parameters():
                total = torch.zeros(parameter.shape, dtype=torch.float64)
                for file, weight in zip(opened, weights, strict=True):
                    total += weight * file.get_tensor(name).double().view_as(total)
                parameter.copy_(total)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"cannot combine the averages of {files[0].parent}: {error}") from error


def _images(folder: Path) -> int:
    """Images seen when a checkpoint or a snapshot was written."""
    try:
        return int(read_json(folder / STATE)["images"])
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE} does not say how many images were seen: {error}") from error


def relative_width(exponent: float) -> float:
    """Standard deviation of a power-function profile, as a share of training so far.

    Args:
        exponent: At least 0.

    Returns:
        sigma_rel: the standard deviation of a Beta(exponent + 1, 1) variable.
    """
    return math.sqrt((exponent + 1.0) / (exponent + 3.0)) / (exponent + 2.0)


def power_exponent(length: float) -> float:
    """The exponent of the power function with a relative width, by bisection.

    Args:
        length: Relative width (sigma_rel).

    Returns:
        The exponent, to rounding.

    Raises:
        ConfigError: A length outside (0, 0.28].
    """
    if not 0.0 < length <= LONGEST:
        raise ConfigError(f"the length of an average must lie in (0, {LONGEST}], got {length}")
    low, high = 0.0, 1.0 / length  # the width of an exponent is less than 1 / (exponent + 2)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if relative_width(middle) > length else (low, middle)
    return high
