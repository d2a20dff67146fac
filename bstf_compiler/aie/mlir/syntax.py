"""MLIR's generic form as a tree of operations: a parser for what generic.py writes and other tools print of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""\s*(?://[^\n]*\n\s*)*(?:
    (?P<string>"(?:[^"\\]|\\.)*")
  | (?P<value>%[\w$.-]+(?:\#\d+)?)
  | (?P<block>\^[\w$.-]+)
  | (?P<symbol>@[\w$.-]+)
  | (?P<attribute>\#[\w$.]+)
  | (?P<type>![\w$.]+(?:<[^>]*>)?|memref<[^>]*>)
  | (?P<arrow>->)
  | (?P<number>-?\d+)
  | (?P<word>[A-Za-z_][\w$.]*)
  | (?P<mark>[(){}\[\]<>,:=])
  )""",
    re.VERBOSE,
)


@dataclass
class Block:
    """A block: label, arguments (value, type) and operations."""

    label: str
    arguments: list[tuple[str, str]] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Operation:
    """An operation: name, values that it makes, values and blocks that it uses, attributes, regions of blocks, types of
    its operands and results.
    """

    name: str
    results: list[str]
    operands: list[str]
    successors: list[str]
    attributes: dict[str, object]
    regions: list[list[Block]]
    types: tuple[list[str], list[str]]
    line: int


class MalformedText(ValueError):
    """Text that isn't MLIR's generic form."""


def parse(text: str) -> Operation:
    """The one operation of a text.

    Raises:
        MalformedText: it is not in generic form; the sentence names the line.

    Example:
        >>> parse('"builtin.module"() ({ }) : () -> ()').name
        'builtin.module'
    """
    parser = _Parser(text)
    found = parser.operation()
    parser.end()
    return found


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._kinds: list[str] = []
        self._tokens: list[str] = []
        self._starts: list[int] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                raise MalformedText(f"line {text.count(chr(10), 0, at) + 1}: no token of MLIR: {text[at : at + 20]!r}")
            self._kinds.append(match.lastgroup)
            self._tokens.append(match[match.lastgroup])
            self._starts.append(match.start(match.lastgroup))
            at = match.end()
        self._at = 0
        self._kinds.append("end")
        self._tokens.append("")
        self._starts.append(end)
        self._line, self._counted = 1, 0

    def operation(self) -> Operation:
        results = []
        while self._kinds[self._at] == "value":
            results.append(self._next())
            if not self._skip(","):
                break
        if results:
            self._expect("=")
        line = self._line_of(self._starts[self._at])
        name = self._take("string")[1:-1]
        self._expect("(")
        operands = self._list("value", ")")
        successors = self._list("block", "]") if self._skip("[") else []
        attributes = {}
        if self._skip("<"):
            attributes |= self._dictionary()
            self._expect(">")
        regions = []
        if self._skip("("):
            while True:
                regions.append(self._region())
                if not self._skip(","):
                    break
            self._expect(")")
        if self._tokens[self._at] == "{":
            attributes |= self._dictionary()
        self._expect(":")
        types = self._signature()
        return Operation(name, results, operands, successors, attributes, regions, types, line)

    def end(self) -> None:
        if self._kinds[self._at] != "end":
            self._fail("the end")

    def _region(self) -> list[Block]:
        self._expect("{")
        blocks = [Block("")]
        while not self._skip("}"):
            if self._kinds[self._at] == "block":
                blocks.append(self._label())
            else:
                blocks[-1].operations.append(self.operation())
        return blocks[1:] if not blocks[0].operations and len(blocks) > 1 else blocks

    def _label(self) -> Block:
        block = Block(self._next())
        if self._skip("("):
            while not self._skip(")"):
                name = self._take("value")
                self._expect(":")
                block.arguments.append((name, self._type()))
                self._skip(",")
        self._expect(":")
        return block

    def _list(self, kind: str, close: str) -> list[str]:
        found = []
        while not self._skip(close):
            found.append(self._take(kind))
            self._skip(",")
        return found

    def _dictionary(self) -> dict[str, object]:
        self._expect("{")
        found = {}
        while not self._skip("}"):
            name = self._next()
            found[name] = self._attribute() if self._skip("=") else True
            self._skip(",")
        return found

    def _attribute(self) -> object:
        kind, token = self._kinds[self._at], self._next()
        if kind == "number":
            if self._skip(":"):
                self._type()
            return int(token)
        if kind == "string":
            return token[1:-1]
        if kind == "symbol":
            return token
        if token in ("true", "false"):
            return token == "true"
        if kind == "attribute" or token == "array":
            self._expect("<")
            if token == "array":
                self._type()
                self._skip(":")
            found = []
            while not self._skip(">"):
                found.append(self._attribute())
                self._skip(",")
            return tuple(found)
        if token == "(":
            self._at -= 1
            return self._signature()
        return self._fail("an attribute")

    def _signature(self) -> tuple[list[str], list[str]]:
        """`(types) -> types`."""
        sides = []
        for side in range(2):
            if side:
                self._take("arrow")
            if not self._skip("("):
                sides.append([self._type()])
                continue
            found = []
            while not self._skip(")"):
                found.append(self._type())
                self._skip(",")
            sides.append(found)
        return sides[0], sides[1]

    def _type(self) -> str:
        if self._kinds[self._at] not in ("word", "type"):
            self._fail("a type")
        return self._next()

    def _next(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]

    def _skip(self, token: str) -> bool:
        if self._tokens[self._at] == token and self._kinds[self._at] != "string":
            self._at += 1
            return True
        return False

    def _expect(self, token: str) -> None:
        if not self._skip(token):
            self._fail(f"'{token}'")

    def _take(self, kind: str) -> str:
        if self._kinds[self._at] != kind:
            self._fail(f"a {kind}")
        return self._next()

    def _line_of(self, at: int) -> int:
        """Line of a place; places come in order."""
        self._line += self._text.count("\n", self._counted, at)
        self._counted = at
        return self._line

    def _fail(self, wanted: str) -> None:
        place = self._starts[self._at]
        line = self._text.count("\n", 0, place) + 1
        raise MalformedText(f"line {line}: expected {wanted}, found {self._tokens[self._at] or 'the end'!r}")
