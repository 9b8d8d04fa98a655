"""One run of a study, the point of the grid that it has, and the key that names both."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: name in the study's file.
        method: one of :data:`.plan.METHODS`, or a variant that the file names.
        fraction: part of the training set.
        lr: base learning rate.
        seed: of the run, and of the part of the training set.
        lr_part: what the task's multiples of the rate, in the backbone, are multiplied by.
    """

    task: str
    method: str
    fraction: float
    lr: float
    seed: int
    lr_part: float = 1.0

    @property
    def key(self) -> str:
        """What tells this run from all others."""
        rate = rate_text(self.lr, self.lr_part)
        return f'{self.task} {self.method} {self.fraction:g} {rate} {self.seed}'

    @classmethod
    def of(cls, key: str) -> Run:
        """The run of a key.

        Raises:
            ValueError: it has not five parts, or its last three are no numbers of a plan.
        """
        try:
            task, method, fraction, rate, seed = key.split(' ')
            lr, *parts = map(float, rate.split('x'))
            (part,) = parts or [1.0]
            if not (is_rate(lr, part) and parts != [1.0] and 0 < float(fraction) <= 1):
                raise ValueError(key)
            return cls(task, method, float(fraction), lr, int(seed), part)
        except ValueError as error:
            raise ValueError(
                f'\'{key}\' names no run: use "TASK METHOD FRACTION RATE SEED", such as '
                '"flowers5 full 0.2 0.001 0", or 0.001x0.5 for a rate with half of the multiple'
            ) from error


def is_rate(lr: float, part: float) -> bool:
    """Whether a grid may have this point."""
    return 0 < lr < math.inf and 0 < part < math.inf


def rate_text(lr: float, part: float) -> str:
    """A point of a grid in a key or a table, such as 0.06, or 0.06x0.5 with half the multiples."""
    return f'{lr:g}' if part == 1 else f'{lr:g}x{part:g}'
