"""Files of weights (safetensors) into networks; names and shapes are compared before memory is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multistage_diffusion.errors import CheckpointError

_MAX_HEADER_BYTES = 2**21  # the names and shapes of some 20,000 tensors


@final
class Unfilled(TorchFunctionMode):
    """While it is on, parameters are made without their random values, for networks whose weights are read anyway."""

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Leave out functions of `torch.nn.init`, and random values in place, where they are for parameters."""
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, nn.Parameter):
                return target
        return func(*args, **kwargs)


def load_weights(network: nn.Module, path: Path) -> None:
    """Read a safetensors file into a network.

    Args:
        network: The network, whose names and shapes the file must have, all of them.
        path: The file.

    Raises:
        CheckpointError: The file is missing or damaged, or belongs to another architecture.
    """
    weights = read_weights(network, path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"cannot read weights {path}: {' '.join(str(error).split())}") from error


def read_weights(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, of a safetensors file that fits a network; errors as in `load_weights`."""
    require_fit(network, path)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights {path}: {' '.join(str(error).split())}") from error


def save_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; tensors that share memory, like tied weights, are written under each of their names.

    Args:
        tensors: Tensors by name.
        path: The file.
    """
    written, memory = dict[str, Tensor](), set[tuple[str, int]]()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = (str(tensor.device), tensor.untyped_storage().data_ptr())
        written[name] = tensor.clone() if place in memory else tensor
        memory.add(place)
    safetensors.torch.save_file(written, path)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """What a module's state holds beside its parameters, like the statistics of batch norms, by name."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}


def require_fit(network: nn.Module, path: Path) -> None:
    """Compare the names and shapes in a file's header with those of a network, which may be on the meta device.

    Args:
        network: The network.
        path: A safetensors file.

    Raises:
        CheckpointError: The file is missing or damaged, or belongs to another architecture.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MAX_HEADER_BYTES:
            raise CheckpointError(f"cannot read weights {path}: a header of {header} bytes is not that of a network")
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights {path}: {error}") from error
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise CheckpointError(
                f"{path} belongs to another architecture: {name} is {stored.get(name, 'missing')} there and "
                f"{expected.get(name, 'missing')} here"
            )
