"""Schedule to program: packed weights, memory map, ports, and the steps of every layer (step.py)."""

from __future__ import annotations

from bstf_compiler.aie import tiling
from bstf_compiler.aie.code import Code, HostAffine, Port, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.layer import Layer, share
from bstf_compiler.aie.schedule import Schedule
from bstf_compiler.aie.step import Chunk, StepWriter
from bstf_compiler.aie.tiling import Tiling
from bstf_compiler.aie.weights import Packer
from bstf_compiler.graph import Affine, Graph, Softmax


def generate(graph: Graph, device: DeviceSpec, schedule: Schedule) -> Code:
    """The code of a scheduled network."""
    placement = schedule.placement
    data = bytearray()
    data_address = placement.ddr_bytes
    steps = []
    for index, (stage, tiles) in enumerate(zip(placement.stages, schedule.tilings)):
        if tiles is None:  # all parts of a concatenation lie in their places
            layer, band = stage.layer, stage.bands[0]
            steps.append(Step(layer.name, layer.op, layer.output, band, index, keeps=True))
            continue
        chunks = _pack(graph, device, stage.layer, tiles, schedule, data, data_address)
        for number in range(len(stage.bands)):
            steps.append(StepWriter(device, placement.places, stage, tiles, chunks, number).step(index))
    end = data_address + len(data)
    if end > device.ddr.memory_bytes:
        raise ValueError(
            f"network '{graph.name}' takes {end} bytes of DDR, of which {device.name} has {device.ddr.memory_bytes}; "
            "use a device with more"
        )
    tensors = {
        name: (place, graph.tensors[name].shape[-1], graph.tensors[name].position)
        for name, place in placement.places.items()
    }
    ports = []
    for name, array_name, shape in zip(graph.outputs, schedule.outputs, graph.output_shapes):
        node = graph.producer(name)
        host = "softmax" if node is not None and isinstance(node.op, Softmax) else "none"
        ports.append(_port(graph, array_name, shape, host))
    return Code(
        graph.name, device, [_port(graph, *one) for one in graph.inputs.items()], _affines(graph), ports, tensors,
        placement.allocations, steps, data_address, bytes(data),
    )  # fmt: skip


def _port(graph: Graph, tensor: str, user_shape: tuple[int, ...], host: str = "none") -> Port:
    found = graph.tensors[tensor]
    return Port(tensor, found.shape[1:], found.position, tuple(user_shape), host)


def _affines(graph: Graph) -> list[HostAffine]:
    """What the host makes of the images first."""
    found = []
    for node in graph:
        if isinstance(node.op, Affine):
            scale, offset = (tuple(map(float, graph.tensors[name].data.ravel())) for name in node.inputs[1:])
            found.append(HostAffine(node.inputs[0], node.output, scale, offset, graph.tensors[node.output].position))
    return found


def _pack(
    graph: Graph,
    device: DeviceSpec,
    layer: Layer,
    tiles: Tiling,
    schedule: Schedule,
    data: bytearray,
    start: int,
) -> dict[tuple[int, int, int], Chunk]:
    """Appends a layer's chunks to the data image; returns them by (round, row of cores, input chunk)."""
    chunks = {}

    def append(content: bytes) -> Chunk:
        made = Chunk(start + len(data), len(content))
        data.extend(content)
        return made

    if not layer.has_weights:
        shared = append(schedule.parameters[layer.name])
        return {(0, row, 0): shared for row in range(device.rows)}
    packer = Packer(graph, layer)
    inputs = share(layer.sources[0].shape[2], tiles.input_chunks)
    for row in range(device.rows):
        for k, pieces in enumerate(tiles.pieces):
            for j, chunk in enumerate(inputs):
                if pieces[row].blocks:
                    needs = tiling.input_blocks(layer, layer.sources[0], pieces, chunk)[row]
                    chunks[k, row, j] = append(packer.chunk(pieces[row].numbers, needs.span))
    return chunks
