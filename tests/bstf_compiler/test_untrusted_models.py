"""A SavedModel is read as data: nothing in it runs but what computes constants, and it stays as small as its files."""

import resource

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry

import bstf_compiler
from bstf_compiler.frontend.screening import REFUSED, STORING, is_let_in

SHAPE = (None, 4, 4, 8)
KERNEL = np.ones((1, 1, 8, 8), np.float32)


def save(path, function, module=None):
    module = module or tf.Module()
    module.serve = tf.function(function, input_signature=[tf.TensorSpec(SHAPE, tf.float32, name="image")])
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    return path


def conv(x):
    return {"y": tf.nn.conv2d(x, KERNEL, 1, "SAME")}


def edited(path, change):
    """The SavedModel with its only graph changed."""
    file = path / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    change(model.meta_graphs[0])
    file.write_bytes(model.SerializeToString())
    return path


def nodes(graph):
    return [*graph.graph_def.node, *(node for body in graph.graph_def.library.function for node in body.node_def)]


def of_file(name):
    return tf.reshape(tf.cast(tf.io.decode_raw(tf.io.read_file(name), tf.uint8), tf.float32)[:8], (1, 1, 1, 8))


@pytest.mark.parametrize(
    ("make", "operation"),
    [
        (lambda x, file: {"y": x + of_file(file)}, "ReadFile"),
        (lambda x, file: {"y": x + tf.cast(tf.size(tf.io.matching_files(file)), tf.float32)}, "MatchingFiles"),
        (lambda x, file: {"y": x + tf.py_function(lambda: 1.0, [], tf.float32)}, "EagerPyFunc"),
        (lambda x, file: {"y": x + tf.raw_ops.ImmutableConst(dtype=tf.float32, shape=(2,), memory_region_name=file)[0]},
         "ImmutableConst"),
    ],
)  # fmt: skip
def test_operations_that_do_more_than_compute_are_refused(tmp_path, make, operation):
    secret = tmp_path / "secret"
    secret.write_bytes(b"01234567")
    path = save(tmp_path / "model", lambda x: make(x, str(secret)))
    with pytest.raises(ValueError, match=f"an operation '{operation}', which a network doesn't need"):
        bstf_compiler.load(path)


def test_nothing_is_written_while_a_model_is_loaded(tmp_path):
    target = tmp_path / "written"

    def function(x):
        tf.io.write_file(str(target), "x")
        tf.print("x", output_stream=f"file://{target}")
        return conv(x)

    path = save(tmp_path / "model", function)
    with pytest.raises(ValueError, match=r"an operation '\w+', which a network doesn't need"):
        bstf_compiler.load(path)
    assert not target.exists()


def test_tables_and_restore_functions_of_a_file_do_not_run(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("a\nb\n")
    module = tf.Module()
    words = tf.lookup.TextFileInitializer(str(file), tf.string, 0, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER)
    module.table = tf.lookup.StaticHashTable(words, -1)
    with pytest.raises(ValueError, match="which a network doesn't need"):
        bstf_compiler.load(save(tmp_path / "table", conv, module))

    def give_functions(graph):
        stored = next(one for one in graph.object_graph_def.nodes if one.WhichOneof("kind") == "user_object")
        stored.saveable_objects["SERIALIZE_TO_TENSORS"].restore_function = 1

    with pytest.raises(ValueError, match="runs code while it is loaded"):
        bstf_compiler.load(edited(save(tmp_path / "restores", conv), give_functions))

    def make_resource(graph):
        graph.object_graph_def.nodes.add().resource.device = ""

    with pytest.raises(ValueError, match="runs code while it is loaded"):
        bstf_compiler.load(edited(save(tmp_path / "resource", conv), make_resource))


def test_models_of_tensorflow_1_are_refused(tmp_path):
    path = edited(save(tmp_path / "model", conv), lambda graph: graph.ClearField("object_graph_def"))
    with pytest.raises(ValueError, match="not one network of TensorFlow 2"):
        bstf_compiler.load(path)


def huge_constant(graph):
    tensor = next(node for node in nodes(graph) if node.op == "Const" and node.attr["value"].tensor.tensor_content)
    tensor = tensor.attr["value"].tensor
    tensor.ClearField("tensor_content")
    tensor.float_val[:] = [1.0]
    for dim in tensor.tensor_shape.dim:
        dim.size = 2**10


def huge_variable(graph):
    found = next(one for one in graph.object_graph_def.nodes if one.WhichOneof("kind") == "variable")
    for dim in found.variable.shape.dim:
        dim.size = 2**10


def many_calls(graph):
    library = graph.graph_def.library.function
    for number in range(40):
        body = library.add()
        body.signature.name = f"laugh{number}"
        for call in range(2):
            node = body.node_def.add(name=f"call{call}", op="PartitionedCall")
            node.attr["f"].func.name = f"laugh{number + 1}"


def calls_itself(graph):
    body = graph.graph_def.library.function.add()
    body.signature.name = "echo"
    body.node_def.add(name="call", op="PartitionedCall").attr["f"].func.name = "echo"


def with_variable(x):
    return {"y": tf.nn.conv2d(x, MODULE.kernel, 1, "SAME")}


MODULE = tf.Module()
MODULE.kernel = tf.Variable(KERNEL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (huge_constant, "bytes of constants, where its size allows"),
        (huge_variable, "bytes of weights, and its files have fewer"),
        (many_calls, "operations when its functions are put in place"),
        (calls_itself, "functions that call themselves"),
    ],
)
def test_what_would_grow_is_refused_before_it_does(tmp_path, change, words):
    path = save(tmp_path / "model", with_variable if change is huge_variable else conv, MODULE)
    with pytest.raises(ValueError, match=words):
        bstf_compiler.load(edited(path, change))


def test_constants_are_counted_before_they_are_computed(tmp_path):
    def function(x):
        return {"y": x + tf.reduce_sum(tf.fill([2**15, 2**15], tf.sqrt(2.0)))}

    path = save(tmp_path / "model", function)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"makes constants of .*, far more than the network's file holds"):
        bstf_compiler.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_no_operation_that_names_files_or_machines_is_let_in():
    found = []
    for name in filter(str.isidentifier, dir(tf.raw_ops)):
        definition = op_def_registry.get(name)
        if definition is None or definition.is_stateful or not is_let_in(name):
            continue
        names = {arg.name for arg in definition.input_arg} | {attr.name for attr in definition.attr}
        words = ("file", "path", "url", "address", "descriptor", "region", "directory")
        if any(word in argument for argument in names for word in words):
            found.append(name)
    assert set(found) <= STORING | {"FilePath"}, found
    assert not any(map(is_let_in, (*REFUSED, "ReadFile", "WriteFile", "PyFunc", "DecodeProtoV2", "XlaLaunch")))
