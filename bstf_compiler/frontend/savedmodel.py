"""Reads a TensorFlow SavedModel: freezes it, evaluates what is constant, hands every other operation to a handler."""

from __future__ import annotations

import itertools
import re
from contextlib import closing
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from bstf_compiler import sidecar
from bstf_compiler.frontend import handlers, screening, selections
from bstf_compiler.frontend.handlers import grid_position
from bstf_compiler.graph import FakeQuant, Graph, Node, Op, Tensor

# Operations that keep every value of a constant, hence its grid.
_KEEP_GRID = {"Reshape", "Squeeze", "ExpandDims", "Cast", "Identity"}
HANDLERS = handlers.HANDLERS | selections.HANDLERS
# Operations whose output is their first input, as far as a network's values go.
_ALIASES = {"Identity", "StopGradient", "Cast", "PreventGradient", "CheckNumerics"}
# Name scopes that TensorFlow adds around a function's own.
_WRAPPERS = ("StatefulPartitionedCall", "PartitionedCall", "Func")
_NUMBER = re.compile(r"_\d+$")
# Known tensors are computed operation by operation, each once: rewriting the graph would take longer. On the CPU,
# wherever the network was written: a session could take all of an accelerator's memory.
_AS_WRITTEN = tf.compat.v1.ConfigProto(device_count={"GPU": 0}, allow_soft_placement=True)
_AS_WRITTEN.graph_options.optimizer_options.opt_level = tf.compat.v1.OptimizerOptions.L0
_AS_WRITTEN.graph_options.rewrite_options.disable_meta_optimizer = True


def read(path: str | Path) -> Graph:
    """A SavedModel as a graph, one node an operation.

    Args:
        path: the SavedModel folder, with a `serving_default` signature of float NHWC images of fixed size.

    Returns:
        The graph, constants evaluated; node names are the layers' names. Operations are as TensorFlow has them:
        `bstf_compiler.passes.lower` turns them into those that the back ends run.

    Raises:
        FileNotFoundError: there is no SavedModel at `path`.
        ValueError: it is damaged, holds an operation that is not supported, holds NaN weights, or contradicts the
            `bstf.json` that was exported with it.
    """
    path = Path(path)
    if not (path / "saved_model.pb").is_file():
        raise FileNotFoundError(f"'{path}' holds no saved_model.pb; give the folder that bstf.export wrote")
    screening.screen(path)
    reader = _Reader(path.resolve().name, *_frozen(path), screening.most_bytes(path))
    graph = reader.graph()
    sidecar.check(graph, path)
    return graph


def _frozen(path: Path) -> tuple[tf.types.experimental.ConcreteFunction, list[str], list[str]]:
    """The serving function with its variables as constants, the names of its outputs, and those of its variables."""
    try:
        loaded = tf.saved_model.load(str(path))  # kept: its variables die with it
    except (OSError, DecodeError, tf.errors.OpError, ValueError, KeyError, IndexError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        reason = "".join(letter if letter.isprintable() else "?" for letter in reason)
        raise ValueError(f"SavedModel '{path}' is damaged or incomplete ({reason}); export it again") from error
    if "serving_default" not in loaded.signatures:
        found = ", ".join(loaded.signatures) or "none"
        raise ValueError(
            f"SavedModel '{path}' has no signature 'serving_default' (it has: {found}); "
            "export it with bstf.export or keras.Model.export"
        )
    function = loaded.signatures["serving_default"]
    frozen = convert_variables_to_constants_v2(function, lower_control_flow=False)
    return _inlined(frozen), list(function.structured_outputs), [variable.name for variable in function.variables]


def _inlined(function: tf.types.experimental.ConcreteFunction) -> tf.types.experimental.ConcreteFunction:
    """The function without calls: those marked for XLA, as Keras makes of grouped convolutions, survive freezing."""
    definition = function.graph.as_graph_def()
    library = definition.library.function
    nodes = [*definition.node, *(node for body in library for node in body.node_def)]
    if not any("_XlaMustCompile" in node.attr for node in nodes):
        return function
    for item in (*nodes, *library):
        for mark in ("_XlaMustCompile", "_noinline"):
            item.attr.pop(mark, None)
    for node in nodes:  # TensorFlow knows the functions by their names, for good
        for value in node.attr.values():
            if value.HasField("func"):
                value.func.name += "_unmarked"
    for body in library:
        body.signature.name += "_unmarked"
    whole = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(definition, name=""), [])
    ends = ([tensor.name for tensor in tensors] for tensors in (function.inputs, function.outputs))
    return convert_variables_to_constants_v2(whole.prune(*ends), lower_control_flow=False)


