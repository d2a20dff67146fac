"""How long a program takes.

`exact` (default) runs the locks of the very instructions that the simulator executes, with true bytes over the links'
rates and effective multiply-adds over the cores' rate: a kept block costs what it costs, on the core that has it.
`calibrated` does the same with cores and links as slow as hardware was measured to be (see calibrated.py).
`published` applies the formulas behind the paper's tables to the program's sub-volumes, for comparison with those
tables only (see published.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from bstf_compiler.aie import bounds, calibrated, events, published
from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import KINDS, Compute, Instruction, Transfer
from bstf_compiler.aie.memory import Allocation
from bstf_compiler.suggestion import suggestion


@dataclass(frozen=True)
class Span:
    """One instruction, all its iterations, on one unit.

    `start` and `end` are seconds since the start of the program; `busy` is the work inside, in seconds; `bytes` moved
    and effective multiply-adds `macs` are those of all iterations.
    """

    layer: str
    kind: str
    unit: str
    start: float
    end: float
    busy: float
    bytes: int
    macs: int


@dataclass(frozen=True)
class LayerEstimate:
    """Times of one layer, in seconds; durations of all layers add up to the total.

    `kinds`: busy seconds of the busiest unit by instruction kind; `bound`: the kind whose busiest unit works longest;
    `macs`: effective multiply-adds; `bytes`: moved by all instructions; `unavoidable`: seconds by instruction kind that
    the work takes in any schedule; `ahead`: of its LOADWM what may be done before the layer begins (see bounds.py).
    """

    name: str
    op: str
    start: float
    seconds: float
    kinds: dict[str, float]
    bound: str
    macs: int
    bytes: int
    unavoidable: dict[str, float] = field(default_factory=dict)
    ahead: float = 0.0

    @property
    def lower_bound_seconds(self) -> float:
        """Seconds that the layer is on the array in any schedule, at the cores' and links' full rates."""
        return bounds.on_array(self.unavoidable, self.ahead)


@dataclass(frozen=True)
class Estimate:
    """Times of a program on a device under a cost model.

    `host`: what the host computes, which no time counts; `held`: what each memory tile of `memtile_bytes` holds, its
    stages being indices of `layers`; `ddr_rate`: bytes/s that links to and from DDR carry at most, all together.
    """

    device: str
    cost_model: str
    layers: tuple[LayerEstimate, ...]
    spans: tuple[Span, ...]
    host: tuple[str, ...] = ()
    held: tuple[Allocation, ...] = ()
    memtile_bytes: int = 0
    ddr_rate: float = 0.0

    @property
    def total_seconds(self) -> float:
        """Time of one image through the whole network, in seconds."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def lower_bound_seconds(self) -> float:
        """Seconds below which no schedule of these layers on this device can come; bounds.py says what is assumed."""
        most_ahead = max((layer.ahead for layer in self.layers), default=0.0)
        return bounds.network_bound((layer.unavoidable for layer in self.layers), most_ahead)


def estimate(code: Code, cost_model: str = "exact", unavoidable: dict[int, dict[str, float]] | None = None) -> Estimate:
    """Times of a program.

    Args:
        code: the program.
        cost_model: `exact`, `calibrated` or `published`.
        unavoidable: what `bounds.layer_bounds` says of the program, the same under every cost model; None counts it.

    Raises:
        ValueError: unknown cost model.
    """
    device = calibrated.measured(code.device) if cost_model == "calibrated" else code.device
    timed = partial(_timed, device)
    models: dict[str, Callable[[Code, int], list[Span]]] = {
        "exact": timed, "calibrated": timed, "published": _published,
    }  # fmt: skip
    if cost_model not in models:
        known = f"{suggestion(cost_model, models)}; use one of: {', '.join(models)}"
        raise ValueError(f"unknown cost model '{cost_model}'{known}")
    spans: dict[str, list[Span]] = {step.layer: [] for step in code.steps}
    times: dict[int, tuple[Step, float, float]] = {}
    clock = 0.0
    for number, step in enumerate(code.steps):
        made = models[cost_model](code, number)
        for span in made:
            spans[span.layer].append(_shifted(span, clock))
        duration = max((span.end for span in made), default=0.0)
        _, start, before = times.get(step.stage, (step, clock, 0.0))
        times[step.stage] = step, start, before + duration
        clock = start + before + duration
    unavoidable, ahead = unavoidable or bounds.layer_bounds(code), bounds.seconds_ahead(code.device)
    layers = [
        _layer(step, start, duration, spans[step.layer], unavoidable[stage], ahead)
        for stage, (step, start, duration) in times.items()
    ]
    everything = (span for own in spans.values() for span in own)
    return Estimate(
        device.name, cost_model, tuple(layers), tuple(everything), code.host_parts,
        tuple(code.allocations), device.memtile.memory_bytes, device.ddr_rate,
    )  # fmt: skip


