"""Routing: each image goes through the decoder of its stage, and through the encoder that the stages share.

Any modules can be encoders and decoders. An encoder maps (x, c_noise, conditioning) to a record of tensors with the
images along dimension 0; a decoder maps that record to the raw network output F, of the shape of x. Nothing here knows
of noise levels, edges or channels.

Source: Zhang et al. 2024, Sec. 4.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multistage_diffusion.conditioning import NO_CONDITIONING, Conditioning
from multistage_diffusion.errors import ConfigError

Batch = Float[Tensor, "batch *shape"]


@final
class MultiDecoder(nn.Module):
    """One decoder a stage; one encoder for all stages, or one for each.

    With one encoder and K decoders it is *multistage*, with K of each *separate*, with one of each *unified*.

    Args:
        encoders: One module, or one for each decoder: `encoder(x, c_noise, conditioning)` gives a record (tensor,
            tuple, named tuple, list, dictionary or dataclass of tensors, nested as you like, none allowed) with the
            images along dimension 0 of each tensor. A part may have a method `blocks()`, which lists its modules that
            may be checkpointed and sharded by themselves; without it the part is taken whole.
        decoders: One module a stage, the lowest noise first: `decoder(record)` gives F, of the shape of x. A decoder
            may let its images enter the encoder elsewhere: with a module `entry` and a number `entry_level` above 0,
            the encoder is called with `entry(x)`, the noise levels, the conditioning and `entry_level`.

    Raises:
        ConfigError: There are neither one encoder nor as many as decoders.
    """

    def __init__(self, encoders: nn.Module | Iterable[nn.Module], decoders: nn.Module | Iterable[nn.Module]) -> None:
        super().__init__()
        self.encoders, self.decoders = nn.ModuleList(_list(encoders)), nn.ModuleList(_list(decoders))
        if not len(self.decoders) or len(self.encoders) not in (1, len(self.decoders)):
            raise ConfigError(
                f"a multi-decoder network has one encoder or one for each decoder; it got {len(self.encoders)} "
                f"encoders and {len(self.decoders)} decoders"
            )

    @classmethod
    def unified(cls, module: nn.Module, *, classes: int = 0) -> MultiDecoder:
        """A network of one stage from a module without parts.

        Args:
            module: `module(x, c_noise)` gives F, of the shape of x; `module(x, c_noise, labels)` if there are classes.
            classes: Number of class labels; the label `classes` stands for none.

        Returns:
            The network; its weights are those of `module`.
        """
        return cls(_PassOn(), _Whole(module, classes))

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.decoders)

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """All encoders, then all decoders."""
        return (*self.encoders, *self.decoders)

    def encoder(self, stage: int) -> nn.Module:
        """The encoder of a stage: the shared one, or the stage's own."""
        return self.encoders[stage if len(self.encoders) > 1 else 0]

    def forward(
        self,
        x: Batch,
        c_noise: Float[Tensor, " batch"],
        stage: int | Sequence[int] | Int[Tensor, " batch"],
        conditioning: Conditioning = NO_CONDITIONING,
    ) -> Batch:
        """Raw network output F of each image by the decoder of its stage.

        Args:
            x: Preconditioned noisy images.
            c_noise: The process's conditioning value of each image.
            stage: The stage of the whole batch (int: sampling); how many images each stage has, those of stage 0 first
                (K counts: training; nothing is moved and no device is waited for); or the stage of each image, in any
                order (tensor).
            conditioning: Labels, augmentation and dropout seeds of the images.

        Returns:
            F, of the shape of `x`. An image's output does not depend on the other images.
        """
        if isinstance(stage, int):
            decoder: Any = self.decoders[stage]
            level = entry_level(decoder)
            entered = (decoder.entry(x), c_noise, conditioning, level) if level else (x, c_noise, conditioning)
            return decoder(self.encoder(stage)(*entered))
        if not isinstance(stage, Tensor):
            return self._grouped(x, c_noise, stage, conditioning)
        # Sort the images by stage, which keeps the order within a stage, and put the results back.
        order = stage.argsort(stable=True)
        counts = torch.bincount(stage, minlength=self.stages).tolist()
        return self._grouped(x[order], c_noise[order], counts, conditioning.rows(order))[order.argsort()]

    def _grouped(self, x: Tensor, c_noise: Tensor, counts: Sequence[int], conditioning: Conditioning) -> Tensor:
        """Images of a stage lie side by side: encode all at once (or by stage, if separate), decode slice by slice.

        The slices are views: the shared encoder runs once on the whole batch, and its backward pass gets one gradient,
        put together from those of the slices.
        """
        assert len(counts) == self.stages and sum(counts) == len(x), "counts must cover the batch"
        filled = {stage: count for stage, count in enumerate(counts) if count}  # other decoders get no gradient
        outputs, start = [], 0
        for together in self._encoded_together(filled):
            end = start + sum(together.values())
            rows, start = slice(start, end), end
            features = self._encode(x[rows], c_noise[rows], conditioning.rows(rows), together)
            pieces = split(features, list(together.values()))
            outputs += [self.decoders[stage](piece) for stage, piece in zip(together, pieces, strict=True)]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _encoded_together(self, counts: dict[int, int]) -> list[dict[int, int]]:
        """Neighbouring stages whose images enter the same encoder at the same place, with their counts."""

        def place(stage: int) -> tuple[int, int]:
            return stage if len(self.encoders) > 1 else 0, entry_level(self.decoders[stage])

        return [{stage: counts[stage] for stage in stages} for _, stages in itertools.groupby(counts, place)]

    def _encode(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning, counts: dict[int, int]) -> Any:
        """The features of the images of stages that are encoded together."""
        stage = next(iter(counts))
        encoder, level = self.encoder(stage), entry_level(self.decoders[stage])
        if not level:
            return encoder(x, c_noise, conditioning)
        pieces = zip(counts, x.split(list(counts.values())), strict=True)
        entered = [self.decoders[stage].entry(piece) for stage, piece in pieces]  # pyright: ignore[reportCallIssue]
        return encoder(torch.cat(entered) if len(entered) > 1 else entered[0], c_noise, conditioning, level)

    def blocks(self) -> list[list[nn.Module]]:
        """The blocks of each part, in the order of `parts`: what can be checkpointed or sharded by itself."""
        return [list(part.blocks()) if hasattr(part, "blocks") else [part] for part in self.parts]  # pyright: ignore

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, which repeats their forward pass; or all again.

        That takes less memory and a third more time.
        """
        for block in (block for blocks in self.blocks() for block in blocks):
            kind = getattr(type(block), "kept_whole", type(block))
            block.__class__ = _checkpointing(kind) if enabled else kind

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile each encoder and decoder by itself, in place: names of parameters stay, and so does the routing."""
        # Decoders share one forward function, and torch counts compilations by function, over all networks so far.
        torch._dynamo.config.recompile_limit += 4 * len(self.parts)  # pyright: ignore[reportPrivateImportUsage]
        for part in self.parts:
            part.compile(backend=backend, dynamic=False)

    def offload(self, stage: int | None, device: torch.device | str) -> None:
        """Keep one stage's decoder (and encoder, if separate) on a device and move the others to the CPU.

        Args:
            stage: The stage to keep; none brings all back.
            device: Where its weights go.
        """
        for group in (self.decoders, self.encoders) if len(self.encoders) > 1 else (self.decoders,):
            for index, module in enumerate(group):
                with torch.inference_mode(False):  # parameters moved in that mode could never be trained again
                    module.to(device if stage is None or index == stage else "cpu")


