"""Executes a program on byte-accurate memories: nothing but its instructions, its data image and the input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bstf_compiler import integer
from bstf_compiler.aie import events, kernels
from bstf_compiler.aie.code import Code, Port, Step
from bstf_compiler.aie.isa import Compute, Transfer
from bstf_compiler.aie.layer import BLOCK, blocks_of, share

_POISON = -86
"""What memory holds before anything is written: 0xAA, so that a byte read too early shows."""


class Machine:
    """The memories of a device, and the order of events of a program's steps."""

    def __init__(self, program: Code) -> None:
        self._program = program
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

    def run(self, image: np.ndarray) -> Iterator[Step]:
        """Executes all steps on one image of int8 integers (h, w, c); yields each step when it is done."""
        self._write_input(image)
        for number, step in enumerate(self._program.steps):
            if number not in self._orders:
                self._orders[number] = _order(step)
            order = self._orders[number]
            for index, iteration in zip(order.instruction, order.iteration):
                instruction = step.instructions[index]
                if isinstance(instruction, Transfer):
                    self._transfer(instruction, int(iteration))
                else:
                    self._compute(instruction, int(iteration))
            yield step

    def tensor(self, name: str) -> np.ndarray:
        """The integers (h, w, c) of a tensor, from wherever it lives."""
        place, channels, _ = self._program.tensors[name]
        height, width, blocks = place.shape
        if place.memory == "ddr":
            flat = self._memories["ddr"][place.address : place.address + place.bytes]
            return flat.reshape(height, width, blocks * BLOCK)[..., :channels].copy()
        pieces, columns = [], self._program.device.columns
        for tile, (start, stop) in enumerate(share(width, columns)):
            size = height * (stop - start) * place.pixel
            flat = self._memories[f"m{tile}"][place.address : place.address + size]
            pieces.append(flat.reshape(height, stop - start, place.pixel))
        return np.concatenate(pieces, axis=1)[..., :channels]

    def _write_input(self, image: np.ndarray) -> None:
        place, _, _ = self._program.tensors[self._program.input.tensor]
        padded = np.zeros((*image.shape[:2], blocks_of(image.shape[2]) * BLOCK), np.int8)
        padded[..., : image.shape[2]] = image
        self._memories["ddr"][place.address : place.address + place.bytes] = padded.ravel()

    def _transfer(self, instruction: Transfer, iteration: int) -> None:
        for item in instruction.moves:
            source = self._memories[item.source.tiles[0]]
            start, to = item.source.start(iteration), item.target.start(iteration)
            for tile in item.target.tiles:
                kernels.move(
                    source, start, item.source.strides, self._memories[tile], to, item.target.strides,
                    item.source.sizes,
                )  # fmt: skip

    def _compute(self, instruction: Compute, iteration: int) -> None:
        memory = self._memories[instruction.parameters.tiles[0]]
        inputs = [access.start(iteration) for access in instruction.inputs]
        output, chunk = instruction.output.start(iteration), instruction.parameters.start(iteration)
        shapes = (
            instruction.input_shape, instruction.output_shape, instruction.kernel, instruction.strides,
            instruction.padding,
        )  # fmt: skip
        if instruction.op == "conv":
            framing = (instruction.scratch, instruction.begin, instruction.finish)
            kernels.conv(memory, inputs[0], output, chunk, *framing, *shapes)
        elif instruction.op in ("add", "requantize"):
            function = kernels.add if instruction.op == "add" else kernels.requantize
            function(memory, *inputs, output, chunk, instruction.output.bytes)
        else:
            function = kernels.maxpool if instruction.op == "maxpool" else kernels.averagepool
            function(memory, inputs[0], output, chunk, *shapes)


def simulate(program: Code, x: np.ndarray) -> np.ndarray | list[np.ndarray]:
    """The network's outputs for float images (n, ...), as float32: what `integer.run` gives, from the program."""
    images = _images(program, x)
    machine = Machine(program)
    values = [np.empty((len(images), *port.shape), np.int8) for port in program.outputs]
    for number, image in enumerate(images):
        for _ in machine.run(image):
            pass
        for value, port in zip(values, program.outputs):
            value[number] = machine.tensor(port.tensor)
    finished = [_finish(port, value) for port, value in zip(program.outputs, values)]
    return finished[0] if len(finished) == 1 else finished


def trace(program: Code, x: np.ndarray) -> dict[str, np.ndarray]:
    """Every layer's output as int8 integers (n, h, w, c) by tensor name, each read when its last step is done."""
    machine, values = Machine(program), {}
    for image in _images(program, x):
        for step in machine.run(image):
            if step.keeps:
                values.setdefault(step.output, []).append(machine.tensor(step.output))
    return {name: np.stack(images) for name, images in values.items()}


def _order(step: Step) -> events.Events:
    order = events.run(step.instructions, step.locks)
    if order.blocked:
        instruction = step.instructions[order.blocked[0]]
        raise ValueError(
            f"layer '{step.layer}': {instruction.kind} on {instruction.unit} waits for ever for "
            f"{', '.join(action.lock for action in instruction.acquire)}; the program is damaged: compile again"
        )
    return order


def _images(program: Code, x: np.ndarray) -> np.ndarray:
    port = program.input
    x = np.asarray(x)
    if x.shape[1:] != port.user_shape:
        raise ValueError(
            f"program '{program.name}' takes images of shape (n, {', '.join(map(str, port.user_shape))}); got {x.shape}"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"the images for program '{program.name}' hold NaN or infinite values; clean them first")
    return integer.quantize(x.reshape(-1, *port.shape), port.position)


def _finish(port: Port, values: np.ndarray) -> np.ndarray:
    floats = integer.dequantize(values, port.position)
    if port.host == "softmax":
        floats = integer.softmax(floats)
    return floats.reshape(-1, *port.user_shape)
