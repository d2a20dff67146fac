"""The block of a kernel: its shape, the grid of blocks over (cin, cout), reduction to it, expansion from it.

A kernel is (..., cin, cout) - Keras' (h, w, cin, cout) of a convolution or (cin, cout) of a dense layer. A
block is `bi` input channels x `bo` output channels at every kernel position, aligned at multiples of `bi` and
`bo`; at a ragged edge the last block is smaller. Γ has one entry a block: (ceil(cin / bi), ceil(cout / bo)).
"""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np


class BlockShape(NamedTuple):
    """Input channels x output channels of a block."""

    bi: int
    bo: int

    @classmethod
    def of(cls, block: "int | Sequence[int] | BlockShape") -> "BlockShape":
        """Reads a block from what a user writes.

        Args:
            block: an int (square blocks) or a pair `(bi, bo)` of input and output channels, each at least 1.

        Returns:
            The block's shape.

        Raises:
            ValueError: `block` is neither.

        Example:
            >>> BlockShape.of(8)
            BlockShape(bi=8, bo=8)
        """
        pair = (block, block) if _is_int(block) else block
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(_is_int(size) and size >= 1 for size in pair)
        ):
            raise ValueError(
                f"block must be a positive integer or a pair of them (input channels, output channels); got {block!r}."
            )
        return cls(int(pair[0]), int(pair[1]))

    def __str__(self) -> str:
        return f"{self.bi}x{self.bo}"


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def grid(cin: int, cout: int, block: BlockShape) -> tuple[int, int]:
    """Shape of Γ: the number of (possibly smaller) blocks along the input and the output channels."""
    return -(-cin // block.bi), -(-cout // block.bo)


def plane(kernel: np.ndarray) -> np.ndarray:
    """Views a kernel (..., cin, cout) as (positions, cin, cout); a dense kernel has one position."""
    kernel = np.asarray(kernel)
    return kernel.reshape(-1, *kernel.shape[-2:])


def block_reduce(kernel: np.ndarray, block: BlockShape, fn: Callable[..., np.ndarray]) -> np.ndarray:
    """Reduces every block of a kernel to one number.

    Args:
        kernel: (..., cin, cout).
        block: the block's shape.
        fn: a NumPy style reduction `fn(values, axis=-1)`, such as `np.sum` or `np.var`. A smaller block at a
            ragged edge is given its own elements only, without padding.

    Returns:
        (rows, cols), `fn` of each block's elements.

    Example:
        >>> block_reduce(np.ones((3, 3, 16, 12)), BlockShape(8, 8), np.sum)
        array([[576., 288.],
               [576., 288.]])
    """
    planes = plane(kernel)
    cin, cout = planes.shape[1:]
    bands = [
        [fn(_blocks(planes[:, ins, outs], bi, bo), axis=-1) for outs, bo in _bands(cout, block.bo)]
        for ins, bi in _bands(cin, block.bi)
    ]
    return np.block(bands)


def expand(gamma: Any, kernel_shape: Sequence[int], block: BlockShape, xp: ModuleType = np) -> Any:
    """Repeats every entry of Γ over its block.

    Args:
        gamma: (rows, cols).
        kernel_shape: (..., cin, cout) of the kernel.
        block: the block's shape.
        xp: the module that computes, `numpy` or `keras.ops`.

    Returns:
        (cin, cout), an array (or a tensor of `xp`) that broadcasts against the kernel.

    Example:
        >>> kernel * expand(gamma, kernel.shape, BlockShape(8, 8))
    """
    cin, cout = kernel_shape[-2:]
    rows, cols = gamma.shape
    # Not `repeat`, which takes any number of repetitions: TensorFlow needs some thirty operations for it.
    blocks = xp.broadcast_to(xp.reshape(gamma, (rows, 1, cols, 1)), (rows, block.bi, cols, block.bo))
    whole = xp.reshape(blocks, (rows * block.bi, cols * block.bo))
    return whole if whole.shape == (cin, cout) else whole[:cin, :cout]


def nonzero_blocks(kernel: np.ndarray, block: BlockShape) -> np.ndarray:
    """Tells which blocks hold a weight that isn't exactly zero: bool (rows, cols)."""
    return block_reduce(kernel, block, np.any)


def _bands(channels: int, size: int) -> Iterator[tuple[slice, int]]:
    """The whole blocks' channels with the block's size, then the ragged rest's with its own."""
    whole = channels - channels % size
    if whole:
        yield slice(0, whole), size
    if whole < channels:
        yield slice(whole, channels), channels - whole


def _blocks(planes: np.ndarray, bi: int, bo: int) -> np.ndarray:
    """(positions, rows * bi, cols * bo) -> (rows, cols, elements of a block)."""
    positions, cin, cout = planes.shape
    rows, cols = cin // bi, cout // bo
    split = planes.reshape(positions, rows, bi, cols, bo).transpose(1, 3, 0, 2, 4)
    return split.reshape(rows, cols, positions * bi * bo)
