"""Published files of weights, known by their SHA-256: what is read is what was published, or nothing is."""

from __future__ import annotations

import hashlib
import io
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from multistage_diffusion.data.cache import cache_directory
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import read_regular, write_atomic

_TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Published:
    """A file that its authors published.

    Attributes:
        name: Name of the file.
        sha256: SHA-256 of its content, in hexadecimal digits.
        size: Its length in bytes.
        url: Where it is; none for a file that comes in a package.
    """

    name: str
    sha256: str
    size: int
    url: str | None = None


def fetch(published: Published, hint: str) -> Path:
    """The file: from the cache, or downloaded into it.

    Args:
        published: The file, which must have a URL.
        hint: What to do without a network, for the message.

    Returns:
        A file in the folder `weights` of the cache directory.

    Raises:
        ConfigError: It cannot be downloaded, or something else is at the URL.
        CheckpointError: The cache cannot be written.
    """
    path = cache_directory() / "weights" / published.name
    if path.is_file() and path.stat().st_size == published.size:
        return path
    assert published.url is not None
    try:
        with urllib.request.urlopen(published.url, timeout=_TIMEOUT) as answer:
            content = answer.read(published.size + 1)
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"cannot download {published.url} ({reason}); {hint}") from error
    _check(content, published, published.url)
    write_atomic(path, content)
    return path


def read_weights(path: Path, published: Published, network: nn.Module) -> None:
    """Load a published file into a network that was made on the meta device.

    The file is a pickle, which can hold programs: it is read only if it is the published one to the bit, and then
    only tensors are.

    Args:
        path: A copy of the file.
        published: What it must be.
        network: Gets the weights, on the CPU, and is left in evaluation mode without gradients.

    Raises:
        ConfigError: No such file, or not the published one.
        CheckpointError: Its tensors are not those of the network.
    """
    try:
        content = read_regular(path, published.size)
    except OSError as error:
        raise ConfigError(f"cannot read {path} as {published.name}: {error.strerror}") from error
    _check(content, published, str(path))
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is of another network: {str(error).splitlines()[1].strip()[:200]}") from error
    network.eval().requires_grad_(False)


def _check(content: bytes, published: Published, where: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != published.sha256:
        raise ConfigError(
            f"{where} is not {published.name} as published: SHA-256 {digest[:12]}... of {len(content)} bytes instead "
            f"of {published.sha256[:12]}... of {published.size}"
        )
