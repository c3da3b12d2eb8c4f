"""Classifier features: those of a small network trained on the labels of a source, made once and kept in the cache.

ImageNet features say little about 8 x 8 digits; the last hidden layer of a network that tells the source's classes
apart says more. It has 64 features, so that a few hundred images give a usable covariance.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from multistage_diffusion import rng
from multistage_diffusion.data import Images
from multistage_diffusion.data.cache import cache_directory
from multistage_diffusion.errors import CheckpointError, ConfigError, DataError, NumericsError
from multistage_diffusion.files import read_json, write_atomic, write_json
from multistage_diffusion.metrics.extractor import FeatureExtractor

VERSION = 1  # of everything below that decides the weights: raise it and cached classifiers are made anew
NUM_FEATURES = 64
_SEED = 0
_LARGEST_SIDE = 32  # larger images are averaged down to this many pixels first
_SMALLEST_SIDE = 4  # pooling stops here
_BATCH = 64
_EPOCHS = 20
_MOST_SAMPLES = 250_000  # drawn in training, whatever the size of the set
_PEAK_RATE = 3e-3
_WARM_UP = 0.2  # share of the steps
_WEIGHT_DECAY = 0.05
_HIDDEN_SCALE = 0.3  # tried on digits: a smaller start separates damaged from held-out images better than 1
_BLOCK = 256  # images a forward pass


@final
class Classifier(FeatureExtractor):
    """A small classifier of images of one shape.

    Its features are the last hidden layer before its activation, so that none is dead, scaled to mean 0 and variance 1
    over the training images.

    Attributes:
        shape: Channels, height and width of the images.
        classes: Names of the classes, in the order of the logits.
    """

    resize = f"to {_LARGEST_SIDE} pixels by averaging, larger images only"
    block = _BLOCK

    def __init__(
        self, name: str, shape: tuple[int, int, int], classes: tuple[str, ...], accuracy: float | None = None
    ) -> None:
        """Weights drawn from a fixed seed, without touching torch's generators."""
        super().__init__()
        self.name, self.shape, self.classes, self.accuracy = name, shape, classes, accuracy
        self.num_features, self.num_classes = NUM_FEATURES, len(classes)
        channels, height, width = shape[0], *_reduced(shape[1:])
        layers: list[nn.Module] = []
        with torch.device("meta"):  # so that torch's own initialisation draws nothing
            for filters in (16, 32, 64) if min(height, width) > 16 else (32, 64):
                layers.append(nn.Conv2d(channels, filters, 3, padding=1))
                if min(height, width) > _SMALLEST_SIDE:
                    layers.append(nn.MaxPool2d(2))
                    height, width = height // 2, width // 2
                layers.append(nn.GELU())
                channels = filters
            self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, NUM_FEATURES))
            self.head = nn.Linear(NUM_FEATURES, self.num_classes)
        self.to_empty(device="cpu")
        self.center = nn.Buffer(torch.zeros(NUM_FEATURES))
        self.spread = nn.Buffer(torch.ones(NUM_FEATURES))
        self._draw_weights()

    def extract(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """Features and logits of images in [-1, 1] of the right shape."""
        if tuple(x.shape[1:]) != self.shape:
            raise DataError(f"{self.name} is for images of shape {self.shape}, got {tuple(x.shape[1:])}")
        hidden = self._hidden(x)
        return (hidden - self.center) / self.spread, self._logits(hidden)

    def train_logits(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits with their graph, for training."""
        return self._logits(self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        size = _reduced((x.shape[2], x.shape[3]))
        x = x if size == tuple(x.shape[2:]) else F.adaptive_avg_pool2d(x, size)
        return self.body(x.contiguous(memory_format=torch.channels_last))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(F.gelu(hidden))

    def _draw_weights(self) -> None:
        """He et al. 2015: normal with variance 2 / fan-in (the hidden layer's smaller); biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
                continue
            normal = rng.normal(_SEED, f"classifier/{name}", torch.zeros(1, dtype=torch.int64), parameter.shape)
            parameter.data.copy_(normal[0] * math.sqrt(2.0 / math.prod(parameter.shape[1:])))
        self.body[-1].get_parameter("weight").data.mul_(_HIDDEN_SCALE)


def classifier_features(
    train: Images, test: Images | None = None, *, device: torch.device | str = "cpu", cache: Path | None = None
) -> FeatureExtractor:
    """The classifier of a source: from the cache, or trained now (digits: 2 seconds, Fashion-MNIST: about a minute).

    It is trained on the CPU by one thread, so it is the same whatever device or number of threads the rest uses.

    Args:
        train: Labelled images to train on.
        test: Held-out images of the same source, for the accuracy; without them it is not measured.
        device: Where the extractor will work.
        cache: Folder of cached classifiers; by default `features` in the cache directory.

    Returns:
        The extractor, in evaluation mode.

    Raises:
        DataError: The images have no labels or fewer than two classes, or the two sets do not match.
        NumericsError: Training diverged.
    """
    if train.labels is None or (test is not None and test.labels is None):
        why = f" ({train.notes['labels']})" if "labels" in train.notes else ""
        raise DataError(f"{train.name}: features need labels of at least two classes, and this source has none{why}")
    if len(train.classes) < 2:
        raise DataError(f"{train.name}: features need at least two classes, and it has {', '.join(train.classes)}")
    if test is not None and train.shape != test.shape:
        raise DataError(f"{train.name}: training images are {train.shape}, and the held-out ones {test.shape}")
    if test is not None and train.classes != test.classes:
        raise DataError(f"{train.name}: the classes of training and held-out images have different names")
    tested = "" if test is None else test.digest
    key = hashlib.sha256(f"{VERSION}/{train.digest}/{tested}".encode()).hexdigest()[:32]
    stem = (cache_directory() / "features" if cache is None else cache) / f"classifier-{key}"
    fresh = Classifier(f"{train.name.rpartition('/')[2]}-classifier", train.shape, train.classes)
    extractor = _load(fresh, stem)
    if extractor is None:
        with _one_thread():
            extractor = _train(fresh, train, test)
        _save(extractor, stem)
    return extractor.to(device).eval().requires_grad_(False)


def _train(model: Classifier, train: Images, test: Images | None) -> Classifier:
    """AdamW with a linear warm-up and a cosine end; the order of the images is a pure function of the epoch."""
    assert train.labels is not None
    steps = max(1, min(_EPOCHS * len(train), _MOST_SAMPLES) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, weight_decay=_WEIGHT_DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=steps + 1, pct_start=_WARM_UP)
    for index in itertools.islice(_batches(len(train)), steps):
        loss = F.cross_entropy(model.train_logits(train.floats(index)), train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    features = torch.cat([model(train.pixels(rows)).features for rows in _blocks(train)]).double()
    model.center.copy_(features.mean(0))
    model.spread.copy_(features.std(0).clamp_min(1e-6))
    if not bool(model.head.weight.isfinite().all()):
        raise NumericsError(f"training {model.name} diverged")
    if test is not None and test.labels is not None:
        predicted = torch.cat([model(test.pixels(rows)).logits.argmax(1) for rows in _blocks(test)])
        model.accuracy = round(float(predicted.eq(test.labels).double().mean()), 6)
    return model


def _blocks(images: Images) -> tuple[Tensor, ...]:
    """Indices of all images, a forward pass after the other: a set on disk is never held whole."""
    return torch.arange(len(images)).split(_BLOCK)


def _batches(count: int) -> Iterator[Tensor]:
    """Indices of one batch after another, epoch after epoch, without end."""
    for epoch in itertools.count():
        order = rng.permutation(_SEED, "classifier", epoch, count)
        yield from order.split(_BATCH)


def _save(model: Classifier, stem: Path) -> None:
    """Weights, then the JSON with their SHA-256; a cache that cannot be written only costs time."""
    content = save_tensors(model.weights())
    document = {"name": model.name, "accuracy": model.accuracy, "sha256": hashlib.sha256(content).hexdigest()}
    with contextlib.suppress(CheckpointError):
        write_atomic(stem.with_suffix(".safetensors"), content)
        write_json(stem.with_suffix(".json"), document)


def _load(fresh: Classifier, stem: Path) -> Classifier | None:
    """The cached classifier, or None if there is none that is whole."""
    try:
        document: Any = read_json(stem.with_suffix(".json"))
        content = stem.with_suffix(".safetensors").read_bytes()
        accuracy = document["accuracy"]
        if document["sha256"] != hashlib.sha256(content).hexdigest() or not isinstance(accuracy, float | None):
            return None
        fresh.load_state_dict(load_tensors(content))
    except (ConfigError, OSError, KeyError, TypeError, RuntimeError, SafetensorError):
        return None
    fresh.accuracy = accuracy
    return fresh


def _reduced(size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width after averaging down."""
    shrink = max(1.0, max(size) / _LARGEST_SIDE)
    height, width = (max(_SMALLEST_SIDE, round(side / shrink)) for side in size)
    return height, width


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order: the result does not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
