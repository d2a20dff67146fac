"""Devices of any size, for tests."""

from __future__ import annotations

from bstf_compiler.aie.device import DeviceSpec

LINKS = ("load", "loadw", "loadfm", "loadwm", "writefm", "write")


def entries(columns=2, rows=2, core=65536, memtile=524288):
    return {
        "name": f"test_{columns}x{rows}",
        "columns": columns,
        "rows": rows,
        "clock_hz": 10**9,
        "core": {"memory_bytes": core, "reserved_bytes": 128, "macs_per_cycle": 256, "elementwise_per_cycle": 64},
        "memtile": {"memory_bytes": memtile},
        "ddr": {"memory_bytes": 2**30},
        "links": dict.fromkeys(LINKS, 2**32),
    }


def small_device(columns, rows, core, memtile):
    return DeviceSpec.from_dict(entries(columns, rows, core, memtile), "test device")
