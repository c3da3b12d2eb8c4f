"""Training batches: images, noise and noise levels, all pure functions of (seed, global sample index)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.classes import TrainedClasses, shown
from multistage_diffusion.config import AugmentSigns, TrainingConfig
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.feed import Feed, make_feed
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import Process
from multistage_diffusion.records import check
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.augment import augment

_BELOW_ONE = 1 - 2.0**-53


@dataclass(frozen=True)
class Batch:
    """One batch; rows of a stage lie side by side, stage 0 first.

    Attributes:
        images: (B, C, H, W) clean images in [-1, 1], float32.
        noise: (B, C, H, W) standard normal noise, float32.
        sigma: (B,) noise levels, float64.
        weight: (B,) importance weights, float32: the mean of weight * loss over the whole batch estimates the loss
            under the training distribution without bias (for `single-uniform` batches the weights are 1, as in the
            paper).
        index: (B,) global sample indices, int64.
        counts: How many images each stage has here.
        batch_counts: How many images each stage has in the whole batch, of which this may be a micro-batch.
        counted: Whether each stage's images here count; not those that fill up a micro-batch without an image of a
            stage.
        labels: (B,) classes, `classes` for a hidden one, int64; none for an unconditional network.
        augment: (B, 9) how each image was augmented, float32; none without EDM's augmentation.
    """

    images: Tensor
    noise: Tensor
    sigma: Tensor
    weight: Tensor
    index: Tensor
    counts: tuple[int, ...]
    batch_counts: tuple[int, ...]
    counted: tuple[bool, ...]
    labels: Tensor | None
    augment: Tensor | None = None


@dataclass(frozen=True)
class _MicroBatch:
    """The rows of a batch that one of n micro-batches has.

    It has every n-th row, so that micro-batches differ by one row at most, in each stage and in all.

    A stage of which no row falls to a micro-batch gives it one of its rows with weight 0, so that every micro-batch
    uses the same decoders: DDP wants a gradient of each parameter, and FSDP gathers the same parts everywhere.
    """

    rows: Tensor
    weight: Tensor
    counts: tuple[int, ...]
    counted: tuple[bool, ...]

    @classmethod
    def of(cls, batch_counts: tuple[int, ...], index: int, total: int, device: torch.device) -> _MicroBatch:
        """Rows of a batch whose stages lie side by side, `batch_counts` rows each."""
        rows: list[int] = []
        counts, counted, start = [], [], 0
        for count in batch_counts:
            selected = [row for row in range(start, start + count) if row % total == index]
            counted.append(bool(selected))
            selected = selected or [start] * (count > 0)
            rows += selected
            counts.append(len(selected))
            start += count
        weight = torch.tensor(counted, dtype=torch.float32).repeat_interleave(torch.tensor(counts))
        return cls(torch.tensor(rows, device=device), weight.to(device), tuple(counts), tuple(counted))


def stage_counts(shares: Sequence[float], batch_size: int, least: int = 1) -> tuple[int, ...]:
    """Split a batch over the stages, in proportion, with at least one image each.

    Args:
        shares: Positive weight of each stage.
        batch_size: Images in the batch.
        least: Images that each stage has at least.

    Returns:
        Counts that sum to `batch_size`, by largest remainders above the least number of images.

    Raises:
        ConfigError: Fewer images than the stages need.
    """
    spare = batch_size - least * len(shares)
    if spare < 0:
        text = f"{least * len(shares)}, {'one image' if least == 1 else f'{least} images'} a stage"
        raise ConfigError(f"training.batch-size must be at least {text}, got {batch_size}")
    total = sum(shares)
    above = [max(0.0, batch_size * share / total - least) for share in shares]
    scale = spare / sum(above) if sum(above) > 0 else 0.0
    counts = [least + int(value * scale) for value in above]
    order = sorted(range(len(shares)), key=lambda stage: (counts[stage] - least - above[stage] * scale, stage))
    for stage in order[: batch_size - sum(counts)]:
        counts[stage] += 1
    return tuple(counts)


def first_counts(config: TrainingConfig, shares: Sequence[float]) -> tuple[int, ...]:
    """Images of each stage in the mixed batches that training begins with.

    Args:
        config: Batch size and quotas.
        shares: Share of each stage in the training distribution.
    """
    return stage_counts(shares if config.quotas == "auto" else config.quotas or shares, config.batch_size)


def with_classes(denoiser: Denoiser, data: Examples, label_dropout: float) -> Examples:
    """The data with labels as numbers of a conditional model, which from now on knows the names of its classes.

    Args:
        denoiser: The model; one that was trained before keeps its numbers, and takes data whose classes are among them.
        data: What it is trained on.
        label_dropout: Share of labels that is hidden.

    Raises:
        ConfigError: The model was trained on other classes, or every label would be hidden.
    """
    hidden = denoiser.classes > 0 and label_dropout == 1
    check(not hidden, "training.label-dropout", "below 1 with classes, which would not be learned", label_dropout)
    if not denoiser.classes or data.labels is None or int(data.labels.max()) >= denoiser.classes:
        return data  # `Batches` refuses what does not fit
    before = denoiser.trained_classes
    if before is not None and before.names != data.classes:
        data = replace(data, labels=before.match(data.name, data.classes, data.labels), classes=before.names)
    assert data.labels is not None
    record = TrainedClasses.of(data.classes, data.labels)
    if before is not None:
        record = replace(record, images=tuple(map(sum, zip(before.images, record.images, strict=True))))
    denoiser.trained_classes = record
    if (unseen := denoiser.classes - len(record.seen)) > 0:
        empty = [name for name, images in zip(record.names, record.images, strict=True) if images == 0]
        warnings.warn(
            f"model.classes is {denoiser.classes}, and {data.name} has training images of {len(record.seen)} classes"
            f"{f' (none of {shown(empty)})' if empty else ''}: {unseen} are never trained, and cannot be drawn",
            stacklevel=3,
        )
    return data


@final
class Batches:
    """Makes the batch of any step, without state but the shares of the stages.

    Args:
        data: Training images, or their latents.
        process: Gives the training distribution.
        stages: The partition that the network sees.
        config: Batch size, kind of batches, quotas, seed.
        flip: Mirror half of the images left to right.
        augment_probability: Probability of each of EDM's geometric augmentations, of which the network must be told.
        augment_signs: Signs of their labels.
        classes: Number of labels of a conditional network; 0 hides the labels.
        device: Where batches are made.
        feed: Where the images come from; by default from the memory of the device, as 8-bit integers or latents, or
            from disk if they do not fit.

    Raises:
        ConfigError: A stage has no probability under the training distribution, or the labels do not fit.
    """

    def __init__(
        self,
        data: Examples,
        process: Process,
        stages: Stages,
        config: TrainingConfig,
        *,
        flip: bool = False,
        augment_probability: float = 0.0,
        augment_signs: AugmentSigns = "edm",
        classes: int = 0,
        device: torch.device | str = "cpu",
        feed: Feed | None = None,
    ) -> None:
        self.process, self.config, self.classes = process, config, classes
        self.flip, self.augment_probability = flip, augment_probability
        self.augment_signs: AugmentSigns = augment_signs
        self.shares = stages.shares(process)
        edges = torch.tensor([0.0, *stages.edges, float("inf")], dtype=torch.float64)
        self._cdf = process.cdf(edges).tolist()
        for stage, share in enumerate(self.shares):
            if share <= 0:
                low, high = stages.bounds(stage)
                raise ConfigError(
                    f"stage {stage} (sigma {low:g} to {high:g}) never occurs in training under {process.kind}; "
                    f"move stages.edges {stages.edges}"
                )
        if classes and data.labels is None:
            why = f" ({data.notes['labels']})" if "labels" in data.notes else ""
            raise ConfigError(f"model.classes is {classes}, and {data.name} has no labels{why}; choose model.classes 0")
        if classes and data.labels is not None and int(data.labels.max()) >= classes:
            raise ConfigError(
                f"model.classes is {classes}, and {data.name} has {len(data.classes)} classes ({shown(data.classes)}); "
                f"choose model.classes {len(data.classes)}"
            )
        self.device, self._total = torch.device(device), len(data)
        self.feed = make_feed(data, self.device) if feed is None else feed
        self._labels = data.labels.to(self.feed.device) if classes and data.labels is not None else None
        self.counts = first_counts(config, self.shares)
        self._weight = self._weights().to(device)
        self._orders: dict[int, Tensor] = {}
        self._micro_batches: dict[tuple[tuple[int, ...], int, int, torch.device], _MicroBatch] = {}

    def set_shares(self, shares: Sequence[float] | None) -> None:
        """Divide mixed batches over the stages in proportion to shares, two images each at least; none: as before."""
        counts = self.counts if shares is None else stage_counts(shares, self.config.batch_size, least=2)
        if counts != self.counts:
            self.counts = counts
            self._weight = self._weights().to(self.device)

    def __call__(self, step: int, index: int = 0, total: int = 1) -> Batch:
        """The batch of a step, or a micro-batch of it.

        Args:
            step: Steps taken before, from 0.
            index: Which micro-batch, from 0.
            total: How many micro-batches the batch is cut into. All have the same stages.

        Returns:
            Always the same images, noise and noise levels for the same (data, configuration, step), shared by the
            micro-batches.
        """
        size, seed = self.config.batch_size, self.config.seed
        sample = torch.arange(step * size, (step + 1) * size, device=self.device)  # global sample indices
        batch_counts = counts = self._split(step)
        counted = tuple(count > 0 for count in batch_counts)
        picked = self._pick(step, index, total)
        # The noise levels of a stage are stratified over all of its rows, so each micro-batch draws them all; images
        # and noise it makes for its own rows alone.
        sigma = self.process.icdf(self._positions(batch_counts, rng.uniform(seed, "sigma", sample, 1)[:, 0]))
        weight = self._weight
        if total > 1:
            part = self._micro_batch(batch_counts, index, total, self.device)
            sample, sigma = sample[part.rows], sigma[part.rows]
            weight, counts, counted = weight[part.rows] * part.weight, part.counts, part.counted
        images = self.feed.floats(picked)
        for later in range(step + 1, step + 1 + self.feed.ahead):
            self.feed.prefetch(self._pick(later, index, total))
        if self.flip:
            mirrored = rng.bits(seed, "flip", sample, 1)[:, :, None, None] < 0
            images = torch.where(mirrored, images.flip(3), images)
        numbers = None
        if self.augment_probability:
            images, numbers = augment(images, seed, sample, self.augment_probability, self.augment_signs)
        labels = None
        if self._labels is not None:
            hidden = rng.uniform(seed, "label", sample, 1)[:, 0] < self.config.label_dropout
            labels = torch.where(hidden, self.classes, self._labels[picked].to(self.device, non_blocking=True))
        noise = rng.normal(seed, "noise", sample, images.shape[1:])
        return Batch(images, noise, sigma, weight, sample, counts, batch_counts, counted, labels, numbers)

    def _micro_batch(self, batch_counts: tuple[int, ...], index: int, total: int, device: torch.device) -> _MicroBatch:
        """The rows of a micro-batch; moved to a device once for each of the few ways that stages fill a batch."""
        key = (batch_counts, index, total, device)
        if key not in self._micro_batches:
            self._micro_batches[key] = _MicroBatch.of(batch_counts, index, total, device)
        return self._micro_batches[key]

    def _weights(self) -> Tensor:
        """The weight of each row; made once for given counts, so that no step waits for a copy to the device.

        Stage k has the share p_k of the training distribution and n_k of the batch's B rows. With the weight
        p_k B / n_k the mean of weight * loss over the rows is sum_k p_k (mean loss of stage k), without bias.
        """
        size = self.config.batch_size
        if self.config.batches != "mixed":
            return torch.ones(size)
        weights = [share * size / count for share, count in zip(self.shares, self.counts, strict=True)]
        return torch.tensor(weights, dtype=torch.float32).repeat_interleave(torch.tensor(self.counts))

    def _split(self, step: int) -> tuple[int, ...]:
        """How many rows each stage has in this step."""
        if self.config.batches == "mixed":
            return self.counts
        draw = float(rng.uniform(self.config.seed, "stage", torch.tensor([step]), 1))
        if self.config.batches == "single-uniform":
            stage = int(draw * len(self.shares))
        else:
            stage = sum(draw > edge for edge in self._cdf[1:-1])
        return tuple(self.config.batch_size if k == stage else 0 for k in range(len(self.shares)))

    def _positions(self, counts: tuple[int, ...], draws: Tensor) -> Float[Tensor, " batch"]:
        """Positions u in the training distribution: a stage's interval cut into as many cells as rows, one draw each.

        Row i of n in stage k, with its interval [a, b] of the cumulative distribution, is at a + (b - a) (i + draw)/n.
        With `training.overlap` the interval is wider, and the stage's decoder learns beyond its edges.
        """
        positions = []
        for stage, rows in enumerate(draws.split(counts)):
            cell = (torch.arange(len(rows), device=draws.device) + rows) / max(len(rows), 1)
            low, high = self._cdf[stage], self._cdf[stage + 1]
            beyond = self.config.overlap * (high - low)
            low, high = max(low - beyond, 0.0), min(high + beyond, 1.0)
            positions.append(torch.lerp(torch.full_like(cell, low), torch.full_like(cell, high), cell))
        return torch.cat(positions).clamp(max=_BELOW_ONE)  # a sum may round to 1, where sigma can be infinite

    def _pick(self, step: int, index: int, total: int) -> Int[Tensor, " rows"]:
        """Which images: every epoch is a fresh order of all of them; a batch may span epochs."""
        size, position, picked = self.config.batch_size, step * self.config.batch_size, []
        while size > 0:
            epoch, start = divmod(position, self._total)
            rows = self._order(epoch)[start : start + size]
            picked.append(rows)
            position, size = position + len(rows), size - len(rows)
        whole = torch.cat(picked)
        return whole if total == 1 else whole[self._micro_batch(self._split(step), index, total, self.feed.device).rows]

    def _order(self, epoch: int) -> Int[Tensor, " images"]:
        """The order of an epoch; two are kept, for what is read ahead of the end of one."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(min(self._orders))
            order = rng.permutation(self.config.seed, "order", epoch, self._total)
            self._orders[epoch] = order.to(self.feed.device)
        return self._orders[epoch]
