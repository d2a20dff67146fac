"""The plan of a network on a device: order of layers, tiles, packed weights, memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from bstf_compiler.aie import memory, tiling, weights
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.layer import DoesNotFit, Layer, inputs_of, layers_of, outputs_of
from bstf_compiler.aie.tiling import NOTHING, Spare, Tiling
from bstf_compiler.graph import Graph


@dataclass(frozen=True)
class Schedule:
    """Everything that code generation needs.

    `tilings`: one a stage, None where nothing is left to compute; `parameters`: chunk of each layer without weights, by
    layer name; `outputs`: the tensors that the array returns, in the order of the network's outputs.
    """

    placement: memory.Placement
    tilings: list[Tiling | None]
    parameters: dict[str, bytes]
    outputs: list[str]


def plan(graph: Graph, device: DeviceSpec) -> Schedule:
    """Layers in the graph's order, each with the fastest legal tiling, and a place for every tensor.

    Raises:
        ValueError: if a layer fits no sub-volume or no memory; the sentence names it.
    """
    apart: set[str] = set()
    while True:
        try:
            return _plan(graph, device, layers_of(graph, apart))
        except DoesNotFit as large:
            if large.layer.residual is None:
                raise
            apart.add(large.layer.output)


def _plan(graph: Graph, device: DeviceSpec, layers: list[Layer]) -> Schedule:
    if not layers:
        raise ValueError(f"network '{graph.name}' has no layer for the array")
    parameters = {
        layer.name: weights.parameters(graph, graph.producer(layer.output), layer)
        for layer in layers
        if not layer.has_weights
    }
    chosen: dict[tuple[str, int], Tiling] = {}
    computing = [layer.name for layer in layers if layer.sources]
    before = dict(pairwise([None, *computing][::-1]))
    latest: dict[str | None, Tiling] = {}  # that was asked for

    def tile(layer: Layer, rows: int) -> Tiling:
        if (layer.name, rows) not in chosen:
            size = len(parameters.get(layer.name, b""))
            earlier = latest.get(before[layer.name])
            spare = NOTHING
            if earlier is not None and rows == layer.output_shape[0]:  # the first of several bands finds no weights
                spare = Spare(earlier.idle, tiling.buffer_bytes(device) - earlier.stop)
            chosen[layer.name, rows] = tiling.choose(layer, device, size, rows, spare)
        latest[layer.name] = chosen[layer.name, rows]
        return chosen[layer.name, rows]

    outputs = outputs_of(graph)

    def cost(layer: Layer, rows: int) -> tuple[int, float]:
        chosen = tile(layer, rows)
        return chosen.weights.total * device.rows_of_weight_tile, chosen.seconds

    placement = memory.place(layers, inputs_of(graph), outputs, device, cost)
    tilings = [
        tile(stage.layer, max(b - a for a, b in stage.bands)) if stage.layer.sources else None
        for stage in placement.stages
    ]
    return Schedule(placement, tilings, parameters, outputs)
