"""What memory tiles hold and what DDR reads and writes over the time of an Estimate, as curves to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bstf_compiler.aie.estimate import Estimate
from bstf_compiler.aie.memory import CHUNKS, STAGING

HELD = ("tensors", "staging", CHUNKS)
"""What memory tiles hold: whole tensors, bands of tensors that live in DDR, weights."""
LINKS = ("LOAD", "LOADW", "WRITE")
"""The instruction kinds that read or write DDR."""

_TOUCH = 1e-12  # seconds; times closer than this only differ by rounding


@dataclass(frozen=True, eq=False)
class Curve:
    """Amounts over time that change in steps.

    Args:
        name: of what is counted.
        unit: "bytes" or "bytes/s".
        limit: the most that the device has, in that unit.
        times: (n + 1,) ascending seconds; before the first and from the last one on all amounts are 0.
        parts: what the amount consists of, by name: (n,) each, from one time to the next.
    """

    name: str
    unit: str
    limit: float
    times: np.ndarray
    parts: dict[str, np.ndarray]

    @property
    def total(self) -> np.ndarray:
        """The sum of the parts, (n,)."""
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        """The largest total; 0 if there is none."""
        return float(self.total.max(initial=0))

    def mean(self, edges: Sequence[float]) -> dict[str, np.ndarray]:
        """Mean of each part in every interval between neighbouring `edges` (ascending seconds)."""
        means = {}
        for name, amounts in self.parts.items():
            integral = np.concatenate([[0.0], np.cumsum(amounts * np.diff(self.times))])
            means[name] = np.diff(np.interp(edges, self.times, integral)) / np.diff(edges)
        return means


def curves(estimate: Estimate) -> tuple[Curve, Curve]:
    """Occupancy of a memory tile and bandwidth of DDR.

    Args:
        estimate: as `Program.estimate` returns it.

    Example:
        >>> [f"{curve.name}: {curve.peak} of {curve.limit} {curve.unit}" for curve in curves(program.estimate())]
    """
    return _memory_tile(estimate), _ddr(estimate)


def _memory_tile(estimate: Estimate) -> Curve:
    """Bytes that each memory tile holds, from layer to layer."""
    layers = estimate.layers
    ends = [layer.start + layer.seconds for layer in layers[-1:]]
    parts = {name: np.zeros(len(layers), np.int64) for name in HELD}
    for one in estimate.held:
        kind = CHUNKS if one.name == CHUNKS else "staging" if one.name.startswith(STAGING) else "tensors"
        parts[kind][one.first : one.last + 1] += one.bytes
    times = np.array([layer.start for layer in layers] + ends or [0.0])
    return Curve("MemTile", "bytes", estimate.memtile_bytes, times, parts)


def _ddr(estimate: Estimate) -> Curve:
    """Bytes/s of all links to and from DDR together; an instruction's bytes are spread evenly over its time."""
    spans = [span for span in estimate.spans if span.kind in LINKS and span.end > span.start]
    starts, ends, moved = (np.array([getattr(span, name) for span in spans]) for name in ("start", "end", "bytes"))
    times = np.unique([starts, ends])
    times = times[np.diff(times, prepend=-1.0) > _TOUCH] if spans else np.zeros(1)
    parts = {}
    for kind in LINKS:
        own = [span.kind == kind for span in spans]
        rates = moved[own] / (ends[own] - starts[own])
        change = np.zeros(len(times))
        np.add.at(change, np.searchsorted(times, starts[own], "right") - 1, rates)
        np.subtract.at(change, np.searchsorted(times, ends[own], "right") - 1, rates)
        parts[kind] = np.rint(np.cumsum(change)[:-1])  # whole bytes/s, and 0 where no link works
    return Curve("DDR", "bytes/s", estimate.ddr_rate, times, parts)
