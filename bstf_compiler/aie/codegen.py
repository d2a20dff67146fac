"""Schedule to program: packed weights, memory map, ports, and the steps of every layer (step.py)."""

from __future__ import annotations

from bstf_compiler.aie import tiling
from bstf_compiler.aie.code import Code, HostAffine, Port, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.layer import Layer, share
from bstf_compiler.aie.schedule import Schedule
from bstf_compiler.aie.step import StepWriter
from bstf_compiler.aie.tiling import Tiling
from bstf_compiler.aie.weight_stream import Chunk
from bstf_compiler.aie.weights import Packer
from bstf_compiler.graph import Affine, Graph, Softmax


def generate(graph: Graph, device: DeviceSpec, schedule: Schedule) -> Code:
    """The code of a scheduled network."""
    placement = schedule.placement
    data = bytearray()
    data_address = placement.ddr_bytes
    chunks = [
        None if tiles is None else _pack(graph, device, stage.layer, tiles, schedule, data, data_address)
        for stage, tiles in zip(placement.stages, schedule.tilings)
    ]
    steps = _steps(device, schedule, chunks)
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


def _steps(
    device: DeviceSpec, schedule: Schedule, chunks: list[dict[tuple[int, int, int], Chunk] | None]
) -> list[Step]:
    """The steps of all bands; each layer's last one goes on to load the first weights of the next layer.

    Every other layer has its buffers at the other end of the cores' memory, so that there mostly is room for them.
    """
    placement, core_bytes = schedule.placement, tiling.buffer_bytes(device)
    writers: list[tuple[int, StepWriter | None]] = []
    before, cut, above = None, None, True  # the last writer, and how its layer is cut
    for index, (stage, tiles, own) in enumerate(zip(placement.stages, schedule.tilings, chunks)):
        if tiles is None:  # all parts of a concatenation lie in their places
            writers.append((index, None))
            continue
        above = not above
        placed = tiles.mirrored(core_bytes) if above else tiles
        for number in range(len(stage.bands)):
            writer = StepWriter(device, placement.places, stage, placed, own, number)
            if number > 0:
                writer.weights = writer.weights.after(before.weights)
            elif before is not None and stage.ahead:
                room = tiles.weights.room(core_bytes - cut.stop)
                writer.weights = before.following = writer.weights.begun(cut.idle, room)
            writers.append((index, writer))
            before = writer
        cut = tiles
    steps = []
    for index, writer in writers:
        if writer is None:
            layer = placement.stages[index].layer
            steps.append(Step(layer.name, layer.op, layer.output, (0, layer.output_shape[0]), index, keeps=True))
        else:
            steps.append(writer.step(index))
    return steps


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
