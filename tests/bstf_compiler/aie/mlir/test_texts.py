"""The texts of a design: mlir-aie's two syntaxes, the generic form that is read back, and what other tools get."""

from __future__ import annotations

import re

import pytest
from xdsl.utils.exceptions import ParseError, VerifyException

import bstf_compiler
from bstf_compiler.aie.mlir.design import design
from bstf_compiler.aie.mlir.generic import generic
from bstf_compiler.aie.mlir.model import Call, Task, UseLock
from bstf_compiler.aie.mlir.pretty import pretty
from bstf_compiler.aie.mlir.reader import read
from bstf_compiler.aie.mlir.syntax import MalformedText, parse
from tests.bstf_compiler.aie.mlir import dialects
from tests.bstf_compiler.aie.mlir.networks import small


@pytest.fixture(scope="module")
def made():
    return design(bstf_compiler.compile(small(), "npu1"))


@pytest.fixture(scope="module")
def text():
    """Steps 3 and 4 of a network on one column: with loops, packets and chains of both kinds."""
    made = design(bstf_compiler.compile(small(96), "npu1_1x2"))
    made.configurations = made.configurations[3:5]
    return "\n".join(generic(made, "a design\nof a test")) + "\n"


# --- mlir-aie's syntaxes ---


def descriptors(text: str) -> list[tuple]:
    """What a text says of its descriptors: buffer, offset, length, sizes, strides, number, packet."""
    found = []
    for line in re.findall(r"aie\.dma_bd\(%(.*)", text):
        name, rest = re.match(r"(\w+) : memref<\d+xi32>(.*)", line).groups()
        number = int(re.search(r"bd_id = (\d+) : i32", rest)[1])
        packet = re.search(r"pkt_type = 0, pkt_id = (\d+)", rest)
        if " len = " in rest:
            offset, length = map(int, re.match(r" offset = (\d+) len = (\d+)", rest).groups())
            walk = re.search(r"sizes = \[(.*?)\] strides = \[(.*?)\]", rest)
            sides = [tuple(map(int, side.split(","))) for side in walk.groups()] if walk else [(), ()]
        else:
            offset, length = map(int, re.match(r", (\d+), (\d+)", rest).groups())
            pairs = re.findall(r"<size = (\d+), stride = (\d+)>", rest)
            sides = [tuple(int(pair[side]) for pair in pairs) for side in range(2)]
        found.append((name, offset, length, *sides, number, int(packet[1]) if packet else None))
    return found


def wanted_descriptors(made) -> list[tuple]:
    return [
        (one.buffer or "host", one.offset, one.length, one.sizes, one.strides, one.number, one.packet)
        for configuration in made.configurations
        for _, chain in configuration.chains()
        for one in chain
    ]


@pytest.mark.parametrize("version", ["1.4", "2025"])
def test_both_syntaxes_say_the_design(made, version):
    files = {name: "\n".join(lines) for name, lines in pretty(made, version, "head").items()}
    whole = "\n".join(files.values())
    assert whole.startswith("// For mlir-aie ") and "// head" in whole
    assert descriptors(whole) == wanted_descriptors(made)
    for one in files.values():
        assert one.count("{") == one.count("}") and one.count("(") == one.count(")")
    uses = sum(
        sum(use is not None for _, chain in one.chains() for bd in chain for use in (bd.acquire, bd.release))
        + sum(isinstance(item, UseLock) for core in one.cores for loop in core.loops for item in loop.body)
        for one in made.configurations
    )
    assert len(re.findall(r"aie\.use_lock\(%\w+, (?:AcquireGreaterEqual|Release), %?\w+\)", whole)) == uses
    calls = [
        i for c in made.configurations for k in c.cores for loop in k.loops for i in loop.body if isinstance(i, Call)
    ]
    assert len(re.findall(r"func\.call @bstf_\w+\(", whole)) == len(calls)
    tasks = [item for one in made.configurations for item in one.sequence if isinstance(item, Task)]
    assert len(re.findall(r"aiex\.dma_start_task\(%\w+\)", whole)) == len(tasks)


def test_values_are_defined_before_they_are_used(made):
    """In each of the new syntax's regions; names of blocks too."""
    for version in ("1.4", "2025"):
        for lines in pretty(made, version, "").values():
            text = "\n".join(lines)
            for device in re.split(r"\n  aie\.device", text)[1:]:
                known = set()
                for line in device.splitlines():
                    left, _, right = line.partition(" = ") if re.match(r"\s*%\w+ = ", line) else ("", "", line)
                    known.update(
                        re.findall(r"%(\w+)(?=:| = %)", line) if "scf.for" in line or "sequence" in line else ()
                    )
                    assert set(re.findall(r"%(\w+)", right)) <= known | set(re.findall(r"scf\.for %(\w+)", right)), line
                    known.update(re.findall(r"%(\w+)", left))