def entry_level(decoder: nn.Module) -> int:
    """Where a decoder's images enter the encoder: 0, as they are."""
    return getattr(decoder, "entry_level", 0)


def split(record: Any, counts: Sequence[int], *, strict: bool = True) -> list[Any]:
    """Cut a record of batch-first tensors into consecutive images.

    Args:
        record: A tensor, none, or a tuple, named tuple, list, dictionary or dataclass of such records.
        counts: How many images each piece has; together all.
        strict: Refuse what is neither; else all but tensors of that many images goes whole into each piece.

    Returns:
        A record of views for each piece. `torch.split` makes them, so that their gradients are put together once.

    Raises:
        TypeError: The record holds something else.
    """
    images, sizes = sum(counts), list(counts)
    if max(counts) == images:
        return [record] * len(counts)

    def cut(leaf: Any) -> Sequence[Any]:
        if isinstance(leaf, Tensor) and (strict or is_batch(leaf, images)):
            return leaf.split(sizes)
        if strict and leaf is not None:
            raise TypeError(
                f"an encoder must give tensors, or tuples, lists, dictionaries or dataclasses of them, not {leaf!r}"
            )
        return [leaf] * len(sizes)

    columns = zip(*map(cut, leaves(record)), strict=True)
    return [map_leaves(record, lambda leaf, column=column: next(column)) for column in map(iter, columns)]


