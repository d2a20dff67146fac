"""What a compiled network consists of: instructions, memory map, data image. Enough to run it and to time it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from bstf_compiler import integer
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import Instruction, Transfer
from bstf_compiler.aie.memory import Allocation, Packing, Place, packing


@dataclass(frozen=True)
class Port:
    """An input or output of the network: tensor in DDR, logical shape (h, w, c), position, shape for the user without
    batch, and what the host does to it after the array ("none" or "softmax"). An input without a position is float:
    the host makes others of it, or nobody reads it; in the latter case it may have any shape.
    """

    tensor: str
    shape: tuple[int, ...]
    position: int | None
    user_shape: tuple[int, ...]
    host: str = "none"


@dataclass(frozen=True)
class HostAffine:
    """What the host makes of the images of an input before the array: `tensor` = x * scale + offset in float32, on the
    grid of `position`. Constants are a number, one a channel, or those of a whole image row by row, channels fastest.
    """

    input: str
    tensor: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    position: int

    def constants(self, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Scale and offset in float32, shaped to meet images of `shape`.

        Raises:
            ValueError: they don't fit such images.
        """
        arrays = []
        for values in (self.scale, self.offset):
            if len(values) not in (1, shape[-1], math.prod(shape)):
                raise ValueError(
                    f"'{self.tensor}': the host has a constant of {len(values)} numbers for images {shape}; the "
                    "program is damaged: compile again"
                )
            array = np.array(values, np.float32)
            arrays.append(array.reshape(shape) if len(values) == math.prod(shape) else array)
        return tuple(arrays)


WEIGHTS, WEIGHTS_AHEAD = "weights", "weights ahead"
"""Names of the buffers that hold a step's chunks in every core, and the first ones of the next layer."""


@dataclass
class Step:
    """What runs between two barriers: output rows [first, last) of a layer, on all units.

    `locks`: initial values. `buffers`: name, address and bytes in every core. `keeps`: whether the layer's output is
    whole after this step.
    """

    layer: str
    op: str
    output: str
    rows: tuple[int, int]
    stage: int
    keeps: bool
    locks: dict[str, int] = field(default_factory=dict)
    buffers: list[tuple[str, int, int]] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Code:
    """A network compiled for a device.

    `affines`: what the host makes of inputs, if anything.
    `tensors`: place, logical channels and position of every activation; `data`: bytes of DDR that are known at compile
    time (the packed weights), from `data_address` on.
    """

    name: str
    device: DeviceSpec
    inputs: list[Port]
    affines: list[HostAffine]
    outputs: list[Port]
    tensors: dict[str, tuple[Place, int, int]]
    allocations: list[Allocation]
    steps: list[Step]
    data_address: int
    data: bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights, bias, Γ indices and parameters in DDR."""
        return len(self.data)

    @property
    def packing(self) -> Packing:
        """How good the placement in memory tiles is, and what DDR holds for want of room there."""
        ends = {port.tensor for port in (*self.inputs, *self.affines, *self.outputs)}
        return packing(self.allocations, {name: place for name, (place, _, _) in self.tensors.items()}, ends)

    @property
    def host_parts(self) -> tuple[str, ...]:
        """What the host computes, in words: no core does, and no estimate counts its time."""
        before = [f"affine '{affine.tensor}' of input '{affine.input}'" for affine in self.affines]
        return (*before, *(f"{port.host} of '{port.tensor}'" for port in self.outputs if port.host != "none"))

    def layer_step(self, number: int) -> Step:
        """Step `number` with all that is done for its layer, and nothing for another: without what it loads ahead, with
        what the step before has.
        """
        step = self.steps[number]
        before = next((one for one in reversed(self.steps[:number]) if one.instructions), None)
        loaded = [i for i in before.instructions if _ahead(i)] if before and step.instructions else []
        return replace(step, instructions=loaded + [i for i in step.instructions if not _ahead(i)])

    def image_range(self, port: Port) -> tuple[np.ndarray, np.ndarray]:
        """The values of an input's images (a number, or an array that meets images) between which the grid of its first
        tensor on the array lies; 0 and 1 if nobody reads it.
        """
        first = next((affine for affine in self.affines if affine.input == port.tensor), None)
        if first is None:
            grid = np.array([integer.INT8_MIN, integer.INT8_MAX]) * 2.0 ** -(port.position or 0)
            ends = np.array([0.0, 1.0]) if port.position is None else grid
            return ends[:1], ends[1:]
        scale, offset = (constants.astype(np.float64) for constants in first.constants(port.shape))
        scale = np.where(scale == 0, 1.0, scale)  # any value does where the image doesn't count
        ends = [(end * 2.0**-first.position - offset) / scale for end in (integer.INT8_MIN, integer.INT8_MAX)]
        return np.minimum(*ends), np.maximum(*ends)


def _ahead(instruction: Instruction) -> bool:
    return isinstance(instruction, Transfer) and instruction.ahead
