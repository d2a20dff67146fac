"""Reads data classes from JSON that may come from anybody: every value is of its type, and in range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from bstf_compiler.aie.device import MOST

Kind = TypeVar("Kind")
_LONGEST = 1000  # letters of a name


def read(kind: type[Kind], entry: Mapping[str, Any], without: str = "") -> Kind:
    """An object of a data class from the values of its fields, tuples as lists.

    Args:
        kind: the data class; its hints are of numbers, strings, tuples, lists, dictionaries of these, or other such
            data classes.
        entry: all its fields by name.
        without: the field that isn't in it.

    Raises:
        ValueError: a field is missing, is of another type or out of range, or none of the class.

    Example:
        >>> read(Allocation, {"name": "x", "address": 0, "bytes": 64, "first": 0, "last": 1})
    """
    hints = _hints(kind)
    if not isinstance(entry, dict) or entry.keys() != hints.keys() - {without}:
        raise ValueError(f"these are not the entries of a {kind.__name__}")
    return kind(**{name: value(entry[name], hints[name]) for name in entry})


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """What a hint is of, its arguments, and whether it is a data class."""
    return get_origin(hint), get_args(hint), is_dataclass(hint)


def value(found: Any, hint: Any) -> Any:
    """A value of the type of a hint; a ValueError if it can't be."""
    origin, inner, is_class = _parts(hint)
    if is_class:
        return read(hint, found)
    if origin is UnionType:
        return None if found is None and NoneType in inner else value(found, inner[0])
    if origin in (list, tuple) and isinstance(found, list):
        if origin is list or inner[-1] is Ellipsis:
            return origin(value(one, inner[0]) for one in found)
        if len(found) == len(inner):
            return tuple(map(value, found, inner))
    if origin is dict and isinstance(found, dict):
        return {value(name, inner[0]): value(one, inner[1]) for name, one in found.items()}
    if hint is bool and isinstance(found, bool):
        return found
    if hint is int and type(found) is int and abs(found) <= MOST:
        return found
    if hint is float and type(found) in (int, float) and abs(found) <= MOST and math.isfinite(found):
        return float(found)
    if hint is str and isinstance(found, str) and len(found) <= _LONGEST and found.isprintable():
        return found
    raise ValueError(f"{str(found)[:60]!r} isn't what is wanted there")
