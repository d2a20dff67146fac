"""Tiles of what a column of cores computes, and what goes through the links for them.

A link carries what its column of cores loads or writes, or what all of them read from its memory tile or write there,
if that is more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bstf_compiler.aie import layout
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.layer import Layer
from bstf_compiler.aie.reach import Scaled, Sliding
from bstf_compiler.aie.splitting import Split


class Cut(NamedTuple):
    """Tiles of `rows` x `columns` output pixels of the column of cores with most pixels.

    `tiles`: how many; `pixels`: of all their outputs; `under`: of each input under them; `read`, `written`: of each
    input and of the output, through the busiest link (0: of what is one pixel for all).
    """

    split: Split
    rows: int
    columns: int
    tiles: int
    pixels: int
    under: tuple[int, ...]
    read: tuple[float, ...]
    written: float


class Cuts:
    """The ways to cut an image of so many output `rows` of a layer."""

    def __init__(self, layer: Layer, device: DeviceSpec, rows: int) -> None:
        self._layer, self._device, self.rows = layer, device, rows
        self._width = layer.output_shape[1]
        self._inputs = [
            None if source.broadcast else _Links(source.rows, source.columns, *source.shape[1:], device)
            for source in layer.sources
        ]
        rows_of_all, width, blocks = layer.output_shape
        self._output = _Links(Sliding(rows_of_all), Sliding(width), width, blocks, device)

    def of(self, split: Split) -> Iterator[Cut]:
        """The cuts worth a try, largest tiles first."""
        busiest = split.regions(self.rows, self._width, self._device.columns)[0]
        high, wide = (max(last - first for first, last in axis) for axis in zip(*busiest))
        grain = self._layer.grain
        heights = sorted({min(-(-height // grain) * grain, high) for height in divisions(high)}, reverse=True)
        for columns in _widths(wide):
            for height in heights:
                yield self.cut(split, height, columns)

    def whole(self, split: Split) -> Cut:
        """The cut into as few tiles as can be."""
        return self.cut(split, self.rows, self._width)

    def cut(self, split: Split, height: int, columns: int) -> Cut:
        """The cut into tiles of a size."""
        tiles, pixels, under = 0, 0, [0] * len(self._layer.sources)
        for high, wide in self.sizes(split, height, columns):
            tiles += len(high) * len(wide)
            pixels += sum(high) * sum(wide)
            for place, source in enumerate(self._layer.sources):
                if not source.broadcast:
                    under[place] += sum(map(source.rows.most, high)) * sum(map(source.columns.most, wide))
        size = split, height, columns
        read = [
            0.0 if links is None else max(own, links.busiest(self.rows, self._width, *size))
            for own, links in zip(under, self._inputs)
        ]
        written = max(pixels, self._output.busiest(self.rows, self._width, *size))
        return Cut(split, height, columns, tiles, pixels, tuple(under), tuple(read), written)

    def sizes(self, split: Split, height: int, columns: int) -> list[tuple[list[int], list[int]]]:
        """Heights and widths of the busiest column's tiles, by region."""
        return [
            ([b - a for a, b in runs(top, bottom, height)], [b - a for a, b in runs(left, right, columns)])
            for (top, bottom), (left, right) in split.regions(self.rows, self._width, self._device.columns)[0]
        ]


class _Links:
    """The links between memory tiles and cores, for one tensor of a `width` and so many channel `blocks`."""

    def __init__(
        self, rows: Sliding | Scaled, columns: Sliding | Scaled, width: int, blocks: int, device: DeviceSpec
    ) -> None:
        self._axes, self._device = (rows, columns), device
        self._spans = tuple((a / blocks, b / blocks) for _, a, b in layout.spans(width, blocks, device))
        self._high: dict[tuple, np.ndarray] = {}
        self._wide: dict[tuple, np.ndarray] = {}

    def busiest(self, rows: int, width: int, split: Split, height: int, columns: int) -> float:
        """Pixels of the memory tile from or to which most go, divided by the columns of cores that share its link."""
        if (split, height) not in self._high or (split, columns) not in self._wide:
            regions = [region for own in split.regions(rows, width, self._device.columns) for region in own]
            high = [_reached(self._axes[0], *span, height) for span, _ in regions]
            wide = [_reached_of(self._axes[1], *span, columns, self._spans) for _, span in regions]
            self._high[split, height], self._wide[split, columns] = np.array(high), np.array(wide)
        return (
            float((self._high[split, height] @ self._wide[split, columns]).max())
            / self._device.columns_of_activation_tile
        )


def runs(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """[start, stop) in runs of `length`, the last one shorter: [(start, stop), ...]."""
    return [(first, min(first + length, stop)) for first in range(start, stop, length)]


def divisions(total: int) -> list[int]:
    """The sizes ceil(total / n) for n >= 1, each once, largest first."""
    return sorted({-(-total // n) for n in range(1, total + 1)}, reverse=True)


def _widths(width: int) -> list[int]:
    """Widths worth a try: the whole, a third, and halves of halves, widest first."""
    return sorted({-(-width // 3)} | {-(-width // 2**k) for k in range(width.bit_length() + 1)}, reverse=True)


@lru_cache(maxsize=1 << 14)
def _reached(axis: Sliding | Scaled, start: int, stop: int, length: int) -> int:
    """Input rows under output rows [start, stop) that are computed in runs of a length."""
    return sum(last - first for first, last, _ in (axis.reach(*run) for run in runs(start, stop, length)))


@lru_cache(maxsize=1 << 14)
def _reached_of(
    axis: Sliding | Scaled, start: int, stop: int, length: int, spans: tuple[tuple[float, float], ...]
) -> list[float]:
    """Input columns under output columns [start, stop) that are computed in runs of a length, by span of them."""
    reaches = [axis.reach(*run) for run in runs(start, stop, length)]
    return [sum(max(0, min(b, last) - max(a, first)) for first, last, _ in reaches) for a, b in spans]
