"""Classes by name: what a conditional model was trained on, and what other labels and words mean to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from multistage_diffusion.errors import CheckpointError, ConfigError, suggest
from multistage_diffusion.files import read_json, write_json

RECORD = "classes.json"
_SHOWN = 12  # names in a message


@final
@dataclass(frozen=True)
class TrainedClasses:
    """The classes that a model was trained on; `classes.json` of a run directory.

    Attributes:
        names: Name of each class, by its number. A model may have numbers without a name, which it never saw.
        images: Training images of each.

    Raises:
        ConfigError: The two do not have one entry a class, or a name occurs twice.
    """

    names: tuple[str, ...]
    images: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.images) or len(set(self.names)) != len(self.names):
            raise ConfigError("classes need one name each, all different, and their numbers of training images")

    @classmethod
    def of(cls, names: Sequence[str], labels: Int[Tensor, " n"]) -> TrainedClasses:
        """The classes of a training set, from its names and labels."""
        return cls(tuple(names), tuple(labels.bincount(minlength=len(names)).tolist()))

    @classmethod
    def parse(cls, document: Any, where: str) -> TrainedClasses:
        """Read what `document` wrote.

        Raises:
            CheckpointError: It is something else.
        """
        try:
            names, images = tuple(document["names"]), tuple(document["images"])
            if not (all(type(name) is str for name in names) and all(type(count) is int for count in images)):
                raise ValueError("names must be text and numbers of images whole")
            return cls(names, images)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where} holds no names of classes: {str(error)[:100]}") from error

    @classmethod
    def load(cls, folder: Path) -> TrainedClasses | None:
        """Those of a run directory; none if it records none."""
        path = folder / RECORD
        return cls.parse(read_json(path), str(path)) if path.is_file() else None

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {key: list(value) for key, value in asdict(self).items()}

    def save(self, folder: Path) -> None:
        """Write `classes.json`."""
        write_json(folder / RECORD, self.document())

    @property
    def seen(self) -> tuple[int, ...]:
        """Numbers of the classes that have training images."""
        return tuple(number for number, images in enumerate(self.images) if images > 0)

    def number(self, word: str) -> int:
        """The number of a class, by its name; or by its number in digits, where no class is named in digits.

        Raises:
            ConfigError: There is no such class.
        """
        if word in self.names:
            return self.names.index(word)
        if word.isdecimal() and not any(name.isdecimal() for name in self.names) and int(word) < len(self.names):
            return int(word)
        raise ConfigError(f"no class {word}; the model was trained on {shown(self.names)}{_near(word, self.names)}")

    def require_seen(self, numbers: Int[Tensor, " n"]) -> None:
        """Refuse classes without a training image.

        Raises:
            ConfigError: There is one.
        """
        for number in numbers.unique().tolist():
            if number not in self.seen:
                name = f"{self.names[number]} " if number < len(self.names) else ""
                raise ConfigError(
                    f"the class {name}(number {number}) has no training image, so the model never learned it; it was "
                    f"trained on {shown([self.names[k] for k in self.seen])}"
                )

    def match(self, source: str, names: Sequence[str], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Labels of other data as numbers of the model, by the names of the classes.

        Args:
            source: The other data, for messages.
            names: Names of its classes.
            labels: Its labels.

        Raises:
            ConfigError: A class that occurs there is not one that the model was trained on.
        """
        if tuple(names) == self.names:
            numbers = labels
        else:
            table = torch.full((len(names),), -1, device=labels.device)
            for number, name in enumerate(names):
                table[number] = self.names.index(name) if name in self.names else -1
            numbers = table[labels]
        if bool((numbers < 0).any()):
            strange = [str(names[k]) for k in labels[numbers < 0].unique().tolist()]
            raise ConfigError(
                f"{source} has images of {shown(strange)}, and the model was trained on {shown(self.names)}; choose "
                "data whose classes have the same names"
            )
        self.require_seen(numbers)
        return numbers


def shown(names: Sequence[str]) -> str:
    """Names for a message; of many, the first."""
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} classes)" if len(names) > _SHOWN else "")


def _near(word: str, names: Sequence[str]) -> str:
    """A hint where a name is near; the message has the list already."""
    hint = suggest(word, names)
    return hint if "did you mean" in hint else ""
