"""How sparse a model should be at a time of its training: time -> ratio. Pure functions with a config.

A time is a whole number of epochs or of training steps from zero, whichever the caller counts in;
`bstf.callbacks.BlockSparsity` runs a schedule in either.
"""

import abc
import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any

import keras

from bstf.selection import check_ratio


@dataclass(frozen=True)
class Schedule(abc.ABC):
    """What all schedules have: the ratio they end at, the call and Keras' config.

    Attributes:
        ratio: the fraction of zero blocks at the end, in [0, 1).
    """

    ratio: float

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @abc.abstractmethod
    def __call__(self, time: int, blocks: int) -> float:
        """The ratio that a Γ of `blocks` blocks should have reached at a time; it never falls with time."""

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Schedule":
        """Builds a schedule from what `get_config` returned."""
        return cls(**config)


@keras.saving.register_keras_serializable("bstf")
@dataclass(frozen=True)
class OneShot(Schedule):
    """All blocks at once (the paper's section III-B).

    Attributes:
        ratio: the fraction of zero blocks from `at` on.
        at: the time; 0 before any training.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> OneShot(0.5, at=3)(time=3, blocks=16)
        0.5
    """

    at: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole("at", self.at, 0)

    def __call__(self, time: int, blocks: int) -> float:
        """`ratio` from `at` on, 0 before."""
        return self.ratio if time >= self.at else 0.0


@keras.saving.register_keras_serializable("bstf")
@dataclass(frozen=True)
class Steps(Schedule):
    """A few blocks at a time, with training in between (the paper's section III-C).

    At every `every`-th time a layer loses `fraction` of its blocks, and at least one, until the ratio. (The
    paper writes min(5 % of the blocks, 1) and says that at least one block is set to zero: it means max.)

    Attributes:
        ratio: the fraction of zero blocks at the end.
        every: times between two losses; the paper's is two epochs.
        fraction: of all blocks, lost each time, in (0, 1].
        begin: time of the first loss.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> [Steps(0.5, every=2, fraction=0.2)(time, blocks=100) for time in range(6)]
        [0.2, 0.2, 0.4, 0.4, 0.5, 0.5]
        >>> Steps(0.5)(time=0, blocks=4)  # one block of four
        0.25
    """

    every: int = 2
    fraction: float = 0.05
    begin: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole("every", self.every, 1)
        _check_whole("begin", self.begin, 0)
        if not isinstance(self.fraction, numbers.Real) or not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is the part of the blocks lost at a time, in (0, 1]; got {self.fraction!r}.")

    def __call__(self, time: int, blocks: int) -> float:
        """As many losses as there were times for, of at least one block each, and no more than `ratio`."""
        if time < self.begin:
            return 0.0
        losses = (time - self.begin) // self.every + 1
        return min(self.ratio, losses * max(self.fraction, 1 / blocks))


@keras.saving.register_keras_serializable("bstf")
@dataclass(frozen=True)
class Cubic(Schedule):
    """Fast while many blocks hardly matter, slow near the end (Zhu & Gupta 2017, arXiv 1710.01878, equation 1).

    ratio(t) = ratio + (initial - ratio) (1 - (t - begin) / (end - begin))^3, at t = begin, begin + every, ...

    Attributes:
        ratio: the fraction of zero blocks from `end` on.
        end: time at which the ratio is reached: no later than the last time the caller counts.
        begin: time of the first change.
        every: times between two changes; the weights recover in between.
        initial: the fraction at `begin`.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> [round(Cubic(0.5, end=4)(time, blocks=64), 3) for time in range(6)]
        [0.0, 0.289, 0.438, 0.492, 0.5, 0.5]
    """

    end: int
    begin: int = 0
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole("begin", self.begin, 0)
        _check_whole("every", self.every, 1)
        _check_whole("end", self.end, self.begin + 1)
        if check_ratio(self.initial) > self.ratio:
            raise ValueError(f"initial={self.initial} is above ratio={self.ratio}: dead blocks stay dead.")

    def __call__(self, time: int, blocks: int) -> float:
        """The cubic between `begin` and `end`, constant over `every` times; 0 before."""
        if time < self.begin:
            return 0.0
        if time >= self.end:
            return self.ratio
        since = (time - self.begin) // self.every * self.every
        left = 1 - since / (self.end - self.begin)
        return self.ratio + (self.initial - self.ratio) * math.pow(left, 3)


def _check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
