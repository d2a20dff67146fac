"""What a SavedModel may hold before TensorFlow reads it. TensorFlow's loader runs what a file tells it to: initializers
of tables, restore functions, and in constants any operation, files read and written among them. Here a SavedModel is
data from anybody: only operations that compute are let in, none of them runs while it is loaded, and nothing grows much
beyond the size of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from math import prod
from pathlib import Path

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import node_def_pb2, tensor_pb2, tensor_shape_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

_COMPUTING = tuple(
    import_module(f"tensorflow.python.ops.gen_{name}")
    for name in (
        "array_ops", "bitwise_ops", "control_flow_ops", "functional_ops", "image_ops", "linalg_ops", "list_ops",
        "manip_ops", "math_ops", "nn_ops", "random_ops", "resource_variable_ops", "special_math_ops",
        "stateful_random_ops", "stateless_random_ops", "stateless_random_ops_v2", "string_ops",
    )
)  # fmt: skip
"""TensorFlow's modules of operations that compute."""
REFUSED = {"ImmutableConst", "Abort", "RemoteCall", "SymbolicGradient"}
"""Those of them that do something else: map a file, end the process, reach another machine."""
STORING = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}
"""Of the functions that store and restore variables; every SavedModel has them, and nobody calls them here."""
_MOST_NODES = 2**20
_BYTES_MORE = 2**28
_TIMES_MORE = 8  # a weight may pass through so many operations


def screen(folder: Path) -> None:
    """Raises a ValueError unless a SavedModel is one that TensorFlow may load."""
    content = (folder / "saved_model.pb").read_bytes()
    try:
        graphs = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    except DecodeError as error:
        reason = "its saved_model.pb is no protocol buffer"
        raise ValueError(f"SavedModel '{folder}' is damaged or incomplete ({reason}); export it again") from error
    if len(graphs) != 1 or not graphs[0].HasField("object_graph_def"):
        raise ValueError(
            f"SavedModel '{folder}' is damaged or incomplete, or not one network of TensorFlow 2; export it again"
        )
    for rule in (_operations(graphs[0]), _objects(graphs[0]), _sizes(graphs[0], folder)):
        if sentence := next(rule, None):
            raise ValueError(f"SavedModel '{folder}' {sentence}")


def most_bytes(folder: Path) -> int:
    """What the constants of a network may take, all together: so many times what its folder takes, and some more."""
    return _TIMES_MORE * _bytes_of(folder) + _BYTES_MORE


def is_let_in(operation: str) -> bool:
    """Whether an operation may be in a SavedModel."""
    if operation in REFUSED or operation.startswith("_"):
        return False
    return operation in STORING or any(hasattr(module, operation) for module in _COMPUTING)


def _operations(graph: meta_graph_pb2.MetaGraphDef) -> Iterator[str]:
    """Operations that don't compute; functions that call themselves, or each other too often to be put in place."""
    for node in _nodes(graph):
        if not is_let_in(node.op):
            yield f"holds '{node.name[:200]}', an operation '{node.op[:200]}', which a network doesn't need; remove it"
    bodies = {body.signature.name: body.node_def for body in graph.graph_def.library.function}
    calls = {name: [callee for node in nodes for callee in _called(node)] for name, nodes in bodies.items()}
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError:
        yield "has functions that call themselves; write them as loops"
        return
    counts: dict[str, int] = {}
    for name in order:
        counts[name] = len(bodies.get(name, ())) + sum(counts[callee] for callee in calls.get(name, ()))
    called = sum(counts.get(callee, 0) for node in graph.graph_def.node for callee in _called(node))
    if (most := max([called, *counts.values()])) > _MOST_NODES:
        yield f"has {most:,} operations when its functions are put in place; {_MOST_NODES:,} are the most"


def _objects(graph: meta_graph_pb2.MetaGraphDef) -> Iterator[str]:
    """Objects that run a function of the file while it is loaded."""
    for node in graph.object_graph_def.nodes:
        if node.WhichOneof("kind") == "resource" or node.saveable_objects or node.registered_saver:
            yield "holds a table or another object that runs code while it is loaded; export the network without it"


def _sizes(graph: meta_graph_pb2.MetaGraphDef, folder: Path) -> Iterator[str]:
    """Constants and variables that are larger than the files; both are written there in full."""
    found = [tensor for node in _nodes(graph) for tensor in _tensors(node)]
    constants = sum(_bytes(tensor.dtype, _dims(tensor.tensor_shape)) for tensor in found)
    if constants > (most := most_bytes(folder)):
        yield f"says that it has {constants:,} bytes of constants, where its size allows {most:,}; export it again"
    stored = folder / "variables"
    told = [(node.variable.dtype, _dims(node.variable.shape)) for node in graph.object_graph_def.nodes]
    try:
        saved = _saved(stored) if stored.is_dir() else []
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        reason = ascii(str(error).partition("\n")[0])[1:200]
        yield f"is damaged or incomplete ({reason}); export it again"
        return
    least = max(sum(_bytes(dtype, dims) for dtype, dims in found) for found in (told, saved))
    if least > _bytes_of(stored) + _BYTES_MORE:
        yield f"says that it has {least:,} bytes of weights, and its files have fewer; export it again"


def _saved(folder: Path) -> list[tuple[int, list[int]]]:
    """Type and shape of everything in the index of stored variables."""
    reader = tf.train.load_checkpoint(str(folder / "variables"))
    types = reader.get_variable_to_dtype_map()
    return [(types[name].as_datatype_enum, dims) for name, dims in reader.get_variable_to_shape_map().items()]


def _nodes(graph: meta_graph_pb2.MetaGraphDef) -> Iterator[node_def_pb2.NodeDef]:
    yield from graph.graph_def.node
    for body in graph.graph_def.library.function:
        yield from body.node_def


def _called(node: node_def_pb2.NodeDef) -> list[str]:
    """Names of functions that a node calls."""
    single = [value.func.name for value in node.attr.values() if value.HasField("func")]
    return single + [one.name for value in node.attr.values() for one in value.list.func]


def _tensors(node: node_def_pb2.NodeDef) -> Iterator[tensor_pb2.TensorProto]:
    for value in node.attr.values():
        if value.HasField("tensor"):
            yield value.tensor
        yield from value.list.tensor


def _dims(shape: tensor_shape_pb2.TensorShapeProto) -> list[int]:
    return [dim.size for dim in shape.dim]


def _bytes(dtype: int, dims: list[int]) -> int:
    """Of a tensor; one of a type without a size, a string, counts as one of eight bytes each."""
    try:
        size = tf.dtypes.as_dtype(dtype).size or 8
    except TypeError:  # of no type: TensorFlow refuses it
        return 0
    return size * prod(max(0, dim) for dim in dims)


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
