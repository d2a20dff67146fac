"""Lower bounds: the time that the work of a program takes however it is cut and ordered.

Counted is what no schedule of the same layers on the same array can leave out: whole kept blocks and element work,
spread evenly over all cores; every byte of an input that a layer's windows meet, once, over all links together; every
byte of an output; the weights of kept blocks, their indices and the bias, once. Not counted, for a schedule could
do without: halos and weights that are loaded again, work that is spread unevenly, tensors spilled to DDR, waiting.

Assumed is that layers run one after the other on the array, each reading its inputs from memory tiles and writing its
output there, while transfers from and to DDR may run at any time, and weights may come to the cores as early as these
have room for them. Another fusion of layers than the program's, or
another device, has another bound. This is the roofline of Williams, Waterman and Patterson (CACM 52(4), 2009: Roofline,
an insightful visual performance model) with a roof for each kind of link.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from bstf_compiler.aie import footprint
from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.footprint import AddressSpace
from bstf_compiler.aie.isa import Access, Compute, Transfer
from bstf_compiler.aie.memory import STAGING
from bstf_compiler.aie.reach import BLOCK

ON_ARRAY = ("LOADFM", "COMP", "WRITEFM")
"""What a layer keeps busy while it runs. Of LOADWM so much may be done before as fills a core; the other kinds use the
links to DDR, which may work ahead or behind.
"""

_WINDOWED = ("conv", "depthwise", "maxpool", "averagepool")
_FIRST, _OTHERS, _LOADED = 1, 2, 4  # bits of bytes: read as a layer's first input, as another one; loaded from DDR


def layer_bounds(code: Code) -> dict[int, dict[str, float]]:
    """Unavoidable seconds of every instruction kind, by stage.

    Args:
        code: the program; it must be sound (see verify.py).

    Example:
        >>> max(layer_bounds(program)[0].values())
    """
    stages: dict[int, list[Step]] = defaultdict(list)
    for number, step in enumerate(code.steps):
        stages[step.stage].append(code.layer_step(number))
    counter = _Counter(code)
    return {stage: counter.seconds(steps) for stage, steps in stages.items()}


def seconds_ahead(device: DeviceSpec) -> float:
    """Seconds of LOADWM that may be done for a layer before it begins: they fill a core's memory."""
    return (device.core.memory_bytes - device.core.reserved_bytes) / device.rate("LOADWM")


def on_array(kinds: dict[str, float], ahead: float) -> float:
    """Seconds that a layer is on the array at least: its longest work there, `ahead` seconds of LOADWM being done."""
    return max(kinds.get("LOADWM", 0.0) - ahead, *(kinds.get(kind, 0.0) for kind in ON_ARRAY))


def network_bound(layers: Iterable[dict[str, float]], most_ahead: float) -> float:
    """Seconds of a network at least: its layers one after the other on the array, or one link kind to DDR all the time.

    While a layer is on the array for longer than its own weights take, weights of later ones may come, `most_ahead`
    seconds of them at most. To keep a layer for longer than it must be gains later layers no more than it costs.

    Args:
        layers: unavoidable seconds by instruction kind, of every layer in order.
        most_ahead: what `seconds_ahead` says.
    """
    layers, array, ahead = list(layers), 0.0, 0.0
    for kinds in layers:
        seconds = on_array(kinds, ahead)
        ahead = min(most_ahead, ahead + seconds - kinds.get("LOADWM", 0.0))
        array += seconds
    links = [sum(kinds.get(kind, 0.0) for kinds in layers) for kind in ("LOAD", "LOADW", "WRITE")]
    return max(array, *links)


