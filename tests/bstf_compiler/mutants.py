"""Damages copies of a SavedModel in many ways and loads them; prints how each one ended.

    python -m tests.bstf_compiler.mutants FOLDER FIRST LAST

Bytes of files are cut, flipped and inserted; bstf.json gets values of other kinds; nodes of the TensorFlow graph lose
inputs, change operations, attributes, names and constants.
"""

import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tensorflow.core.protobuf import saved_model_pb2

import bstf_compiler

VALUES = (None, -1, 10**30, 1e308, "x", [], {}, [[]], True, "1" * 50)
ATTRIBUTES = {
    "i": (-1, 0, 7, 2**62),
    "f": (math.nan, math.inf, -1.0, 0.0),
    "s": (b"", b"VALID", b"NCHW", b"\xff"),
    "b": (True, False),
    "type": (1, 2, 3, 7, 9),
}


def damage_bytes(folder, rng):
    """Changes a file as a failing disk or transfer does."""
    file = rng.choice([file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size])
    content = bytearray(file.read_bytes())
    how, place = rng.choice(["cut", "flip", "zero", "insert"]), rng.randrange(len(content))
    if how == "cut":
        del content[place:]
    elif how == "insert":
        content[place:place] = rng.randbytes(rng.randint(1, 20))
    elif how == "zero":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    else:
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def places(value, path=()):
    """Paths of all values in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damage_json(folder, rng):
    """Puts another value in the place of one."""
    file = folder / "assets.extra" / "bstf.json"
    whole = json.loads(file.read_text())
    *above, last = rng.choice(list(places(whole)))
    inner = whole
    for key in above:
        inner = inner[key]
    inner[last] = rng.choice(VALUES)
    file.write_text(json.dumps(whole))


def damage_graph(folder, rng):
    """Changes a node of the graph."""
    file = folder / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    definition = model.meta_graphs[0].graph_def
    functions = definition.library.function
    nodes = [*(node for function in functions for node in function.node_def), *definition.node]
    node, how = rng.choice(nodes), rng.choice(["op", "input", "attribute", "drop", "name", "constant"])
    if how == "op":
        node.op = rng.choice([*(other.op for other in nodes), "Nope", "Exp"])
    elif how == "input" and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([f"{rng.choice(nodes).name}:output:0", "nope"])
    elif how == "attribute" and node.attr:
        value = node.attr[rng.choice(sorted(node.attr))]
        kind = value.WhichOneof("value")
        if kind in ATTRIBUTES:
            setattr(value, kind, rng.choice(ATTRIBUTES[kind]))
        elif kind == "list" and value.list.i:
            value.list.i[rng.randrange(len(value.list.i))] = rng.choice([-1, 0, 3, 2**40])
        elif kind == "shape" and value.shape.dim:
            value.shape.dim[rng.randrange(len(value.shape.dim))].size = rng.choice([-1, 0, 3, 2**40])
    elif how == "drop":
        for function in functions:
            if node in list(function.node_def):
                function.node_def.remove(node)
                break
    elif how == "name":
        node.name = "other"
    else:
        tensor = rng.choice([node for node in nodes if node.op == "Const"]).attr["value"].tensor
        tensor.tensor_content = rng.randbytes(len(tensor.tensor_content))
        if tensor.int_val:
            tensor.int_val[0] = rng.choice([-1, 0, 2**31 - 1])
    file.write_bytes(model.SerializeToString())


def outcome(folder):
    """How loading ends: "loads", "refused" in a sentence, or what went wrong."""
    try:
        bstf_compiler.load(folder)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        return "refused" if text.isprintable() and len(text) < 1000 else f"no sentence: {text!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loads"


def main(model, first, last):
    for seed in range(first, last):
        rng = random.Random(seed)
        damage = (damage_bytes, damage_json, damage_graph)[seed % 3]
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "model"
            shutil.copytree(model, copy)
            damage(copy, rng)
            print(f"{seed} {damage.__name__}", end=" ", flush=True)
            print(outcome(copy), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
