"""The loss scale that keeps small gradients of fp16 from becoming zero."""

from __future__ import annotations

from dataclasses import dataclass

from multistage_diffusion.errors import NumericsError

MOST_OVERFLOWS = 20  # in a row; the scale is then a millionth of what it was
_GROWTH = 2_000  # steps without an overflow after which the scale is tried twice as large, as in torch's GradScaler


@dataclass
class LossScale:
    """Factor of the loss in the backward pass; the gradients are divided by it again.

    Whether gradients are finite is known on the host in every step, so the scale lives there, too.

    Attributes:
        value: The factor, a power of two.
        calm: Steps since it changed.
    """

    value: float = 65_536.0
    calm: int = 0

    def shrink(self) -> None:
        """Halve it, after an overflow."""
        self.value, self.calm = self.value / 2, 0

    def keep(self) -> None:
        """Count a step without an overflow; double the scale after many."""
        self.calm += 1
        if self.calm == _GROWTH:
            self.value, self.calm = self.value * 2, 0


def require_few(overflows: int, step: int) -> None:
    """Stop a run whose gradients overflow whatever the scale.

    Args:
        overflows: How many there were in a row.
        step: Number of the step.

    Raises:
        NumericsError: More than `MOST_OVERFLOWS`.
    """
    if overflows > MOST_OVERFLOWS:
        raise NumericsError(
            f"gradients overflowed {overflows} times in a row at step {step} in fp16; the weights were not updated; "
            "train with engine.precision bf16 or fp32, or lower training.learning-rate"
        )
