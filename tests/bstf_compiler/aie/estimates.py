"""Estimates made by hand, for tests of what draws them."""

from __future__ import annotations

from bstf_compiler.aie.estimate import Estimate, LayerEstimate, Span
from bstf_compiler.aie.isa import KINDS
from bstf_compiler.aie.memory import CHUNKS, STAGING, Allocation

ODD_NAME = '$block/<1>&"conv"$, </script>'


def layer(name, start, seconds):
    kinds = {kind: seconds * (index + 1) / 10 for index, kind in enumerate(KINDS)}
    return LayerEstimate(name, "conv2d", start, seconds, kinds, "WRITE", 123456789012, 4096)


def span(name, kind, unit, start, end, busy=None):
    return Span(name, kind, unit, start, end, end - start if busy is None else busy, 640, 1280)


def estimate(scale=1.0):
    """Three layers of 100 us; every lane works in each of them, on two units: 128 MB/s of DDR, where it does. Memory
    tiles hold 450, 600 and 300 of 1,000 bytes.
    """
    names = ["conv1", ODD_NAME, "fc"]
    step = 1e-4 * scale
    layers = tuple(layer(name, index * step, step) for index, name in enumerate(names))
    spans = []
    for index, name in enumerate(names):
        for lane, kind in enumerate(KINDS):
            for unit in ("core 2,0", "core 10,0"):
                start = step * (index + lane / 10)
                spans.append(span(name, kind, unit, start, start + step / 10, busy=step / 20))
    held = [Allocation("conv1", 0, 300, 0, 1), Allocation(ODD_NAME, 300, 200, 1, 2), Allocation(CHUNKS, 500, 100, 0, 2)]
    held.append(Allocation(f"{STAGING}image", 600, 50, 0, 0))
    return Estimate("aie2_4x4", "exact", layers, tuple(spans), (), tuple(held), 1000, 2e8 / scale)


def many(count):
    """`count` spans back to back on 16 cores and 4 columns, in 70 layers."""
    units = {kind: [f"column {i}" for i in range(4)] for kind in KINDS} | {
        "COMP": [f"core {i},{j}" for i in range(4) for j in range(4)]
    }
    tracks = [(kind, unit) for kind in KINDS for unit in units[kind]]
    rounds = count // len(tracks)
    spans = [
        span(f"layer{70 * step // rounds}", kind, unit, step * 1e-6, (step + 1) * 1e-6)
        for step in range(rounds)
        for kind, unit in tracks
    ]
    layers = [layer(f"layer{i}", i * rounds * 1e-6 / 70, rounds * 1e-6 / 70) for i in range(70)]
    return Estimate("aie2_4x4", "exact", tuple(layers), tuple(spans))
