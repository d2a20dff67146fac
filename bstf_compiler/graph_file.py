"""A lowered graph in one file, which is read in milliseconds and without TensorFlow.

The file is a NumPy archive (`.npz`): `graph`, a JSON text with nodes and tensors, and an array for each constant. It
may come from anybody: nothing in it is executed, and shapes are checked before a kernel trusts them.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bstf_compiler import integer
from bstf_compiler.files import replacing
from bstf_compiler.graph import (
    FUNCTIONS,
    Add,
    Affine,
    Average,
    AveragePool,
    BiasAdd,
    Concat,
    Conv,
    DepthToSpace,
    Function,
    Graph,
    Lookup,
    MaxPool,
    Multiply,
    Node,
    Op,
    Product,
    Relu,
    Requantize,
    Resize,
    Softmax,
    Tensor,
    Window,
)
from bstf_compiler.passes.sums import check_sums

_VERSION = 2
_MOST_POSITION = 200  # no float32 has more bits behind or before its point
_OPS = {
    op.__name__: op
    for op in (
        Add,
        Affine,
        Average,
        AveragePool,
        BiasAdd,
        Concat,
        Conv,
        DepthToSpace,
        Function,
        Lookup,
        MaxPool,
        Multiply,
        Product,
        Relu,
        Requantize,
        Resize,
        Softmax,
    )
}
_ACTIVATIONS = ("linear", "relu", "relu6")


def write(graph: Graph, path: str | Path) -> None:
    """Writes a lowered graph; a file at `path` is replaced when the new one is complete.

    Raises:
        FileNotFoundError: there is no folder for it.
        ValueError: the graph holds operations that lowering leaves to nobody.
    """
    for node in graph:
        if type(node.op).__name__ not in _OPS:
            raise ValueError(f"layer '{node.name}': a {node.op.kind} can't be written to a file; lower the graph first")
    constants = [tensor for tensor in graph.tensors.values() if tensor.is_constant]
    text = {
        "version": _VERSION,
        "name": graph.name,
        "inputs": list(graph.inputs.items()),
        "outputs": list(zip(graph.outputs, graph.output_shapes)),
        "nodes": [[node.name, type(node.op).__name__, asdict(node.op), node.inputs] for node in graph],
        "tensors": [[one.name, one.shape, one.dtype, one.position] for one in graph.tensors.values()],
        "constants": [one.name for one in constants],
    }
    arrays = {f"constant{place}": one.data for place, one in enumerate(constants)}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, graph=np.frombuffer(json.dumps(text).encode(), np.uint8), **arrays)


def read(path: str | Path) -> Graph:
    """The graph that `write` wrote.

    Raises:
        ValueError: the file is damaged, or is none of these.
    """
    try:
        _check_archive(path)
        with np.load(path, allow_pickle=False) as arrays:
            text = json.loads(arrays["graph"].tobytes())
            constants = {name: arrays[f"constant{place}"] for place, name in enumerate(text["constants"])}
        if text["version"] != _VERSION:
            raise ValueError(f"version {text['version']}, where this reads {_VERSION}")
        graph = _graph(text, constants)
        _check(graph)
    except (
        zipfile.BadZipFile,
        EOFError,
        MemoryError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"'{path}' is damaged or no saved engine ({reason}); save it again") from error
    check_sums(graph)
    return graph


def _check_archive(path: str | Path) -> None:
    """`write` compresses nothing: what would grow when it is read isn't its file."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its arrays are compressed")


def _graph(text: dict[str, Any], constants: dict[str, np.ndarray]) -> Graph:
    tensors = {}
    for name, shape, dtype, position in text["tensors"]:
        if position is not None and (type(position) is not int or abs(position) > _MOST_POSITION):
            raise ValueError(f"tensor '{name}' has position {position!r}")
        tensors[name] = Tensor(name, tuple(map(int, shape)), str(dtype), position, constants.get(name))
    nodes = [Node(str(name), _op(kind, fields), list(inputs)) for name, kind, fields, inputs in text["nodes"]]
    inputs = {str(name): tuple(map(int, shape)) for name, shape in text["inputs"]}
    outputs, output_shapes = zip(*((output, tuple(sizes)) for output, sizes in text["outputs"]))
    return Graph(str(text["name"]), nodes, tensors, inputs, list(outputs), list(output_shapes))


def _op(kind: str, fields: dict[str, Any]) -> Op:
    if "window" in fields:
        sizes = {name: tuple(map(int, value)) for name, value in fields["window"].items()}
        fields = fields | {"window": Window(**sizes)}
    fields = {name: tuple(map(int, value)) if isinstance(value, list) else value for name, value in fields.items()}
    if not 0 <= int(fields.get("shift", 0)) <= _MOST_POSITION:
        raise ValueError(f"a {kind} has shift {fields['shift']!r}")
    return _OPS[kind](**fields)