def layer_seconds(code: Code, device: DeviceSpec) -> list[float]:
    """Seconds of every layer under the `exact` cost model, and nothing else: much sooner than `estimate`.

    Args:
        code: the program.
        device: what runs it; faster or slower than the program's own, but with the same memories.
    """
    found: dict[int, float] = {}
    for step in code.steps:
        found[step.stage] = found.get(step.stage, 0.0) + float(_events(device, step)[0].end.max(initial=0.0))
    return list(found.values())


def _shifted(span: Span, by: float) -> Span:
    return Span(
        span.layer, span.kind, span.unit, span.start + by, span.end + by, span.busy, span.bytes, span.macs
    )  # fmt: skip


def _layer(
    step: Step, start: float, seconds: float, spans: list[Span], unavoidable: dict[str, float], ahead: float
) -> LayerEstimate:
    busy: dict[tuple[str, str], float] = {}
    for span in spans:
        busy[span.kind, span.unit] = busy.get((span.kind, span.unit), 0.0) + span.busy
    kinds = {kind: max((b for (k, _), b in busy.items() if k == kind), default=0.0) for kind in KINDS}
    return LayerEstimate(
        step.layer, step.op, start, seconds, kinds, max(KINDS, key=lambda kind: kinds[kind]),
        sum(span.macs for span in spans), sum(span.bytes for span in spans), unavoidable, ahead,
    )  # fmt: skip


# --- exact, calibrated ---


def seconds(device: DeviceSpec, instruction: Instruction) -> float:
    """Seconds of one iteration: bytes over the link's rate; whole cycles of work over the core's rate."""
    if isinstance(instruction, Transfer):
        return instruction.bytes / device.rate(instruction.kind)
    core = device.core
    rate = core.macs_per_cycle if instruction.op == "conv" else core.elementwise_per_cycle
    return math.ceil(instruction.work / rate + instruction.added / core.elementwise_per_cycle) / device.clock_hz


def _events(device: DeviceSpec, step: Step) -> tuple[events.Events, list[float]]:
    """What happens in a step, and seconds of one iteration of every instruction."""
    slower = _slower(device, step)
    durations = [seconds(device, one) * slower.get((one.kind, one.unit), 1.0) for one in step.instructions]
    return events.run(step.instructions, step.locks, durations), durations


def _slower(device: DeviceSpec, step: Step) -> dict[tuple[str, str], float]:
    """How much longer units of LOADFM and WRITEFM take than they would alone, by kind and unit: where all together ask
    more of the link of a memory tile than one of its units asks in a step, they end when it has done it all.
    """
    units: dict[tuple[str, str], float] = defaultdict(float)
    tiles: dict[tuple[str, str], float] = defaultdict(float)
    met: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for instruction in step.instructions:
        if (kind := instruction.kind) in ("LOADFM", "WRITEFM"):
            unit = kind, instruction.unit
            for move in instruction.moves:
                moved = move.source.bytes * instruction.iterations
                tile = kind, (move.source if kind == "LOADFM" else move.target).tiles[0]
                units[unit] += moved
                tiles[tile] += moved / device.columns_of_activation_tile
                met[unit].add(tile)
    found = {unit: max(tiles[tile] for tile in met[unit]) / moved for unit, moved in units.items() if moved}
    return {unit: factor for unit, factor in found.items() if factor > 1}


def _timed(device: DeviceSpec, code: Code, number: int) -> list[Span]:
    """The spans of a step; those of what it loads ahead belong to the next layer."""
    step = code.steps[number]
    following = next((one.layer for one in code.steps[number + 1 :] if one.instructions), "")
    order, durations = _events(device, step)
    starts = np.full(len(durations), np.inf)
    ends = np.zeros(len(durations))
    np.minimum.at(starts, order.instruction, order.start)
    np.maximum.at(ends, order.instruction, order.end)
    return [
        Span(
            following if isinstance(instruction, Transfer) and instruction.ahead else step.layer,
            instruction.kind, instruction.unit, float(start), float(end),
            duration * instruction.iterations, instruction.bytes * instruction.iterations, _macs(instruction),
        )
        for instruction, start, end, duration in zip(step.instructions, starts, ends, durations)
    ]  # fmt: skip


def _macs(instruction: Instruction) -> int:
    return instruction.macs * instruction.iterations if isinstance(instruction, Compute) else 0


# --- published ---

_PUBLISHED_OPS = {"conv": "conv2d", "depthwise": "conv2d", "add": "add", "product": "add", "averagepool": "avgpool2d"}
"""What the tables have, by operation; what they lack costs what their maxpool2d does, an operation a value read."""


