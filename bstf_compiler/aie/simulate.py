"""Executes a program on byte-accurate memories: nothing but its instructions, its data image and the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from bstf_compiler import integer
from bstf_compiler.aie import chunks, events, kernels, pointwise
from bstf_compiler.aie.code import Code, Port, Step
from bstf_compiler.aie.isa import Compute, Transfer
from bstf_compiler.aie.memory import Place, layout_of
from bstf_compiler.aie.reach import BLOCK

_POISON = -86
"""What memory holds before anything is written: 0xAA, so that a byte read too early shows."""


class Machine:
    """The memories of a device, and the order of events of a program's steps: a random one that the locks allow if
    there is a seed.
    """

    def __init__(self, program: Code, seed: int | None = None) -> None:
        self._program, self._seed = program, seed
        device = program.device
        ddr = program.data_address + len(program.data)
        self._memories = {"ddr": np.full(ddr, _POISON, np.int8)}
        self._memories["ddr"][program.data_address :] = np.frombuffer(program.data, np.int8)
        for tile in range(device.memtiles):
            self._memories[f"m{tile}"] = np.full(device.memtile.memory_bytes, _POISON, np.int8)
        for column in range(device.columns):
            for row in range(device.rows):
                self._memories[f"c{column}.{row}"] = np.full(device.core.memory_bytes, _POISON, np.int8)
        self._orders: dict[int, events.Events] = {}

    def run(self, images: Sequence[np.ndarray]) -> Iterator[Step]:
        """Executes all steps on one float32 image (h, w, c) of every input; yields each step when it is done."""
        self._write_inputs(images)
        for number, step in enumerate(self._program.steps):
            if number not in self._orders:
                self._orders[number] = _order(step, None if self._seed is None else self._seed + number)
            order = self._orders[number]
            for index, iteration in zip(order.instruction, order.iteration):
                instruction = step.instructions[index]
                if isinstance(instruction, Transfer):
                    self._transfer(instruction, int(iteration))
                else:
                    self._compute(step, instruction, int(iteration))
            yield step

    def inputs(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """DDR, int8, before the first step on one float32 image (h, w, c) of every input."""
        self._write_inputs(images)
        return self._memories["ddr"].copy()

    def tensor(self, name: str) -> np.ndarray:
        """The integers (h, w, c) of a tensor, from wherever it lives."""
        place, channels, _ = self._program.tensors[name]
        if place.memory == "ddr":
            return self._pixels_in_ddr(place)[..., :channels].copy()
        rows, width, blocks = place.shape
        found = np.empty((rows, width, place.length), np.int8)
        for column, block, box in layout_of(place, self._program.device).boxes((0, rows), (0, width), (0, blocks)):
            _, pixels, length = box.sizes
            target = found[:, column : column + pixels, block * BLOCK : block * BLOCK + length]
            target[:] = _view(self._memories[box.tiles[0]], box.address, box.sizes, box.strides)
        return found[..., :channels]

    def _pixels_in_ddr(self, place: Place) -> np.ndarray:
        """A view (rows, columns, padded channels) of a tensor."""
        rows, width, _ = place.shape
        return _view(
            self._memories["ddr"], place.address, (rows, width, place.length), (width * place.pixel, place.pixel)
        )

    def _write_inputs(self, images: Sequence[np.ndarray]) -> None:
        """Puts what the array reads into DDR: the images on their grids, or what the host makes of them first."""
        given = {port.tensor: image for port, image in zip(self._program.inputs, images)}
        for port in self._program.inputs:
            if port.position is not None:
                self._write(port.tensor, integer.quantize(given[port.tensor], port.position))
        for affine in self._program.affines:
            image = given[affine.input]
            scale, offset = affine.constants(image.shape[-3:])
            self._write(affine.tensor, integer.quantize(image * scale + offset, affine.position))

    def _write(self, tensor: str, values: np.ndarray) -> None:
        if tensor in self._program.tensors:
            place, channels, _ = self._program.tensors[tensor]
            pixels = self._pixels_in_ddr(place)
            pixels[..., :channels], pixels[..., channels:] = values, 0

    def _transfer(self, instruction: Transfer, iteration: int) -> None:
        for item in instruction.moves:
            source = self._memories[item.source.tiles[0]]
            start, to = item.source.start(iteration), item.target.start(iteration)
            for tile in item.target.tiles:
                kernels.move(
                    source, start, item.source.strides, self._memories[tile], to, item.target.strides,
                    item.source.sizes,
                )  # fmt: skip

    def _compute(self, step: Step, instruction: Compute, iteration: int) -> None:
        """One operation on a core's memory; a ValueError if its chunk would lead out of its tiles."""
        do, memory = instruction, self._memories[instruction.parameters.tiles[0]]
        x, *others = (access.start(iteration) for access in do.inputs)
        y, chunk = do.output.start(iteration), do.parameters.start(iteration)
        if fault := chunks.misfit(do, memory, chunk):
            raise ValueError(f"layer '{step.layer}': {fault}; the program is damaged: compile again")
        shape, out_shape = do.inputs[0].sizes, do.output.sizes
        window, block = (do.kernel, do.strides, do.dilation, do.padding), do.blocks[0][0]
        if do.op == "conv":
            residual = others[0] if others else -1
            kernels.conv(memory, x, residual, y, chunk, do.scratch, do.begin, do.finish, shape, out_shape, *window)
        elif do.op == "depthwise":
            kernels.depthwise(memory, x, y, chunk, shape, out_shape, block, *window)
        elif do.op in ("maxpool", "averagepool"):
            getattr(kernels, do.op)(memory, x, y, chunk, shape, out_shape, *window)
        elif do.op in ("add", "product"):
            pixel = 0 if do.inputs[1].sizes != shape else shape[2]
            getattr(pointwise, do.op)(memory, x, others[0], y, chunk, shape, pixel)
        elif do.op in ("requantize", "lookup"):
            getattr(pointwise, do.op)(memory, x, y, chunk, do.output.bytes)
        elif do.op in ("nearest", "bilinear"):
            getattr(pointwise, do.op)(memory, x, y, chunk, shape, out_shape, do.padding)
        elif do.op == "depthtospace":
            pointwise.depthtospace(memory, x, y, chunk, shape, out_shape, do.padding, block)
        elif do.op == "concat":
            for part, (access, start) in enumerate(zip(do.inputs, (x, *others))):
                if access.bytes:
                    pointwise.join(memory, start, y, chunk, part, access.sizes[2], out_shape, block)
        else:
            raise ValueError(f"{do.unit} has operation '{do.op}', which no core knows; compile again")


