"""Devices: what an array of AIE2 cores has, read from one TOML file a device."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

_FOLDER = Path(__file__).parent / "devices"


@dataclass(frozen=True)
class Core:
    """One core: memory in bytes (of which `reserved_bytes` are not for buffers) and work a cycle."""

    memory_bytes: int
    reserved_bytes: int
    macs_per_cycle: int
    elementwise_per_cycle: int


@dataclass(frozen=True)
class Memory:
    """A memory of `memory_bytes` bytes."""

    memory_bytes: int


@dataclass(frozen=True)
class Links:
    """Bandwidth in bytes/s of each memory tile's link of a kind; the names are those of the instructions."""

    load: int
    loadw: int
    loadfm: int
    loadwm: int
    writefm: int
    write: int


@dataclass(frozen=True)
class DeviceSpec:
    """A mesh of `columns` x `rows` cores at `clock_hz`, memory tiles, and DDR."""

    name: str
    columns: int
    rows: int
    clock_hz: int
    core: Core
    memtile: Memory
    ddr: Memory
    links: Links

    @property
    def memtiles(self) -> int:
        """Number of memory tiles: one a column, and one a row to feed its weights."""
        return max(self.columns, self.rows)

    @classmethod
    def load(cls, device: str | Path | DeviceSpec) -> DeviceSpec:
        """A device by name (`aie2_4x4`), by the path of a TOML file, or as it is.

        Raises:
            ValueError: no such device, or the file lacks an entry or holds one that makes no sense.
        """
        if isinstance(device, DeviceSpec):
            return device
        path = Path(device)
        if path.suffix != ".toml":
            path = _FOLDER / f"{device}.toml"
        if not path.is_file():
            known = available()
            close = difflib.get_close_matches(str(device), known, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise ValueError(
                f"unknown device '{device}'{hint}; known: {', '.join(known)}, or give the path of a .toml file"
            )
        try:
            entries = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"device file '{path}' is not valid TOML: {error}") from error
        return cls.from_dict(entries, f"device file '{path}'")

    @classmethod
    def from_dict(cls, entries: dict, where: str) -> DeviceSpec:
        """A device from its entries as in a device file; `where` they come from is for the sentences of ValueErrors."""
        return _parse(cls, entries, where)


def available() -> list[str]:
    """Names of the devices that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


_SECTIONS = {"core": Core, "memtile": Memory, "ddr": Memory, "links": Links}


def _parse(kind: type, entries: dict, where: str):
    if not isinstance(entries, dict):
        raise ValueError(f"{where} must be a table of entries")
    names = {field.name for field in fields(kind)}
    if missing := sorted(names - entries.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(entries.keys() - names):
        raise ValueError(f"{where} holds unknown entries: {', '.join(unknown)}")
    values = {}
    for name, value in entries.items():
        if name in _SECTIONS:
            value = _parse(_SECTIONS[name], value, f"{where}, section {name},")
        elif name == "name":
            if not isinstance(value, str):
                raise ValueError(f"{where}: name = {value!r} must be a string")
        elif type(value) is not int or value <= 0:
            raise ValueError(f"{where}: {name} = {value!r} must be a positive integer")
        values[name] = value
    return kind(**values)
