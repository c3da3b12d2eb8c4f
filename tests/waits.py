"""What makes the host wait for a device, seen without one: meta tensors stand in for those on a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


class Waits(TorchDispatchMode):
    """Collects the names of operations that copy between the CPU and another device, and of those that read a value.

    Values of the meta device cannot be read; reads are counted on the CPU, as if it were a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.reads: list[str] = []
        self._calls = _Calls(self)

    def __enter__(self) -> "Waits":
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._calls.__exit__(*reason)

    def __torch_dispatch__(self, function: Any, types: Any, words: Any = (), named: Any = None) -> Any:
        result = function(*words, **(named or {}))
        name = function._schema.name
        kinds = {leaf.device.type for leaf in tree_leaves((words, named, result)) if isinstance(leaf, Tensor)}
        if name in ("aten::_to_copy", "aten::copy_") and len(kinds) > 1:
            self.copies.append(name)
        if name in READS:
            self.reads.append(name)
        return result


class _Calls(TorchFunctionMode):
    """`torch.tensor(values, device=...)` makes the tensor on the CPU and copies it; `tolist` reads without a trace."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, words: Any = (), named: Any = None) -> Any:
        named = named or {}
        if function is torch.tensor and torch.device(named.get("device") or "cpu").type != "cpu":
            self._waits.copies.append("torch.tensor")
        if function is Tensor.tolist:
            self._waits.reads.append("tolist")
        return function(*words, **named)