def _view(memory: np.ndarray, address: int, sizes: tuple[int, int, int], strides: tuple[int, int]) -> np.ndarray:
    """A box of bytes in a memory."""
    return np.lib.stride_tricks.as_strided(memory[address:], sizes, (*strides, 1))


def simulate(program: Code, x: integer.Images, seed: int | None = None) -> np.ndarray | list[np.ndarray]:
    """The network's outputs for float images (n, ...), as float32: what `integer.run` gives, from the program."""
    images = _images(program, x)
    if seed is not None and not 0 <= seed < 2**31:
        raise ValueError(f"seed = {seed} must be from 0 to 2**31 - 1")
    machine = Machine(program, seed)
    values = [np.empty((len(images[0]), *port.shape), np.int8) for port in program.outputs]
    for number, one in enumerate(zip(*images)):
        for _ in machine.run(one):
            pass
        for value, port in zip(values, program.outputs):
            value[number] = machine.tensor(port.tensor)
    finished = [_finish(port, value) for port, value in zip(program.outputs, values)]
    return finished[0] if len(finished) == 1 else finished


def trace(program: Code, x: integer.Images) -> dict[str, np.ndarray]:
    """Every layer's output as int8 integers (n, h, w, c) by tensor name, each read when its last step is done."""
    machine = Machine(program)
    images = [_outputs(machine, program, one) for one in zip(*_images(program, x))]
    return {name: np.stack([values[name] for values in images]) for name in images[0]} if images else {}


def _outputs(machine: Machine, program: Code, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Every layer's output for one image of every input, those of the host's layers before the array among them."""
    values = {}
    for step in machine.run(images):
        if not values:
            values = {affine.tensor: machine.tensor(affine.tensor) for affine in program.affines}
        if step.keeps:
            values[step.output] = machine.tensor(step.output)
    return values


def _order(step: Step, seed: int | None) -> events.Events:
    order = events.run(step.instructions, step.locks, seed=seed)
    if order.blocked:
        instruction = step.instructions[order.blocked[0]]
        raise ValueError(
            f"layer '{step.layer}': {instruction.kind} on {instruction.unit} waits for ever for "
            f"{', '.join(action.lock for action in instruction.acquire)}; the program is damaged: compile again"
        )
    return order


def _images(program: Code, x: integer.Images) -> list[np.ndarray]:
    """The images of every input, float32 (n, h, w, c)."""
    arrays = integer.require_images({port.tensor: port.user_shape for port in program.inputs}, x)
    return [array.reshape(-1, *port.shape).astype(np.float32) for port, array in zip(program.inputs, arrays)]


def _finish(port: Port, values: np.ndarray) -> np.ndarray:
    floats = integer.dequantize(values, port.position)
    if port.host == "softmax":
        floats = integer.softmax(floats)
    return floats.reshape(-1, *port.user_shape)
