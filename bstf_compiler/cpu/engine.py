"""Engine: a network on the CPU at hand, in which a zero block costs no time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
from rich.table import Table

from bstf_compiler import graph_file, integer, passes
from bstf_compiler.cpu import calibration, team
from bstf_compiler.cpu.inference import memory_of, run
from bstf_compiler.cpu.kernels.conv import ConvWeights
from bstf_compiler.cpu.layout import WORDS, Layout
from bstf_compiler.cpu.operations import format_of, host_images, operations
from bstf_compiler.cpu.plan import Plan, Weights, make_plan
from bstf_compiler.cpu.simd import Isa, host_isa
from bstf_compiler.graph import Graph, Softmax

# Larger batches go through in parts: what the images need should stay in the caches.
_MOST_IMAGES = 8


@dataclass(frozen=True)
class LayerTime:
    """What one operation took: `seconds` is a median; operations and bytes are those of all images, each byte counted
    once.
    """

    name: str
    kind: str
    seconds: float
    operations: int
    dense_operations: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int

    @property
    def bytes(self) -> int:
        """All that it reads and writes."""
        return self.weight_bytes + self.input_bytes + self.output_bytes


@dataclass(frozen=True)
class Profile:
    """Times of the operations of one inference of `images` images.

    Attributes:
        images: how many.
        layers: in order.
        memory_bytes: of all activations together.
        live_bytes: the most that are needed at a time, below which no placement gets.
    """

    images: int
    layers: list[LayerTime]
    memory_bytes: int
    live_bytes: int

    @property
    def seconds(self) -> float:
        """Of all operations."""
        return sum(layer.seconds for layer in self.layers)

    def __rich__(self) -> Table:
        """A table for `rich.print`."""
        memory, live = (size / 2**20 for size in (self.memory_bytes, self.live_bytes))
        table = Table(
            title=f"{self.images} images, {self.seconds * 1e3:.2f} ms",
            caption=f"activations take {memory:.2f} MiB; {live:.2f} MiB are needed at a time",
        )
        for name in ("layer", "does", "ms", "eff. Gop/s", "dense-equivalent", "weights KiB", "input KiB", "output KiB"):
            table.add_column(name, justify="left" if name in ("layer", "does") else "right")
        for one in self.layers:
            table.add_row(
                one.name,
                one.kind,
                f"{one.seconds * 1e3:.3f}",
                f"{one.operations / one.seconds / 1e9:.1f}" if one.operations and one.seconds else "",
                f"{one.dense_operations / one.seconds / 1e9:.1f}" if one.operations and one.seconds else "",
                f"{one.weight_bytes / 1024:.0f}" if one.weight_bytes else "",
                f"{one.input_bytes / 1024:.0f}",
                f"{one.output_bytes / 1024:.0f}",
            )
        return table


class Engine:
    """A network, ready to run on NumPy images; zero blocks are neither stored nor multiplied.

    A float network is computed in float32, a fixed-point one in int8: its results are those of `integer.run`, bit by
    bit.

    It may be called from several threads at once. Layouts, tasks and the memory of activations are planned once for
    each number of images. The first call on a machine compiles the kernels, which takes half a minute; later processes
    find them. Float networks compute a 3x3 convolution directly or by Winograd's method, whatever takes less time by
    what a second of measurements told, the first time on a machine; these are kept (`bstf_compiler.cpu.calibration`),
    so results stay the same.

    Args:
        source: folder of a SavedModel, file that `save` wrote, or a graph that `bstf_compiler.load` has read.
        threads: how many to use, at most as many as Numba has; None: all of them.
        precision: "float32" or "int8", to be sure of what it computes in; None: whatever the network is made for.
        recalibrate: whether to measure the machine again.

    Attributes:
        graph: the network.
        threads: how many an inference uses.

    Raises:
        FileNotFoundError: there is no SavedModel or file.
        ValueError: it is damaged, holds an operation that the engine doesn't know, or isn't made for the precision.

    Example:
        >>> engine = Engine("resnet50")
        >>> logits = engine(images)
    """

    def __init__(
        self,
        source: str | Path | Graph,
        *,
        threads: int | None = None,
        precision: str | None = None,
        recalibrate: bool = False,
    ) -> None:
        if not isinstance(source, Graph):
            source = _read(source)
        self._format = format_of(source)
        _check_precision(source, precision)
        if self._format == WORDS:
            integer.require_fixed_point(source)
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; an inference takes at least 1.")
        self.graph = source
        self.threads = team.size(threads or numba.config.NUMBA_NUM_THREADS, 0)
        self._isa = host_isa()
        self._lowered = passes.without_unread_pixels(source)
        if recalibrate:
            calibration.costs(self._isa, recalibrate=True)
        self._operations = operations(self._lowered, self._isa, self._winograd_pays)
        self._weights = Weights.of(self._operations, self._format)
        self._hosts = [(list(source.inputs).index(node.inputs[0]), node) for node in host_images(self._lowered)]
        self._ends = [_before_softmax(source, name) for name in source.outputs]
        self._plans: dict[int, Plan] = {}
        self._memories: dict[int, deque[np.ndarray]] = {}
        self._planning = threading.Lock()

    def __call__(self, x: integer.Images) -> np.ndarray | list[np.ndarray]:
        """The network's outputs.

        Args:
            x: (n, height, width, channels), finite numbers; of several inputs a list in the order of `graph.inputs`, or
                a dictionary by name.

        Returns:
            float32, in the shape of the SavedModel's output; a list if it has several.

        Raises:
            ValueError: images have another shape, or there are none, or they hold NaN or infinite values.
        """
        arrays = integer.require_images(self.graph.inputs, x)
        count = len(arrays[0])
        if not count:
            raise ValueError(f"input '{next(iter(self.graph.inputs))}' has no images; give at least one")
        starts = range(0, count, _MOST_IMAGES)
        parts = [self._infer([array[start : start + _MOST_IMAGES] for array in arrays]) for start in starts]
        results = [np.concatenate(outputs) if len(parts) > 1 else outputs[0] for outputs in zip(*parts)]
        return results[0] if len(results) == 1 else results

    def save(self, path: str | Path) -> None:
        """Writes the network to a file, of which an engine is made faster than of a SavedModel and without TensorFlow.

        Args:
            path: of the file; a file there is replaced when the new one is complete.

        Raises:
            FileNotFoundError: there is no folder for it.
        """
        graph_file.write(self.graph, path)

    def memory_bytes(self, images: int = 1) -> tuple[int, int]:
        """Bytes of all activations for so many images, and the most that are in use at a time."""
        plan = self._plan(images)
        return 4 * plan.elements, 4 * plan.live

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, biases and indices."""
        return sum(one.weights.nbytes for one in self._operations if one.weights is not None)

    def profile(self, x: integer.Images, repeats: int = 10) -> Profile:
        """Times every operation on images as for a call, at most `_MOST_IMAGES`; medians of `repeats` inferences.

        The times are taken inside of whole inferences, so their sum is close to an inference's.
        """
        self(x)
        arrays = [array[:_MOST_IMAGES] for array in integer.require_images(self.graph.inputs, x)]
        count, flat = len(arrays[0]), self._flat(arrays)
        plan = self._plan(count)
        with self._memory(count, plan) as memory:
            times = [self._run(plan, flat, memory) for _ in range(repeats)]
        layers = []
        for one, nanoseconds in zip(self._operations, np.median(times, axis=0)):
            read, written = ([plan.layouts[name].used_bytes for name in names] for names in (one.inputs, [one.output]))
            layers.append(
                LayerTime(
                    one.name,
                    one.kind_name,
                    float(nanoseconds) * 1e-9,
                    2 * one.kept_macs * count,
                    2 * one.macs * count,
                    one.weights.nbytes if one.weights is not None else 0,
                    sum(read) if one.inputs else flat.nbytes,
                    sum(written),
                )
            )
        return Profile(count, layers, *self.memory_bytes(count))

    def _winograd_pays(self, weights: ConvWeights, output: tuple[int, int]) -> bool:
        return calibration.costs(self._isa).pays(weights, output, self._isa)

    def _plan(self, images: int) -> Plan:
        with self._planning:
            if images not in self._plans:
                tensors = self._lowered.tensors.values()
                shapes = {tensor.name: _shape(tensor.shape) for tensor in tensors if not tensor.is_constant}
                self._plans[images] = make_plan(
                    self._operations,
                    shapes,
                    self._ends,
                    self._weights,
                    images,
                    self.threads,
                    self._format,
                    self._isa,
                )
            return self._plans[images]

    @contextmanager
    def _memory(self, images: int, plan: Plan) -> Iterator[np.ndarray]:
        """Memory for the activations of one inference, given back for the next one."""
        free = self._memories.setdefault(images, deque())
        try:
            memory = free.pop()
        except IndexError:
            memory = memory_of(plan, self._format)
        try:
            yield memory
        finally:
            free.append(memory)

    def _run(self, plan: Plan, flat: np.ndarray, memory: np.ndarray) -> np.ndarray:
        """Runs the steps on the images of all inputs, one after another; returns the nanoseconds of each."""
        return run(plan, self._weights, flat, memory, self.threads, self._format, self._isa)

    def _flat(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The elements of all inputs and of what the host computes, float32, one array after another; of one array
        without a copy if it can be.
        """
        made = list(arrays)
        for index, node in self._hosts:
            scale, offset = (constant.data for constant in self._lowered.constants(node))
            made.append(arrays[index].astype(np.float32) * scale + offset)
        flat = [np.ascontiguousarray(array, np.float32).reshape(-1) for array in made]
        return flat[0] if len(flat) == 1 else np.concatenate(flat)

    def _infer(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        count = len(arrays[0])
        plan = self._plan(count)
        with self._memory(count, plan) as memory:
            self._run(plan, self._flat(arrays), memory)
            found = [_images(memory, plan.layouts[name], self._isa) for name in self._ends]
        results = []
        for name, end, values, shape in zip(self.graph.outputs, self._ends, found, self.graph.output_shapes):
            if self._format == WORDS:
                values = integer.dequantize(values, self.graph.tensors[end].position)
            results.append((values if name == end else integer.softmax(values)).reshape(-1, *shape))
        return results


def _read(path: str | Path) -> Graph:
    """A network from a file of `Engine.save` or a SavedModel."""
    if Path(path).is_file():
        return graph_file.read(path)
    from bstf_compiler import load

    return load(path)


def _check_precision(graph: Graph, precision: str | None) -> None:
    """Refuses a precision that a network isn't made for: its numbers would be others than those that were tested."""
    if precision not in (None, "float32", "int8"):
        raise ValueError(f"precision is {precision!r}; 'float32', 'int8' and None are supported.")
    if precision == "int8" and not graph.is_fixed_point:
        raise ValueError(f"network '{graph.name}' is float; quantise it with bstf.quantize to compute it in int8.")
    if precision == "float32" and graph.is_fixed_point:
        raise ValueError(
            f"network '{graph.name}' is fixed-point and computed in int8, exactly; export the float model for float32."
        )


def _before_softmax(graph: Graph, name: str) -> str:
    """What a softmax reads, if it makes this output; it is computed on the way out."""
    source = graph.producer(name)
    return source.inputs[0] if source is not None and isinstance(source.op, Softmax) else name


def _shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels of a tensor with a batch axis; a vector is an image of one pixel."""
    return shape[1:] if len(shape) == 4 else (1, 1, shape[-1])


def _images(memory: np.ndarray, layout: Layout, isa: Isa) -> np.ndarray:
    """A copy of a tensor in the order (n, height, width, channels), float32 or int8."""
    first = memory[layout.offset + layout.lead :]
    shape = layout.images, layout.height, layout.width, layout.planes
    strides = layout.grid.rows * layout.grid.pitch, layout.grid.pitch, 1, layout.plane(layout.format.lanes(isa))
    values = np.ascontiguousarray(np.lib.stride_tricks.as_strided(first, shape, [4 * step for step in strides]))
    if layout.format == WORDS:
        values = (values ^ np.int32(WORDS.zero)).view(np.int8)
    return values[..., : layout.channels]
