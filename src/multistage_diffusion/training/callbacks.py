"""What a run reports while it trains, and who may listen: trackers, and callbacks of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class LogRecord:
    """What a run reports at a step: a line of metrics.jsonl as numbers, or a grid of samples.

    Attributes:
        step: Steps taken.
        images: Images seen.
        scalars: Numbers by name, like {"loss": 0.1, "stage_loss/0": 0.2, "evaluation/fd": 12.0}.
        picture: PNG file of a grid; none in a record of numbers.
    """

    step: int
    images: int
    scalars: Mapping[str, float] = field(default_factory=dict)
    picture: Path | None = None


@runtime_checkable
class Callback(Protocol):
    """Anything with `on_log`. Process 0 calls it at once; what it raises ends the run, after the last checkpoint."""

    def on_log(self, record: LogRecord) -> None:
        """Take a record."""
