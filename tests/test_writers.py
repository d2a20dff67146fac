"""Everything that the packages and the benchmarks write is whole or not there: they write by `replacing` alone."""

import ast
from pathlib import Path

import pytest

import benchmarks
import bstf
import bstf_compiler
from bstf import files
from bstf_compiler import files as compiler_files

# Where a function is given a temporary folder, or adds lines to a file of which the last may be cut short.
EXCEPT = {
    ("bstf_compiler/main.py", "_progress"),  # a copy of standard error
    ("benchmarks/demo.py", "_write"),
    ("benchmarks/network.py", "prepare"),
    ("benchmarks/records.py", "add"),
}
WRITERS = {"write_text", "write_bytes", "savez", "savez_compressed", "savefig", "save_weights", "save_img"}
OPENERS = {"replacing", "whole_file", "TemporaryDirectory", "TemporaryFile"}


def writes(call):
    """Whether a call writes to a path that it names."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name != "open":
        return name in WRITERS
    modes = [
        value.value for value in (*call.args, *(one.value for one in call.keywords)) if isinstance(value, ast.Constant)
    ]
    return any(isinstance(mode, str) and set(mode) <= set("wxab+t") and set(mode) & set("wxa") for mode in modes)


def unguarded(node, function="", guarded=False):
    """(function, line) of writes that no `with replacing(...)` is around."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        function, guarded = node.name, False
    if isinstance(node, ast.With):
        calls = [one for item in node.items for one in ast.walk(item) if isinstance(one, ast.Call)]
        names = {one.func.attr if isinstance(one.func, ast.Attribute) else getattr(one.func, "id", "") for one in calls}
        guarded = guarded or bool(names & OPENERS)
    if isinstance(node, ast.Call) and not guarded and writes(node):
        yield function, node.lineno
    for child in ast.iter_child_nodes(node):
        yield from unguarded(child, function, guarded)


def found(package):
    root = Path(package.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root.parent).as_posix()
        for function, line in unguarded(ast.parse(path.read_text(encoding="utf-8"))):
            yield name, function, line


@pytest.mark.parametrize("package", [bstf, bstf_compiler, benchmarks])
def test_nothing_is_written_to_its_place_at_once(package):
    bare = [one for one in found(package) if one[:2] not in EXCEPT]
    assert not bare, bare


def test_the_check_finds_what_it_looks_for():
    code = "def f(p):\n open(p, 'w')\n with replacing(p) as t, t.open('wb') as g:\n  g.write(b'')\n p.write_text('')"
    assert list(unguarded(ast.parse(code))) == [("f", 2), ("f", 5)]
    places = {one[:2] for package in (bstf, bstf_compiler, benchmarks) for one in found(package)}
    assert places == EXCEPT


def test_both_packages_have_the_same_writer():
    assert Path(files.__file__).read_bytes() == Path(compiler_files.__file__).read_bytes()