def test_the_syntaxes_differ_where_the_tool_did(made):
    new = "\n".join(pretty(made, "1.4", "")["design.mlir"])
    old = {name: "\n".join(lines) for name, lines in pretty(made, "2025", "").items()}
    assert "aie.device(npu1) @step0 {" in new and "aiex.configure @step0 {" in new
    assert "        aiex.run @sequence(%host) : (memref<" in new
    assert old.keys() == {f"{one.name}.mlir" for one in made.configurations}
    assert "aie.device(npu1_4col) {" in old["step0.mlir"] and "aiex.runtime_sequence @sequence" in old["step0.mlir"]
    assert "AcquireGreaterEqual, 1)" in old["step0.mlir"] and "AcquireGreaterEqual, %c1)" in new


def test_no_other_syntax(made):
    with pytest.raises(ValueError, match="there is no mlir-aie syntax '1.3'; known: 1.4, 2025"):
        pretty(made, "1.3", "")


# --- the generic form ---


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda text: text[: text.rindex("aie.end")], "no token of MLIR"),
        (lambda text: text.replace('"aie.tile"', '"aie.title"', 1), "'aie.title' has no place in a device"),
        (lambda text: text.replace("static_len = ", "static_length = ", 1), "lacks 'static_len'"),
        (lambda text: text.replace('sym_name = "main"', 'sym_name = "other"'), "no device 'main'"),
        (lambda text: text.replace("symbol = @step4}", "symbol = @step99}"), "configures 'step99'"),
        (lambda text: text.replace("device = 5", "device = 99"), "no device has the number 99"),
        (lambda text: text.replace("device = 5", "device = 4", 1), "is of another kind than the main one"),
        (lambda text: text.replace("arith.remui", "arith.divui"), "an offset that is no slot of a ring"),
        (lambda text: text.replace('"aie.next_bd"()[^bd0_1]', '"aie.next_bd"()[^bd0_0]'), "a chain that never ends"),
        (lambda text: text.replace("aiex.dma_await_task", "aiex.npu.sync"), "'aiex.npu.sync' has no place"),
        (lambda text: text.replace("(%t_0_2)", "(%t_9_9)", 1), "lacks '%t_9_9'"),
        (lambda text: text + "}", "expected the end"),
        (lambda text: "`" + text, "no token of MLIR"),
    ],
)
def test_damaged_text_is_refused_with_its_line(text, change, sentence):
    assert change(text) != text
    with pytest.raises(MalformedText, match=f"line \\d+: .*{sentence}"):
        read(change(text))


def test_the_parser_takes_what_other_tools_print():
    """Properties, comments, several results, nested regions and attributes of other kinds."""
    found = parse(
        '// a comment\n"a.b"() <{x = -3 : i32, y = [1, 2]}> ({\n ^bb0(%a: i32, %b: memref<4xi32>):\n'
        '  %c:2 = "c.d"(%a)[^bb0] {e, f = array<i64: 1, 2>, g = @h, i = true, j = "k"} : (i32) -> (i32, i32)\n'
        "}) : () -> ()".replace("%c:2", "%c, %d").replace("[1, 2]", "array<i32: 1, 2>")
    )
    inner = found.regions[0][0].operations[0]
    assert found.attributes == {"x": -3, "y": (1, 2)} and found.regions[0][0].arguments == [
        ("%a", "i32"),
        ("%b", "memref<4xi32>"),
    ]
    assert inner.results == ["%c", "%d"] and inner.successors == ["^bb0"] and inner.line == 4
    assert inner.attributes == {"e": True, "f": (1, 2), "g": "@h", "i": True, "j": "k"}


@pytest.mark.parametrize(
    "old, new, error",
    [
        (', sym_name = "weights_0_2"', "", VerifyException),
        ("static_strides", "strides", VerifyException),
        ("action = 2", "action = 0", VerifyException),
        ('"aie.use_lock"(%in_full_0_2)', '"aie.use_lock"(%nothing)', (ParseError, VerifyException)),
        ('"aiex.dma_await_task"(%', '"aiex.dma_await_task"(%t_0_0', (ParseError, VerifyException)),
        ("@step4}", "@step77}", VerifyException),
    ],
)
def test_xdsl_refuses_a_damaged_text(text, old, new, error):
    assert old in text
    with pytest.raises(error):
        dialects.parse(text.replace(old, new, 1))


def test_xdsl_takes_a_sound_text(text):
    module = dialects.parse(text)
    assert [op.sym_name.data for op in module.body.block.ops] == ["step3", "step4", "main"]


# --- upstream's mlir-opt ---


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("", "", None),
        ("direction = 0 : i32, issue_token", "issue_token", 'attribute "direction" is expected but not provided'),
        ("col = 0 : i32, row = 0 : i32", "row = 0 : i32", 'attribute "col" is expected but not provided'),
        ("(%t_0_2) {address", "(%out_full_0_2) {address", "use of value '%out_full_0_2'|does not dominate"),
        ("[^bd0_1]", "[^bd0_9]", "reference to an undefined block"),
        ('"func.call"(%', '"func.call"(%t_0_0, %', "operands present|incorrect number|operand types"),
    ],
)
def test_upstream_takes_the_text_and_refuses_a_damaged_one(mlir_opt, text, old, new, sentence):
    assert old in text
    complaints = mlir_opt(text.replace(old, new, 1))
    assert not complaints if sentence is None else re.search(sentence, complaints), complaints[:500]