def _published(code: Code, number: int) -> list[Span]:
    """One span an instruction kind; their ends say when the layer is over."""
    step = code.layer_step(number)
    if not step.instructions:
        return []
    device, layers = code.device, _published_layers(code, number, step)
    if len(set(vars(device.links).values())) > 1:
        raise ValueError(
            f"the published cost model knows one link rate; those of {device.name} differ: use cost_model='exact'"
        )
    rate, clock = device.links.loadfm, device.clock_hz
    kinds = {
        "LOAD": _slowest(step, "LOAD", device.rate("LOAD")),
        "LOADW": published.loadw_seconds(layers[0], device.memtiles, 1, rate),
        "LOADFM": sum(sum(published.loadfm_seconds(layer, rate)) for layer in layers),
        "LOADWM": sum(sum(published.loadwm_seconds(layer, rate)) for layer in layers),
        "COMP": sum(sum(published.comp_seconds(layer, clock)) for layer in layers),
        "WRITEFM": sum(sum(published.writefm_seconds(layer, rate)) for layer in layers),
        "WRITE": _slowest(step, "WRITE", device.rate("WRITE")),
    }
    total = published.layer_seconds(layers[0], kinds["LOAD"], kinds["LOADW"], kinds["WRITE"], rate, clock)
    total += sum(published.layer_seconds(layer, 0.0, 0.0, 0.0, rate, clock) for layer in layers[1:])
    macs = sum(_macs(instruction) for instruction in step.instructions)
    return [
        Span(
            step.layer, kind, "all", 0.0, total, busy,
            sum(i.bytes * i.iterations for i in step.instructions if i.kind == kind), macs if kind == "COMP" else 0,
        )
        for kind, busy in kinds.items()
    ]  # fmt: skip


def _slowest(step: Step, kind: str, rate: float) -> float:
    loads: dict[str, int] = {}
    for instruction in step.instructions:
        if instruction.kind == kind:
            loads[instruction.unit] = loads.get(instruction.unit, 0) + instruction.bytes * instruction.iterations
    return max(loads.values(), default=0) / rate


def _published_layers(code: Code, number: int, step: Step) -> list[published.PublishedLayer]:
    """The step's sub-volumes: those of the busiest core, its column's output, the runs of its column. A convolution
    that ends in a sum is two layers, as in the tables.
    """
    work = [i for i in step.instructions if isinstance(i, Compute)]
    largest = max(work, key=lambda i: (i.inputs[0].sizes[0] * i.inputs[0].sizes[1], i.output.sizes[2]))
    column = largest.unit.rsplit(".", 1)[0]
    mine = [i for i in work if i.unit == largest.unit and i.finish]
    tallest = max(i.inputs[0].sizes[0] for i in mine)
    channels = {i.unit: i.output.sizes[2] for i in work if i.unit.rsplit(".", 1)[0] == column}
    output = code.tensors[step.output][0]
    weighted = step.op in ("conv", "depthwise")
    deep = largest.inputs[0].sizes[2] if step.op == "conv" else 1  # input channels of an output channel
    splits = max(1, sum(i.unit == largest.unit for i in work) // len(mine)) if weighted else 1
    begins = next(n for n, one in enumerate(code.steps) if one.stage == step.stage)  # later bands may load none
    loads = sum(i.kind == "LOADW" for i in code.layer_step(begins).instructions)
    chunks = max(1, loads // splits) if weighted else 0
    dense = sum(i.output.bytes * math.prod(i.kernel) * i.inputs[0].sizes[2] * i.iterations for i in work)
    effective = sum(i.work * i.iterations for i in work)
    layer = published.PublishedLayer(
        name=step.layer,
        op=_PUBLISHED_OPS.get(step.op, "maxpool2d"),
        input_shapes=tuple((1, *access.sizes) for access in largest.inputs),
        output_shape=(1, output.shape[0], output.shape[1], output.length),
        input=(1, *largest.inputs[0].sizes),
        output=(1, *largest.output.sizes[:2], sum(channels.values())),
        weights=(largest.output.sizes[2], *largest.kernel, deep) if weighted else None,
        density=max(effective / dense, 1e-9) if step.op == "conv" and dense else 1.0,
        chunks=chunks,
        cin_splits=splits,
        segments=tuple(published.Segment(i.iterations, i.inputs[0].sizes[0] == tallest) for i in mine),
    )
    if step.op != "conv" or len(mine[0].inputs) == 1:
        return [layer]
    whole, tile = layer.output_shape, layer.output
    runs = tuple(published.Segment(i.iterations, i.output.sizes == mine[0].output.sizes) for i in mine)
    addition = published.PublishedLayer(
        name=step.layer,
        op="add",
        input_shapes=(whole, whole),
        output_shape=whole,
        input=tile,
        output=tile,
        segments=runs,
    )
    return [replace(layer, input_shapes=layer.input_shapes[:1]), addition]