def _check(graph: Graph) -> None:
    """Raises ValueError or KeyError unless every node's tensors exist before it and have the shapes that it makes."""
    known = set(graph.inputs) | {tensor.name for tensor in graph.tensors.values() if tensor.is_constant}
    fixed = graph.is_fixed_point
    for tensor in graph.tensors.values():
        data = tensor.data
        if tensor.is_constant and (data.shape != tensor.shape or str(data.dtype) != tensor.dtype):
            raise ValueError(f"constant '{tensor.name}' isn't {tensor.dtype} of {tensor.shape}")
        if tensor.is_constant and not np.isfinite(data).all():
            raise ValueError(f"constant '{tensor.name}' holds NaN or infinite values")
        if not tensor.is_constant and (tensor.shape[0] != 1 or min(tensor.shape) < 1):
            raise ValueError(f"tensor '{tensor.name}' has shape {tensor.shape}")
    for node in graph:
        if node.output in known or not known.issuperset(node.inputs):
            raise ValueError(f"layer '{node.name}' is out of order")
        known.add(node.output)
        if fixed and not isinstance(node.op, Softmax) and graph.tensors[node.output].position is None:
            raise ValueError(f"tensor '{node.output}' has no grid")
        if getattr(node.op, "activation", "linear") not in _ACTIVATIONS:
            raise ValueError(f"layer '{node.name}' has activation '{node.op.activation}'")
        if isinstance(node.op, Softmax) and graph.consumers(node.output):
            raise ValueError(f"layer '{node.name}' isn't the last one")
        if _shape(graph, node) != graph.tensors[node.output].shape:
            raise ValueError(f"layer '{node.name}' doesn't make {graph.tensors[node.output].shape}")
        if not fixed and graph.tensors[node.output].position is not None:
            raise ValueError(f"tensor '{node.output}' of a float network has a grid")
    if any(name not in known or graph.tensors[name].is_constant for name in graph.outputs):
        raise ValueError("an output is missing")


def _shape(graph: Graph, node: Node) -> tuple[int, ...]:
    """The shape of what a node makes of its inputs; empty if they don't fit it."""
    op, (first, *others) = node.op, (graph.tensors[name] for name in node.inputs)
    shape = first.shape
    if first.is_constant:
        raise ValueError(f"layer '{node.name}' reads a constant")
    if isinstance(op, Concat):
        if any(other.is_constant or other.shape[:-1] != shape[:-1] for other in others):
            raise ValueError(f"layer '{node.name}' joins images of several sizes")
        return *shape[:-1], sum(one.shape[-1] for one in (first, *others))
    if isinstance(op, (Add, Product)):
        (other,) = others
        return shape if other.shape in (shape, (1, 1, 1, shape[-1])) and not other.is_constant else ()
    if isinstance(op, Lookup):
        (table,) = others
        return shape if table.is_constant and table.shape == (256,) and table.data.dtype == np.int8 else ()
    if isinstance(op, Affine):
        ok = node.inputs[0] in graph.inputs and all(
            one.is_constant and one.shape in ((1,), shape[-1:], shape[1:]) and one.data.dtype == np.float32
            for one in others
        )
        return shape if ok and len(others) == 2 else ()
    if isinstance(op, Function):
        return shape if op.name in FUNCTIONS and first.position is None else ()
    if isinstance(op, Resize):
        return _resized(op, node.name, shape)
    if isinstance(op, DepthToSpace):
        (rows, columns), (top, bottom, left, right) = op.block, op.crop
        if min(op.block) < 1 or min(op.crop) < 0 or shape[3] % (rows * columns):
            raise ValueError(f"layer '{node.name}' has blocks {op.block} and crop {op.crop}")
        size = shape[1] * rows - top - bottom, shape[2] * columns - left - right
        return 1, *size, shape[3] // (rows * columns)
    if isinstance(op, (BiasAdd, Multiply)):
        (constant,) = others
        return shape if constant.is_constant and constant.data.dtype == np.float32 else ()
    window = getattr(op, "window", None)
    if window is None:
        return shape
    if min(*window.kernel, *window.strides, *window.dilation) < 1 or min(window.padding) < 0:
        raise ValueError(f"layer '{node.name}' has window {window}")
    size = window.output_size(*shape[1:3])
    if isinstance(op, AveragePool):
        (factors,) = others
        return (1, *size, shape[3]) if factors.is_constant and factors.shape == size else ()
    if not isinstance(op, Conv):
        return 1, *size, shape[3]
    kernel, *bias = others
    dtype = np.float32 if first.position is None else np.int8
    fits = (
        kernel.is_constant
        and kernel.data.dtype == dtype
        and kernel.shape[:2] == window.kernel
        and op.groups >= 1
        and kernel.shape[2] * op.groups == shape[3]
        and kernel.shape[3] % op.groups == 0
        and len(bias) <= 1
        and all(one.is_constant and one.shape == kernel.shape[3:] for one in bias)
        and (first.position is None or (len(bias) == 1 and None not in (kernel.position, bias[0].position)))
        and (first.position is None or integer.shift_bias(graph, node) >= 0)
    )
    return (1, *size, kernel.shape[3]) if fits else ()


def _resized(op: Resize, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    interpolates = op.method == "bilinear" and all(factor & (factor - 1) == 0 for factor in op.factors)
    if min(op.factors) < 1 or not (op.method == "nearest" or interpolates):
        raise ValueError(f"layer '{name}' resizes by {op.factors}, '{op.method}'")
    return 1, shape[1] * op.factors[0], shape[2] * op.factors[1], shape[3]