class _Scopes:
    """Finds the layer of an operation in the operation's name.

    Keras 3 opens the name scopes of a model and of each layer twice a call, and TensorFlow numbers the second, which
    holds the operations: those of layer `conv2d` are in `conv2d_1`, of `conv2d_1` in `conv2d_1_2`. Other exports keep
    a layer's name.
    """

    def __init__(self, operations: list[str], variables: list[str]) -> None:
        own = [name for name in operations if not name.startswith("Func/")]  # the others pass on arguments of calls
        self._filled = {scope for name in own for scope in itertools.accumulate(_parts(name)[:-1], _join)}
        self._twice = self._are_opened_twice(variables)
        self._models = {scope.split("/")[0] for scope in self._filled if "/" in scope and self._is_second(scope)}

    def layer(self, operation: str) -> str:
        """The layer's name, with those of the models in the model that it is in: `inner/conv2d`."""
        parts = _parts(operation)
        scopes = list(itertools.accumulate(parts[:-1], _join))
        inside = list(itertools.takewhile(self._is_second, scopes)) if self._twice else []
        if not inside:
            return (parts or [operation])[1 if len(parts) > 2 else 0]
        if inside == scopes[:1] and inside[0] in self._models:  # a function that the model itself calls
            return parts[1]
        return "/".join(_NUMBER.sub("", part) for part in parts[min(1, len(inside) - 1) : len(inside)])

    def _are_opened_twice(self, variables: list[str]) -> bool:
        """Whether a layer with variables computes in a numbered scope only; without variables, whether all do."""
        if not variables:
            return all(self._is_second(scope) for scope in self._filled if scope.count("/") < 2)
        owners = {name.split("/")[-2] for name in variables if "/" in name}
        filled = {scope.rpartition("/")[2] for scope in self._filled}
        numbered = {_NUMBER.sub("", scope) for scope in filled if _NUMBER.search(scope)}
        return bool((owners & numbered) - filled)

    def _is_second(self, scope: str) -> bool:
        """Whether a scope is a layer's second; it isn't where the first holds operations, except those of another."""
        first = _NUMBER.sub("", scope)
        return first != scope and (first not in self._filled or self._is_second(first))


def _parts(name: str) -> list[str]:
    """The scopes of an operation and its own name, less what TensorFlow wraps around."""
    return [part for part in name.split("/") if part not in _WRAPPERS]


def _join(scope: str, part: str) -> str:
    return f"{scope}/{part}"


