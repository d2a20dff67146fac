"""Keras regularisers for training towards block sparsity: on the Γ that is trained, and on the norms of blocks.

Those of Γ are the paper's section III-D, for `bstf.sparsify(model, ratio=0, trainable_gamma=True,
gamma_regularizer=...)`; max and min in it are sums of exponentials, equation 12.
"""

import abc
import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from bstf.blocks import BlockShape, block_reduce


def smooth_max(x: Any, alpha: float, axis: int | None = None) -> Any:
    """log(sum of e^(alpha x)) / alpha, the paper's equation 12: max(x) or up to log(n) / alpha more.

    The largest exponent is taken out first, so nothing overflows.

    Args:
        x: a tensor.
        alpha: above 0; the larger, the closer to the maximum.
        axis: along which; None for the whole tensor.

    Returns:
        A tensor without that axis.

    Example:
        >>> float(smooth_max(np.array([0.0, 1.0]), alpha=100.0))
        1.0
    """
    return ops.logsumexp(alpha * x, axis=axis) / alpha


def smooth_min(x: Any, alpha: float) -> Any:
    """-smooth_max(-x): the minimum of a whole tensor, or up to log(n) / alpha less."""
    return -smooth_max(-x, alpha)


class _GammaPenalty(keras.regularizers.Regularizer, abc.ABC):
    """strength * (spread + beta * (sum of Γ - T)^2 + iota * sum of |Γ|), what the three penalties share."""

    def __init__(
        self,
        ratio: float = 0.5,
        beta: float = 1e-3,
        iota: float = 1e-3,
        alpha: float = 100.0,
        strength: float = 1.0,
    ):
        for name, value in (("ratio", ratio), ("beta", beta), ("iota", iota), ("strength", strength)):
            _check_number(name, value)
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio is the fraction of blocks that should become zero, in [0, 1); got {ratio!r}.")
        _check_number("alpha", alpha, above_zero=True)
        self.ratio, self.beta, self.iota, self.alpha, self.strength = ratio, beta, iota, alpha, strength

    def __call__(self, gamma: Any) -> Any:
        """The penalty of one layer's Γ (rows, cols), a scalar."""
        target = (1 - self.ratio) * math.prod(gamma.shape)
        kept = ops.square(ops.sum(gamma) - target)
        size = ops.sum(ops.abs(gamma))
        return self.strength * (self._spread(gamma) + self.beta * kept + self.iota * size)

    @abc.abstractmethod
    def _spread(self, gamma: Any) -> Any:
        """The terms that none but this penalty has."""

    def _range(self, gamma: Any) -> Any:
        return smooth_max(gamma, self.alpha) - smooth_min(gamma, self.alpha)

    def _outside(self, gamma: Any) -> Any:
        """How far Γ is outside [0, 1]: max(-γ, 0) + max(γ - 1, 0), by equation 12, summed."""
        zeros = ops.zeros_like(gamma)
        below, above = (smooth_max(ops.stack([x, zeros]), self.alpha, axis=0) for x in (-gamma, gamma - 1))
        return ops.sum(below + above)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {name: getattr(self, name) for name in ("ratio", "beta", "iota", "alpha", "strength")}


@keras.saving.register_keras_serializable("bstf")
class GammaRange(_GammaPenalty):
    """The paper's equation 13: -(max(Γ) - min(Γ)) + beta (sum of Γ - T)^2 + iota sum of |Γ|.

    Its first term wants Γ to reach far apart, the second T kept blocks, the third small numbers. Nothing keeps Γ
    between 0 and 1. (The paper writes L2(Γ - T) for the second, where T is a number of blocks: the square of the
    difference is that of its authors' code.)

    Args:
        ratio: the fraction of zero blocks that is wanted: T = (1 - ratio) * blocks, for every layer its own.
        beta: weight of the number of blocks, at least 0. Its term grows with the square of a layer's blocks.
        iota: weight of the sizes, at least 0.
        alpha: of the maximum and minimum, equation 12, above 0.
        strength: factor of the whole, at least 0; the paper's is 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> soft = bstf.sparsify(model, ratio=0, trainable_gamma=True, gamma_regularizer=GammaRange(0.5))
    """

    def _spread(self, gamma: Any) -> Any:
        return -self._range(gamma)


@keras.saving.register_keras_serializable("bstf")
class BoxedGammaRange(_GammaPenalty):
    """The paper's equation 14: equation 13 and how far Γ is outside [0, 1], max(-Γ, 0) + max(Γ - 1, 0), summed.

    These maxima are by equation 12, too: each of a number and 0, so that they bend over about 1 / alpha.

    Args:
        ratio: as for `GammaRange`.
        beta: as for `GammaRange`.
        iota: as for `GammaRange`.
        alpha: of all maxima and minima, above 0.
        strength: as for `GammaRange`.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> soft = bstf.sparsify(model, ratio=0, trainable_gamma=True, gamma_regularizer=BoxedGammaRange(0.5))
    """

    def _spread(self, gamma: Any) -> Any:
        return self._outside(gamma) - self._range(gamma)


