"""Devices: what an array of AIE2 cores has, read from one TOML file a family.

A name says which: `npu1` is the whole part, `npu1_2x4` its region of 2 columns and 4 rows, `aie2_4x4_waaw` a mesh whose
memory tiles are dedicated, tile by tile, to weights or activations.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_type_hints

from bstf_compiler.suggestion import suggestion

MOST = 2**50
"""The largest number in a device or a program: any sum of a few products of such a number with a small one is exact."""
_MOST_TILES = 2**12
_MOST_MEMORY = 2**28
_MOST_TEXT = 2**16
_LONGEST = 100  # letters of a name, or of a value in a sentence
_FOLDER = Path(__file__).parent / "devices"
_MESHES = [*(f"aie2_{n}x{n}" for n in range(1, 9)), "aie2_1x8", "aie2_2x4", "aie2_4x2", "aie2_4x8", "aie2_8x2"]


@dataclass(frozen=True)
class Core:
    """One core: memory in bytes (of which `reserved_bytes` are not for buffers) and work a cycle."""

    memory_bytes: int
    reserved_bytes: int
    macs_per_cycle: int
    elementwise_per_cycle: int


@dataclass(frozen=True)
class MemTile:
    """A memory tile's bytes; `rows` of them in a column (None: as many tiles as the longer side of the mesh); `roles`:
    a letter a tile, `a` for activations, `w` for weights ("": all hold both).
    """

    memory_bytes: int
    rows: int | None = None
    roles: str = ""


@dataclass(frozen=True)
class Memory:
    """DDR: bytes, and bytes/s that all links together can read or write (None: the links are the only limit)."""

    memory_bytes: int
    read_rate: int | None = None
    write_rate: int | None = None


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
class DescriptorLimits:
    """One tile's DMA: `channels` in each direction, and its buffer descriptors: how many, in `parities` groups by
    channel number, and their fields. `locks`: how many the tile has.

    `wraps`: the longest of each dimension but the outermost, innermost first; lengths and steps in 4-byte words.
    """

    channels: int
    locks: int
    count: int
    parities: int
    dimensions: int
    length_words: int
    wraps: tuple[int, ...]
    step_words: int
    iterations: int


@dataclass(frozen=True)
class Descriptors:
    """Descriptor limits by kind of tile."""

    core: DescriptorLimits
    memtile: DescriptorLimits
    shim: DescriptorLimits


@dataclass(frozen=True)
class DeviceSpec:
    """A mesh of `columns` x `rows` cores at `clock_hz`, memory tiles, and DDR.

    `noc_columns`: the columns with a DMA to DDR (empty: all); `descriptors`: None if nothing limits them.
    """

    name: str
    columns: int
    rows: int
    clock_hz: int
    core: Core
    memtile: MemTile
    ddr: Memory
    links: Links
    noc_columns: tuple[int, ...] = ()
    descriptors: Descriptors | None = None

    @property
    def memtiles(self) -> int:
        """Number of memory tiles."""
        if self.memtile.roles:
            return len(self.memtile.roles)
        return self.columns * self.memtile.rows if self.memtile.rows else max(self.columns, self.rows)

    @cached_property
    def activation_tiles(self) -> tuple[int, ...]:
        """The memory tiles that hold activations, at most one a column."""
        tiles = [i for i in range(self.memtiles) if not self.memtile.roles or self.memtile.roles[i] == "a"]
        return tuple(tiles[: self.columns])

    @cached_property
    def weight_tiles(self) -> tuple[int, ...]:
        """The memory tiles that hold weights, at most one a row."""
        tiles = [i for i in range(self.memtiles) if not self.memtile.roles or self.memtile.roles[i] == "w"]
        return tuple(tiles[: self.rows])

    def activation_tile(self, column: int) -> int:
        """Place in `activation_tiles` of the one that a column of cores writes; neighbours share."""
        return column * len(self.activation_tiles) // self.columns

    def weight_tile(self, row: int) -> tuple[int, int]:
        """The memory tile that feeds a row of cores with weights, and how many rows before it that tile feeds."""
        slot, place = divmod(row, len(self.weight_tiles))
        return self.weight_tiles[place], slot

    @property
    def columns_of_activation_tile(self) -> int:
        """The most columns of cores that share one memory tile of activations and its link."""
        return -(-self.columns // len(self.activation_tiles))

    @property
    def rows_of_weight_tile(self) -> int:
        """The most rows of cores that one memory tile feeds with weights."""
        return -(-self.rows // len(self.weight_tiles))

    def rate(self, kind: str) -> float:
        """Bytes/s left to one unit of a transfer's kind while all units of that kind work.

        Units that share a memory tile share its link. All units of LOAD share the LOAD channels of the columns with a
        NoC DMA, and the DDR's rate; so do those of LOADW and WRITE. LOAD and LOADW at the same time may pass the DDR's
        rate, which no time here counts.

        Args:
            kind: LOAD, LOADW, LOADFM, LOADWM, WRITEFM or WRITE.
        """
        return self._rates[kind]

    @cached_property
    def _rates(self) -> dict[str, float]:
        return {name.upper(): self._rate(name.upper(), link) for name, link in vars(self.links).items()}

    def _rate(self, kind: str, link: int) -> float:
        units = self.units(kind)
        tiles = len(self.weight_tiles if kind in ("LOADW", "LOADWM") else self.activation_tiles)
        rate = link / -(-units // tiles)
        if kind in ("LOAD", "LOADW", "WRITE"):
            channels = len(self.noc_columns) or tiles
            cap = self.ddr.write_rate if kind == "WRITE" else self.ddr.read_rate
            rate = min(rate, link * channels / units, (cap or math.inf) / units)
        return rate

    @property
    def ddr_rate(self) -> float:
        """Bytes/s that links to and from DDR carry at most, all together: what is read and what is written."""
        read, weights, written = (self.rate(kind) * self.units(kind) for kind in ("LOAD", "LOADW", "WRITE"))
        return min(read + weights, self.ddr.read_rate or math.inf) + written

    def units(self, kind: str) -> int:
        """How many units run a transfer's kind."""
        if kind in ("LOADW", "LOADWM"):
            return self.rows
        return self.columns if kind in ("LOADFM", "WRITEFM") else len(self.activation_tiles)

    @classmethod
    def load(cls, device: str | Path | DeviceSpec) -> DeviceSpec:
        """A device by name (`aie2_4x4`, `npu1`, `ve2802_4x4`), by the path of a TOML file, or as it is.

        Raises:
            ValueError: no such device, or the file lacks an entry or holds one that makes no sense.
        """
        if isinstance(device, DeviceSpec):
            return device
        path = Path(device)
        if path.suffix == ".toml":
            if not path.is_file():
                raise ValueError(f"there is no device file '{device}'; give the path of one, or a name like aie2_4x4")
            return cls._read(path)
        found = re.fullmatch(r"(\w+?)(?:_(\d+)x(\d+)(?:_([aw]+))?)?", str(device))
        path = _FOLDER / f"{found[1] if found else device}.toml"
        if not path.is_file():
            raise _unknown(device)
        whole = cls._read(path)
        if found[2] is None:
            return whole
        return whole.region(int(found[2]), int(found[3]), found[4] or "")

    @classmethod
    def _read(cls, path: Path) -> DeviceSpec:
        with path.open("rb") as file:
            content = file.read(_MOST_TEXT + 1)
        return cls.parse(content, f"device file '{path}'")

    @classmethod
    def parse(cls, content: bytes, where: str) -> DeviceSpec:
        """A device from the TOML of a device file; `where` it comes from is for the sentences of ValueErrors."""
        if len(content) > _MOST_TEXT:
            raise ValueError(f"{where} holds more than {_MOST_TEXT:,} bytes; a device needs a hundredth of them")
        try:
            entries = tomllib.loads(content.decode("utf-8"))
        except RecursionError:
            raise ValueError(
                f"{where} is not valid TOML: it holds lists in lists in lists; no device needs them"
            ) from None
        except ValueError as error:
            raise ValueError(f"{where} is not valid TOML: {error}") from error
        return cls.from_dict(entries, where)

    @classmethod
    def from_dict(cls, entries: dict, where: str) -> DeviceSpec:
        """A device from its entries as in a device file; `where` they come from is for the sentences of ValueErrors."""
        made = _parse(cls, entries, where)
        made._check(where)
        return made

    def region(self, columns: int, rows: int, roles: str = "") -> DeviceSpec:
        """Neighbouring columns, with the most NoC DMAs that so many can have, and the lowest rows.

        Raises:
            ValueError: the device is smaller, or `roles` don't fit.
        """
        name = f"{self.name}_{columns}x{rows}" + (f"_{roles}" if roles else "")
        if not (1 <= columns <= self.columns and 1 <= rows <= self.rows):
            raise ValueError(
                f"device '{name}' has {columns} x {rows} cores, of which {self.name} has {self.columns} x {self.rows}; "
                "ask for at least one and at most that many columns x rows"
            )
        starts = range(self.columns - columns + 1)
        inside = [tuple(c - start for c in self.noc_columns if start <= c < start + columns) for start in starts]
        entries = asdict(self) | {"name": name, "columns": columns, "rows": rows, "noc_columns": max(inside, key=len)}
        if self.noc_columns and not entries["noc_columns"]:
            raise ValueError(f"device '{name}' has no column with a NoC DMA; ask for more columns")
        entries["memtile"]["roles"] = roles
        return DeviceSpec.from_dict(entries, f"device '{name}'")

    def _check(self, where: str) -> None:
        roles = self.memtile.roles
        cores, memtiles = self.columns * self.rows, self.memtiles
        if max(cores, memtiles) > _MOST_TILES:
            raise ValueError(f"{where}: {cores:,} cores and {memtiles:,} memory tiles; {_MOST_TILES:,} of each at most")
        if (total := cores * self.core.memory_bytes + memtiles * self.memtile.memory_bytes) > _MOST_MEMORY:
            raise ValueError(f"{where}: the array has {total:,} bytes of memory; {_MOST_MEMORY:,} at most")
        if roles and (set(roles) != {"a", "w"} or len(roles) > 2 * max(self.columns, self.rows)):
            raise ValueError(
                f"{where}: memtile roles = '{roles}' must have a letter for each memory tile, at least one 'a' "
                "(activations) and one 'w' (weights), and no more than twice the longer side of the mesh"
            )
        if self.core.reserved_bytes >= self.core.memory_bytes:
            raise ValueError(
                f"{where}: core reserved_bytes = {self.core.reserved_bytes} must leave some of its "
                f"memory_bytes = {self.core.memory_bytes}"
            )
        if bad := [c for c in self.noc_columns if c >= self.columns]:
            raise ValueError(f"{where}: noc_columns holds {bad[0]}, but columns are 0 to {self.columns - 1}")
        if len(set(self.noc_columns)) != len(self.noc_columns):
            raise ValueError(f"{where}: noc_columns names a column twice")
        for kind, limits in vars(self.descriptors).items() if self.descriptors else ():
            if len(limits.wraps) != limits.dimensions - 1:
                raise ValueError(
                    f"{where}: descriptors.{kind} has {len(limits.wraps)} wraps; {limits.dimensions} dimensions have "
                    f"{limits.dimensions - 1}, for the outermost one ends with the length"
                )
            least = 2 * limits.parities * -(-limits.channels // limits.parities)
            if limits.count < least:
                raise ValueError(
                    f"{where}: descriptors.{kind} has count = {limits.count}; {limits.channels} channels in each "
                    f"direction need {least} or more, one each"
                )


def available() -> list[str]:
    """Names of the devices that come with the package; regions of them (`npu1_2x4`) can be had by name too."""
    return sorted([*_MESHES, *(path.stem for path in _FOLDER.glob("*.toml") if path.stem != "aie2")])


def _unknown(device: str | Path) -> ValueError:
    known = available()
    return ValueError(
        f"unknown device '{device}'{suggestion(str(device), known)}; known: {', '.join(known)}, regions of them like "
        "npu1_2x4, or give the path of a .toml file"
    )


_SECTIONS = {
    "core": Core, "memtile": MemTile, "ddr": Memory, "links": Links, "descriptors": Descriptors,
}  # fmt: skip


_hints = cache(get_type_hints)


def _parse(kind: type, entries: dict, where: str):
    if not isinstance(entries, dict):
        raise ValueError(f"{where} must be a table of entries")
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if missing := sorted(needed - entries.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(entries.keys() - {field.name for field in fields(kind)}):
        raise ValueError(f"{where} holds unknown entries: {_shown(', '.join(unknown))[1:-1]}")
    hints = _hints(kind)
    values = {}
    for name, value in entries.items():
        if value is None and name not in needed:
            continue
        section = DescriptorLimits if kind is Descriptors else _SECTIONS.get(name)
        if section:
            value = _parse(section, value, f"{where}, section {name},")
        elif hints[name] is str:
            if not isinstance(value, str) or not value.isprintable() or len(value) > _LONGEST:
                raise ValueError(f"{where}: {name} = {_shown(value)} must be a string of at most {_LONGEST} letters")
        elif hints[name] == tuple[int, ...]:
            least = 0 if name == "noc_columns" else 1
            if not isinstance(value, (list, tuple)) or any(type(v) is not int or not least <= v <= MOST for v in value):
                raise ValueError(f"{where}: {name} = {_shown(value)} must be a list of integers from {least} on")
            value = tuple(value)
        elif type(value) is not int or not 0 < value <= MOST:
            raise ValueError(f"{where}: {name} = {_shown(value)} must be a positive integer of at most {MOST:,}")
        values[name] = value
    return kind(**values)


def _shown(value: Any) -> str:
    """A value as it is written, or how it begins."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a list in a list in ...
        return "something huge"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
