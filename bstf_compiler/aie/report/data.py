"""The numbers behind the drawings of a report page: what its scripts read."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bstf_compiler import bsr
from bstf_compiler.aie.code import Code
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.estimate import Estimate, Span
from bstf_compiler.aie.isa import KINDS
from bstf_compiler.aie.layer import BLOCK
from bstf_compiler.aie.memory import CHUNKS, STAGING, Allocation
from bstf_compiler.aie.timeline import horizon, merge, units_of
from bstf_compiler.aie.usage import HELD, LINKS, curves
from bstf_compiler.graph import Conv, Graph

MOST_SPANS = 200_000
"""Spans of single units on one page, about 12 bytes each; of more than that a page shows the merged bars only."""

ARRAY_LINKS = ("LOADFM", "LOADWM", "WRITEFM")
"""The instruction kinds that move bytes between memory tiles and cores."""

_TICKS = 2**32 - 1  # a page's time axis, in the whole numbers that spans are stored in


@dataclass(frozen=True)
class Panel:
    """A program on a page, its times, and what the page calls it ("" if it is the only one)."""

    title: str
    code: Code
    estimate: Estimate


def page_data(panels: Sequence[Panel], gammas: Mapping[str, np.ndarray]) -> dict:
    """Everything that is drawn, for json: times in seconds, memory in bytes."""
    end = horizon(panel.estimate for panel in panels)
    few = sum(len(panel.estimate.spans) for panel in panels) <= MOST_SPANS
    return {
        "kinds": KINDS,
        "horizon": end,
        "panels": [_panel(panel, end, few) for panel in panels],
        "roofs": roofs(panels[0].code.device),
        "gammas": [[name, *gamma.shape, _bits(gamma)] for name, gamma in gammas.items()],
    }


def gammas_of(graph: Graph, layers: Iterable[str]) -> dict[str, np.ndarray]:
    """Γ of every convolution that skips zero blocks, as found in its weights, in the network's order.

    Args:
        graph: the network.
        layers: names of a program's layers; a convolution that ends in a sum has the sum's.

    Returns:
        By layer a bool array (input blocks, output blocks): True where a block is kept.
    """
    names, found = set(layers), {}
    for node in graph:
        if isinstance(node.op, Conv) and node.op.groups == 1:
            kept = bsr.nonzero_blocks(graph.tensors[node.inputs[1]].data, (BLOCK, BLOCK))
            sums = (one.name for one in graph.consumers(node.output) if one.name in names)
            found[node.name if node.name in names else next(sums, node.name)] = kept
    return found


def roofs(device: DeviceSpec) -> dict:
    """What a device can do at most: effective operations/s (two a multiply-add) of all its cores, and bytes/s of the
    links to DDR and of those between memory tiles and cores, all of them at once.
    """
    return {
        "peak": 2.0 * device.columns * device.rows * device.core.macs_per_cycle * device.clock_hz,
        "DDR": device.ddr_rate,
        "memory tiles": sum(device.rate(kind) * device.units(kind) for kind in ARRAY_LINKS),
    }


def _panel(panel: Panel, end: float, with_spans: bool) -> dict:
    estimate = panel.estimate
    names = list(dict.fromkeys([layer.name for layer in estimate.layers] + [s.layer for s in estimate.spans]))
    number = {name: index for index, name in enumerate(names)}
    return {
        "title": panel.title,
        "names": names,
        "units": list(units_of(estimate).values()),
        "layers": [[number[one.name], one.start, one.seconds, one.bound] for one in estimate.layers],
        "bars": [
            [number[b.layer], KINDS.index(b.kind), b.units, b.start, b.end, b.busy, b.bytes, b.macs]
            for b in merge(estimate.spans)
        ],
        "spans": packed_spans(estimate, number, end) if with_spans else None,
        "memory": {"limit": estimate.memtile_bytes, "held": [_held(estimate, one) for one in estimate.held]},
        "ddr": _ddr(estimate),
        "roofline": _points(estimate, number),
    }


def packed_spans(estimate: Estimate, number: Mapping[str, int], end: float) -> dict:
    """The spans of single units, column by column: little endian, deflated, in base 64.

    Columns are start, end and work (uint32, `end` being 2**32 - 1), bytes and multiply-adds (float64), layer and unit
    (uint16), lane (uint8), the widest numbers first.
    """
    unit_of = {(kind, unit): i for kind, group in units_of(estimate).items() for i, unit in enumerate(group)}
    spans = sorted(estimate.spans, key=lambda s: (KINDS.index(s.kind), unit_of[s.kind, s.unit], s.start))

    def column(kind: str, of: Sequence[float]) -> bytes:
        return np.array(of, kind).tobytes()

    def ticks(name: str) -> bytes:
        return column("<u4", np.rint(np.array([getattr(span, name) for span in spans]) / end * _TICKS))

    content = (
        column("<f8", [span.bytes for span in spans])
        + column("<f8", [span.macs for span in spans])
        + b"".join(map(ticks, ("start", "end", "busy")))
        + column("<u2", [number[span.layer] for span in spans])
        + column("<u2", [unit_of[span.kind, span.unit] for span in spans])
        + column("<u1", [KINDS.index(span.kind) for span in spans])
    )
    return {"count": len(spans), "deflated": base64.b64encode(zlib.compress(content, 9)).decode("ascii")}


def _held(estimate: Estimate, one: Allocation) -> list:
    """Something in a memory tile: name, which of HELD, address, bytes, seconds from, seconds to."""
    kind = CHUNKS if one.name == CHUNKS else "staging" if one.name.startswith(STAGING) else "tensors"
    first, last = estimate.layers[one.first], estimate.layers[one.last]
    return [one.name, HELD.index(kind), one.address, one.bytes, first.start, last.start + last.seconds]


def _ddr(estimate: Estimate) -> dict:
    curve = curves(estimate)[1]
    return {
        "limit": curve.limit,
        "times": curve.times.tolist(),
        "parts": [[name, curve.parts[name].astype(np.int64).tolist()] for name in LINKS],
    }


def _points(estimate: Estimate, number: Mapping[str, int]) -> list:
    """Layers that multiply: number, seconds, effective operations, bytes from and to DDR, and to and from cores."""
    moved: dict[str, list[int]] = {}
    for span in estimate.spans:
        amounts = moved.setdefault(span.layer, [0, 0])
        amounts[0] += _bytes(span, LINKS)
        amounts[1] += _bytes(span, ARRAY_LINKS)
    return [
        [number[layer.name], layer.seconds, 2 * layer.macs, *moved.get(layer.name, (0, 0))]
        for layer in estimate.layers
        if layer.macs and layer.seconds
    ]


def _bytes(span: Span, kinds: Sequence[str]) -> int:
    return span.bytes if span.kind in kinds else 0


def _bits(gamma: np.ndarray) -> str:
    """A bit a block, row by row, in base 64."""
    return base64.b64encode(np.packbits(gamma.astype(bool).ravel()).tobytes()).decode("ascii")