@keras.saving.register_keras_serializable("bstf")
class BoxedGammaRatio(_GammaPenalty):
    """The paper's equation 15: equation 14 with -min(Γ) / max(Γ) for -(max(Γ) - min(Γ)).

    As printed its fraction is largest, and the penalty least, where all of Γ are equal, which isn't what the paper
    says it is for; `sign=1` turns that round.

    Args:
        ratio: as for `GammaRange`.
        beta: as for `GammaRange`.
        iota: as for `GammaRange`.
        alpha: of all maxima and minima, above 0.
        strength: as for `GammaRange`.
        sign: of the fraction: -1 as printed, or 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> soft = bstf.sparsify(model, ratio=0, trainable_gamma=True, gamma_regularizer=BoxedGammaRatio(0.5, sign=1))
    """

    def __init__(
        self,
        ratio: float = 0.5,
        beta: float = 1e-3,
        iota: float = 1e-3,
        alpha: float = 100.0,
        strength: float = 1.0,
        sign: int = -1,
    ):
        super().__init__(ratio, beta, iota, alpha, strength)
        if sign not in (-1, 1):
            raise ValueError(f"sign must be -1, as printed, or 1; got {sign!r}.")
        self.sign = sign

    def _spread(self, gamma: Any) -> Any:
        largest = ops.maximum(smooth_max(gamma, self.alpha), keras.config.epsilon())  # a Γ of zeros has none
        return self._outside(gamma) + self.sign * smooth_min(gamma, self.alpha) / largest

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "sign": self.sign}


@keras.saving.register_keras_serializable("bstf")
class GroupLasso(keras.regularizers.Regularizer):
    """strength * sum over blocks of sqrt(volume) * ||block||_2 (Yuan & Lin 2006, J. R. Stat. Soc. B 68, equation 2).

    The norm isn't squared, so it pulls as hard on a small block as on a large one: small ones shrink to nothing and
    large ones stay. The volume is the number of weights in the block. The gradient of a zero block is zero.

    For the masked layers of a model `bstf.sparsify(model, ratio=0, group_lasso=strength)` does the same with
    the block of each.

    Args:
        strength: at least 0.
        block: an int, or (input channels, output channels) of a block.

    Raises:
        ValueError: `strength` is negative or not a number, or `block` isn't a block.

    Example:
        >>> keras.layers.Conv2D(64, 3, kernel_regularizer=GroupLasso(1e-4, block=8))
    """

    def __init__(self, strength: float = 1e-4, block: int | Sequence[int] = 8):
        _check_number("strength", strength)
        self.strength = strength
        self.block = BlockShape.of(block)

    def __call__(self, kernel: Any) -> Any:
        """The penalty of a kernel (..., cin, cout), a scalar."""
        return group_lasso(kernel, self.block, self.strength)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"strength": self.strength, "block": list(self.block)}


def group_lasso(kernel: Any, block: BlockShape, strength: float) -> Any:
    """What `GroupLasso` adds to the loss: a scalar tensor.

    Args:
        kernel: (..., cin, cout), a tensor.
        block: the block's shape.
        strength: factor of the sum.

    Example:
        >>> float(group_lasso(np.ones((1, 1, 8, 8), "float32"), BlockShape(8, 8), 1.0))
        64.0
    """
    channels = kernel.shape[-2:]
    squares = ops.sum(ops.reshape(ops.square(kernel), (-1, *channels)), axis=0)
    missing = [-size % step for size, step in zip(channels, block)]
    squares = ops.pad(squares, [(0, more) for more in missing])
    rows, cols = (size // step for size, step in zip(squares.shape, block))
    energy = ops.sum(ops.reshape(squares, (rows, block.bi, cols, block.bo)), axis=(1, 3))
    # The root has no gradient at 0: a zero block takes that of the root of 1, times zero.
    alive = energy > 0
    norms = ops.where(alive, ops.sqrt(ops.where(alive, energy, ops.ones_like(energy))), ops.zeros_like(energy))
    volumes = block_reduce(np.ones(kernel.shape), block, np.sum)
    return strength * ops.sum(ops.convert_to_tensor(np.sqrt(volumes), norms.dtype) * norms)


def _check_number(name: str, value: float, above_zero: bool = False) -> None:
    """Raises a ValueError unless `value` is a finite number of at least 0, or above it."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (above_zero and value == 0):
        limit = "above 0" if above_zero else "of at least 0"
        raise ValueError(f"{name} must be a number {limit}; got {value!r}.")