class _Counter:
    """Counts the layers of a program in order; bytes of the network's input count where they are first loaded."""

    def __init__(self, code: Code) -> None:
        self._code, self._space = code, AddressSpace(code)
        self._flags = np.zeros(self._space.starts["c0.0"], np.uint8)  # of DDR and memory tiles
        names = {*(port.tensor for port in code.inputs), *(affine.tensor for affine in code.affines)}
        self._inputs = [self._range_in_ddr(name) for name in names & code.tensors.keys()]
        self._outputs = {port.tensor for port in code.outputs}
        self._memtiles = slice(self._space.starts["m0"], self._space.starts["c0.0"])

    def seconds(self, steps: list[Step]) -> dict[str, float]:
        """Unavoidable seconds by instruction kind of the steps of one layer."""
        device, output = self._code.device, steps[0].output
        transfers = [i for step in steps for i in step.instructions if isinstance(i, Transfer)]
        met = _met([i for step in steps for i in step.instructions if isinstance(i, Compute)])
        written = sum(i.bytes * i.iterations for i in transfers if i.kind == "WRITEFM")
        packed = self._weights(steps, written)
        moved = {
            "LOAD": self._fresh_input(transfers) * met,
            "LOADW": packed,
            "LOADFM": self._read(steps, met),
            "LOADWM": packed,
            "WRITEFM": written,
            "WRITE": written if output in self._outputs else 0,
        }
        found = {kind: float(amount) / (device.rate(kind) * device.units(kind)) for kind, amount in moved.items()}
        return {**found, "COMP": _compute_seconds(device, steps)}

    def _range_in_ddr(self, name: str) -> tuple[int, int]:
        place = self._code.tensors[name][0]
        return place.address, place.address + place.shape[0] * place.shape[1] * place.pixel

    def _weights(self, steps: list[Step], written: int) -> float:
        """Bytes of a layer's weights, indices and bias, each once, without the headers of chunks (see weights.py); of
        parameters, where an operation has no weights.
        """
        do = next((i for step in steps for i in step.instructions if isinstance(i, Compute)), None)
        if do is None or do.op not in ("conv", "depthwise"):
            loads = [i for step in steps for i in step.instructions if i.kind == "LOADW"]
            return sum(size for _, size in {(m.source.address, m.source.bytes) for i in loads for m in i.moves})
        rows, columns, _ = self._code.tensors[steps[0].output][0].shape
        pixels, taps = rows * columns, do.kernel[0] * do.kernel[1]
        blocks = written / pixels / BLOCK
        if do.op == "depthwise":
            return blocks * BLOCK * (taps + 4)
        work = sum(i.work * i.iterations for step in steps for i in step.instructions if isinstance(i, Compute))
        kept = work / (pixels * taps * BLOCK * BLOCK)
        return kept * (taps * BLOCK * BLOCK + 2) + blocks * (BLOCK * 4 + 2)

    def _fresh_input(self, transfers: list[Transfer]) -> int:
        """Bytes of the network's input that these instructions load, and none before did."""
        moves = [move.source for i in transfers if i.kind == "LOAD" for move in i.moves]
        boxes = [a for a in moves if any(start <= a.address < stop for start, stop in self._inputs)]
        before = np.count_nonzero(self._flags[: self._memtiles.start])
        self._mark([(access, 1, _FIRST) for access in boxes])
        return np.count_nonzero(self._flags[: self._memtiles.start]) - before

    def _read(self, steps: list[Step], met: float) -> float:
        """Bytes that a layer's cores read of its inputs, each counted once; of the first input the part `met`."""
        memtiles = self._flags[self._memtiles]
        tiles = memtiles.reshape(self._code.device.memtiles, -1)
        held = [a for a in self._code.allocations if a.name.startswith(STAGING)]
        held = [a for a in held if a.first <= steps[0].stage <= a.last]
        staged = np.zeros(2)
        for step in steps:
            self._mark(_sources(step))
            for buffer in held:  # which holds other rows in the next band
                part = tiles[:, buffer.address : buffer.address + buffer.bytes]
                staged += _counts(part)
                part[:] = 0
        resident = _counts(memtiles)
        memtiles[:] = 0
        if staged.any():  # bands share rows
            staged *= min(1.0, self._loaded(steps) / staged.sum())
        first, others = resident + staged
        return first * met + others

    def _loaded(self, steps: list[Step]) -> int:
        """Bytes of DDR that LOAD reads for a layer, each counted once."""
        ddr = self._flags[: self._memtiles.start]
        transfers = [i for step in steps for i in step.instructions if i.kind == "LOAD"]
        self._mark([(move.source, 1, _LOADED) for i in transfers for move in i.moves])
        count = np.count_nonzero(ddr & _LOADED)
        ddr &= ~np.uint8(_LOADED)
        return count

    def _mark(self, accesses: list[tuple[Access, int, int]]) -> None:
        """Sets bits for all bytes of accesses: (access, iterations, bits)."""
        if accesses:
            boxes = np.array([box for access, _, _ in accesses for box in self._space.boxes(access)], np.int64)
            iterations, bits = (np.array([entry[n] for entry in accesses]) for n in (1, 2))
            footprint.mark(self._flags, boxes, iterations, bits.astype(np.uint8))


def _sources(step: Step) -> list[tuple[Access, int, int]]:
    """What LOADFM reads in a step: (access, iterations, whether it is the first input or another)."""
    ring = next(((address, address + size) for name, address, size in step.buffers if name == "input 0"), (0, 0))
    return [
        (move.source, i.iterations, _FIRST if ring[0] <= move.target.address < ring[1] else _OTHERS)
        for i in step.instructions
        if i.kind == "LOADFM"
        for move in i.moves
    ]


def _counts(flags: np.ndarray) -> np.ndarray:
    """Bytes read as the first input, and those read as others only."""
    return np.array([np.count_nonzero(flags & _FIRST), np.count_nonzero(flags == _OTHERS)], float)


def _compute_seconds(device: DeviceSpec, steps: list[Step]) -> float:
    """All cores' work at their full rate, spread evenly over all of them."""
    core, cycles = device.core, 0.0
    for instruction in (i for step in steps for i in step.instructions if isinstance(i, Compute)):
        rate = core.macs_per_cycle if instruction.op == "conv" else core.elementwise_per_cycle
        one = instruction.work / rate + instruction.added / core.elementwise_per_cycle
        cycles += one * instruction.iterations
    return cycles / (device.columns * device.rows) / device.clock_hz


def _met(computations: list[Compute]) -> float:
    """The part of the first input's pixels that lies under windows: less than 1 where strides step over pixels."""
    area = met = 0
    for do in computations:
        pixels = under = do.iterations
        for axis in range(2):
            size, out = do.inputs[0].sizes[axis], do.output.sizes[axis]
            kernel, stride, step = do.kernel[axis], do.strides[axis], do.dilation[axis]
            pixels *= size
            if do.op in _WINDOWED and stride >= (kernel - 1) * step + 1:  # tiles have no pixel in common
                reach = np.arange(out)[:, None] * stride + np.arange(kernel) * step - do.padding[axis]
                size = np.count_nonzero((reach >= 0) & (reach < size))
            under *= size
        area, met = area + pixels, met + under
    return met / area if area else 1.0