class _Reader:
    """Walks a frozen function once; handlers call its `add`, `constant` and `input` methods."""

    def __init__(
        self,
        name: str,
        function: tf.types.experimental.ConcreteFunction,
        signature: list[str],
        variables: list[str],
        most_bytes: int,
    ) -> None:
        self._function, self._signature, self._most_bytes = function, signature, most_bytes
        self._scopes = _Scopes([op.name for op in function.graph.get_operations()], variables)
        self._graph = Graph(name)
        self._names: dict[str, str] = {}  # TensorFlow tensor name -> ours
        self._constants: set[str] = set()  # TensorFlow tensors that are known
        self._grids: dict[str, int] = {}  # grid of a known tensor

    def graph(self) -> Graph:
        operations = self._function.graph.get_operations()
        # A function of TensorFlow 2 for the known tensors takes ten times as long: it copies all weights several times.
        with closing(tf.compat.v1.Session(graph=self._function.graph, config=_AS_WRITTEN)) as session:
            self._find_constants(operations, session)
            self._evaluate_constants(operations, session)
        for op in operations:
            if op.outputs and op.outputs[0].name not in self._constants:
                self._visit(op)
        for name, tensor in self._outputs():
            if tensor.name not in self._names or tensor.name in self._constants:
                raise ValueError(
                    f"output '{name}' of '{self._graph.name}' is a constant or an integer; end the network at a layer"
                )
            self._graph.outputs.append(self._names[tensor.name])
            self._graph.output_shapes.append(self.shape(tensor)[1:])
        self._graph.inputs = {name: self._graph.inputs[name] for name in sorted(self._graph.inputs, key=_natural)}
        return self._graph

    def _outputs(self) -> list[tuple[str, tf.Tensor]]:
        """The outputs in the order of their names."""
        names = sorted(self._signature)  # the order in which TensorFlow flattens them
        flat = dict(zip(names, self._function.outputs, strict=True))
        return [(name, flat[name]) for name in sorted(names, key=_natural)]

    # --- what handlers use ---

    def input(self, op: tf.Operation, index: int = 0) -> str:
        """Our name of an operation's input."""
        name = op.inputs[index].name
        if name not in self._names:
            what = "a channel on its own" if op.inputs[index].dtype.is_floating else "integers that are computed"
            raise ValueError(
                f"layer '{self.layer(op)}': {op.type} of {what} is not supported by the compiler; end the network "
                "before it"
            )
        return self._names[name]

    def is_constant(self, op: tf.Operation, index: int) -> bool:
        """Whether an operation's input is known."""
        return op.inputs[index].name in self._constants

    def constant(self, op: tf.Operation, index: int) -> np.ndarray:
        """Values of an operation's input, which must be known."""
        if not self.is_constant(op, index):
            raise ValueError(
                f"layer '{self.layer(op)}': operand {index} of {op.type} is computed; it must be a constant"
            )
        return self._graph.tensors[self.input(op, index)].data

    def grid(self, op: tf.Operation, index: int) -> int | None:
        """Position of an operation's input, which must be known; None if it has no grid."""
        return self._graph.tensors[self.input(op, index)].position

    def derived(self, op: tf.Operation, index: int, data: np.ndarray) -> str:
        """Our name of a new constant, made of the values of an operation's known input."""
        return self._graph.add_constant(f"{self.input(op, index)} of {self.layer(op)}", data, self.grid(op, index))

    def made(self, op: tf.Operation, what: str, data: np.ndarray) -> str:
        """Our name of a new constant that an operation implies."""
        return self._graph.add_constant(f"{what} of {self.layer(op)}", data)

    def channels(self, name: str) -> int:
        """How many channels a tensor of ours has."""
        return self._graph.tensors[name].shape[-1]

    def number(self, op: tf.Operation, value: float) -> str:
        """Our name of a new constant that an operation implies."""
        return self.made(op, f"{value:g}", np.array([value], np.float32))

    def shape(self, tensor: tf.Tensor) -> tuple[int, ...]:
        """Static shape with a batch of one."""
        dims = tensor.shape.as_list() if tensor.shape.rank is not None else [None, None]
        if None in dims[1:]:
            raise ValueError(
                f"layer '{self.layer(tensor.op)}': shape {tensor.shape} is not fixed; export the model with a fixed "
                "image size"
            )
        return (1, *dims[1:])

    def layer(self, op: tf.Operation) -> str:
        """Name of the layer that an operation belongs to."""
        return self._scopes.layer(op.name)

    def output(self, op: tf.Operation) -> str:
        """Our name of what an operation has made so far."""
        return self._names[op.outputs[0].name]

    def source(self, op: tf.Operation, index: int) -> tf.Operation:
        """The operation that computes an operation's input, identities aside."""
        before = op.inputs[index].op
        while before.type == "Identity":
            before = before.inputs[0].op
        return before

    def alias(self, op: tf.Operation, source: str | None = None) -> None:
        """Takes an operation's output as another name of its input, or of a tensor of ours."""
        self._names[op.outputs[0].name] = source or self.input(op)

    def add(self, op: tf.Operation, node_op: Op, inputs: list[str]) -> None:
        """Adds the node for a TensorFlow operation, or the next one for it."""
        name = base = self.layer(op)
        if isinstance(node_op, FakeQuant):  # the layer's name is for what computes it
            name = base = f"{base}:grid"
        count = 1
        while name in self._graph.tensors:
            count += 1
            name = f"{base}:{op.type.lower()}{count if count > 2 else ''}"
        self._graph.nodes.append(Node(name, node_op, inputs))
        self._graph.tensors[name] = Tensor(name, self.shape(op.outputs[0]))
        self._names[op.outputs[0].name] = name

    # --- the walk ---

    def _find_constants(self, operations: list[tf.Operation], session: tf.compat.v1.Session) -> None:
        for op in operations:
            if op.type == "Placeholder" or not op.outputs or op.op_def.is_stateful:  # a random number is no constant
                continue
            if all(tensor.name in self._constants for tensor in op.inputs):
                self._count(op)
                self._constants.update(tensor.name for tensor in op.outputs)
                position = grid_position(op, lambda index, op=op: session.run(op.inputs[index]))
                if position is not None:
                    self._grids[op.outputs[0].name] = position
                elif op.type in _KEEP_GRID and op.inputs and op.inputs[0].name in self._grids:
                    self._grids[op.outputs[0].name] = self._grids[op.inputs[0].name]

    def _count(self, op: tf.Operation) -> None:
        """Counts the bytes that a known operation makes, before it makes them."""
        if op.type in _ALIASES and op.type != "Cast":
            return
        for tensor in op.outputs:
            if not tensor.shape.is_fully_defined():
                raise ValueError(
                    f"layer '{self.layer(op)}': nobody knows how large the constant of {op.type} is before it is "
                    "computed; compute it before export"
                )
            self._most_bytes -= tensor.shape.num_elements() * (tensor.dtype.size or 8)
        if self._most_bytes < 0:
            raise ValueError(
                f"layer '{self.layer(op)}': {op.type} makes constants of {op.outputs[0].shape}, far more than the "
                "network's file holds; compute them while the network runs"
            )

    def _evaluate_constants(self, operations: list[tf.Operation], session: tf.compat.v1.Session) -> None:
        """Evaluates, with TensorFlow itself, the known tensors that computed operations read."""
        needed = {
            tensor.name
            for op in operations
            if op.outputs and op.outputs[0].name not in self._constants
            for tensor in op.inputs
            if tensor.name in self._constants
        }
        for name, value in zip(sorted(needed), session.run(sorted(needed))):
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                reader = next(op for op in operations if name in [tensor.name for tensor in op.inputs])
                raise ValueError(f"layer '{self.layer(reader)}' has NaN or infinite weights; repair them before export")
            ours = self._graph.add_constant(name.removesuffix(":0"), value, self._grids.get(name))
            self._names[name] = ours

    def _visit(self, op: tf.Operation) -> None:
        output = op.outputs[0]
        if op.type == "Placeholder":
            if output.shape.rank not in (2, 4):
                raise ValueError(
                    f"input '{op.name}' has shape {output.shape}; an image (n, height, width, channels) or a vector "
                    "(n, channels) is supported"
                )
            self._graph.tensors[op.name] = Tensor(op.name, self.shape(output))
            self._graph.inputs[op.name] = self.shape(output)[1:]
            self._names[output.name] = op.name
        elif output.dtype in (tf.int32, tf.int64):
            return  # shape arithmetic: shapes are static here, nothing reads it
        elif op.type in _ALIASES and (op.type != "Cast" or _keeps_values(op)):
            self.alias(op)
        elif op.type == "IdentityN":  # of a function with a gradient of its own; its constants stay unknown here
            known = zip(op.inputs, op.outputs)
            self._names.update((y.name, self._names[x.name]) for x, y in known if x.name in self._names)
        elif op.type in HANDLERS:
            HANDLERS[op.type](self, op)
        else:
            raise ValueError(
                f"layer '{self.layer(op)}': operation '{op.type}' is not supported by the compiler "
                f"(supported: {', '.join(sorted(HANDLERS))}); replace the layer or end the network before it"
            )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts names with numbers by these: output_2 before output_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _keeps_values(cast: tf.Operation) -> bool:
    """Whether a cast leaves values as they are: from float to float, or of the network's input."""
    source = cast.inputs[0].op
    while source.type == "Identity":
        source = source.inputs[0].op
    return cast.outputs[0].dtype.is_floating and (cast.inputs[0].dtype.is_floating or source.type == "Placeholder")