def is_batch(leaf: Any, images: int) -> bool:
    """Whether something is a tensor with so many images along its first dimension."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == images


def leaves(record: Any) -> list[Any]:
    """The leaves of a record, in the order of `map_leaves`."""
    listed: list[Any] = []
    map_leaves(record, lambda leaf: listed.append(leaf) or leaf)
    return listed


def map_leaves(record: Any, function: Callable[[Any], Any]) -> Any:
    """The same record with a function of each leaf in its place, in a fixed order.

    Args:
        record: A leaf, or a tuple, named tuple, list, dictionary or dataclass of such records.
        function: Called with each leaf.

    Returns:
        A new record; dictionaries become plain ones.
    """
    if is_dataclass(record) and not isinstance(record, type):  # before mappings: some libraries' outputs are both
        names = [field.name for field in fields(record) if field.init]
        return replace(record, **{name: map_leaves(getattr(record, name), function) for name in names})
    if isinstance(record, Mapping):
        return {name: map_leaves(value, function) for name, value in record.items()}
    if isinstance(record, (tuple, list)):
        values = [map_leaves(value, function) for value in record]
        if isinstance(record, list):
            return values
        return type(record)(*values) if hasattr(record, "_fields") else tuple(values)
    return function(record)


def _list(modules: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList):
        return [modules]
    return list(modules)  # pyright: ignore[reportArgumentType]  # a ModuleList is iterable


@functools.cache
def _checkpointing(kind: type[nn.Module]) -> type[nn.Module]:
    """A block's class, with a forward pass that is repeated in the backward pass; as it is where there will be none.

    A class of its own, as FSDP makes them, survives copies of the module; a replaced `forward` would call the original.
    """

    class Checkpointing(kind):
        def forward(self, *inputs: Any) -> Any:
            if not torch.is_grad_enabled():
                return super().forward(*inputs)
            return checkpoint(super().forward, *inputs, use_reentrant=False)

    Checkpointing.__name__, Checkpointing.__qualname__ = kind.__name__, kind.__qualname__
    Checkpointing.kept_whole = kind  # pyright: ignore[reportAttributeAccessIssue]
    return Checkpointing


@final
class _PassOn(nn.Module):
    """The encoder of a network without one."""

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor | None]:
        return x, c_noise, conditioning.labels


@final
class _Whole(nn.Module):
    """A network without parts as a decoder."""

    def __init__(self, module: nn.Module, classes: int) -> None:
        super().__init__()
        self.module, self.classes = module, classes

    def forward(self, record: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        x, c_noise, labels = record
        if not self.classes:
            return self.module(x, c_noise)
        return self.module(x, c_noise, torch.full_like(c_noise, self.classes).long() if labels is None else labels)
