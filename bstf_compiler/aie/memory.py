"""Where tensors live: addresses in the memory tiles while they fit, in DDR if not.

A tensor is cut evenly by width, a piece a memory tile, at one address in all of them (layout.py). What doesn't fit is
spilled: it lives in DDR, and the layers that write or read it pass through staging buffers, in bands of rows: while one
is computed, the next is loaded and the one before written. Parts of a joined tensor (joining.py) lie in it, and live
and spill with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bstf_compiler.aie import layout
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.layer import DoesNotFit, Layer
from bstf_compiler.aie.layout import Layout
from bstf_compiler.aie.reach import BLOCK

_ALIGN = 64
CHUNKS, STAGING = "weight chunks", "staging "
"""Names of allocations that hold nothing, or little, from step to step; the second stands before a tensor's name."""
_MOST_BANDS = 4
"""Times as many bands as must be are tried: smaller ones wait less for the first load and the last write."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lives: `memory` ("memtile" or "ddr"), its address there, shape (rows, columns, blocks), bytes from
    pixel to pixel, and its first block in these, which counts in the address.
    """

    memory: str
    address: int
    shape: tuple[int, int, int]
    pixel: int
    first: int = 0

    @property
    def length(self) -> int:
        """Bytes of a pixel."""
        return self.shape[2] * BLOCK


@dataclass(frozen=True)
class Allocation:
    """Bytes [address, address + bytes) of every memory tile, held from stage `first` to stage `last`."""

    name: str
    address: int
    bytes: int
    first: int
    last: int


@dataclass
class Stage:
    """A layer with its memory: output rows of each band, address of the weight chunks in every memory tile, addresses
    of staging buffers by tensor: two each if there are several bands, used in turn; `ahead`: whether there is room for
    the chunks while the layer before is computed.
    """

    layer: Layer
    bands: list[tuple[int, int]]
    chunks: int
    staging: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ahead: bool = False

    def staging_of(self, tensor: str, band: int) -> int:
        """Address of the buffer that holds a band of a tensor."""
        buffers = self.staging[tensor]
        return buffers[band % len(buffers)]


@dataclass
class Placement:
    """Places of all tensors, the stages in order, and what each stage holds of the memory tiles."""

    places: dict[str, Place]
    stages: list[Stage]
    allocations: list[Allocation]
    ddr_bytes: int


class _NoRoom(Exception):
    def __init__(self, live: dict[str, int], read: set[str], layer: Layer, wanted: int) -> None:
        self.live, self.read, self.layer, self.wanted = live, read, layer, wanted


def layout_of(place: Place, device: DeviceSpec) -> Layout:
    """Where the pixels of a tensor lie that lives in the memory tiles."""
    own = layout.parts(place.shape[1], place.pixel // BLOCK, device)
    return Layout(place.address - place.first * BLOCK, 0, place.pixel, place.first, own)


def piece_bytes(shape: tuple[int, int, int], rows: int, device: DeviceSpec) -> int:
    """Bytes of the largest piece of `rows` rows of a tensor cut over a device's memory tiles."""
    return -(-rows * layout.row_bytes(*shape[1:], device) // _ALIGN) * _ALIGN


def place(
    layers: list[Layer],
    network_inputs: list[str],
    outputs: list[str],
    device: DeviceSpec,
    cost: Callable[[Layer, int], tuple[int, float]],
) -> Placement:
    """Gives every tensor a place.

    Args:
        layers: in execution order.
        network_inputs: tensors that arrive in DDR.
        outputs: tensors that must end in DDR.
        device: the array.
        cost: bytes that a layer's weight chunks take in each memory tile, and seconds that the array works, when it
            computes so many rows at once.

    Raises:
        DoesNotFit: if a layer is too large even row by row.
    """
    in_ddr = {*network_inputs, *outputs}
    while True:
        try:
            return _Attempt(layers, in_ddr, device, cost).run()
        except _NoRoom as full:
            candidates = {name: size for name, size in full.live.items() if name not in in_ddr}
            if not candidates:
                raise DoesNotFit(
                    full.layer,
                    f"one output row needs {full.wanted} bytes of a memory tile, of which "
                    f"{device.name} has {device.memtile.memory_bytes}; use smaller images or a larger device",
                ) from None
            idle = {name: size for name, size in candidates.items() if name not in full.read}
            pool = idle or candidates
            in_ddr.add(max(sorted(pool), key=pool.get))


class _Attempt:
    """One pass over the layers with a given set of tensors in DDR."""

    def __init__(
        self,
        layers: list[Layer],
        in_ddr: set[str],
        device: DeviceSpec,
        cost: Callable[[Layer, int], tuple[int, float]],
    ) -> None:
        self._layers, self._in_ddr, self._device, self._cost = layers, in_ddr, device, cost
        self._shapes = {layer.output: layer.output_shape for layer in layers}
        self._shapes.update({source.tensor: source.shape for layer in layers for source in layer.sources})
        self._slices = {layer.output: layer.part_of for layer in layers if layer.part_of is not None}
        self._whole: dict[str, str] = {}  # the tensor that nothing joins, of each one
        self._parts: dict[str, list[tuple[str, int]]] = {}  # and the other way round, with their first blocks
        for name in self._shapes:
            whole, block = self._place_in_whole(name)
            self._whole[name] = whole
            self._parts.setdefault(whole, []).append((name, block))
        self._last_use = {
            self._whole[name]: i for i, layer in enumerate(layers) for name in (layer.output, *layer.inputs)
        }
        self._live: dict[str, tuple[int, int]] = {}  # whole tensor -> (address, bytes)
        self._placement = Placement({}, [], [], ddr_bytes=0)
        self._born: dict[str, int] = {}
        self._before: int | None = None  # the last stage that computes

    def run(self) -> Placement:
        for name in sorted(self._in_ddr):
            self._put_in_ddr(name)
        for index, layer in enumerate(self._layers):
            self._stage(index, layer)
            for name in [n for n in self._live if self._last_use[n] <= index]:
                self._free(name, index)
        return self._placement

    def _place_in_whole(self, name: str) -> tuple[str, int]:
        """The tensor that holds a part of a part of ..., and the part's first block there."""
        block = 0
        while name in self._slices:
            name, block = self._slices[name].joined, block + self._slices[name].block
        return name, block

    def _put_in_ddr(self, name: str) -> None:
        rows, columns, blocks = self._shapes[name]
        self._give_places(name, "ddr", self._placement.ddr_bytes)
        self._placement.ddr_bytes += -(-rows * columns * blocks * BLOCK // _ALIGN) * _ALIGN

    def _give_places(self, whole: str, memory: str, address: int) -> None:
        for name, block in self._parts[whole]:
            pixel = self._shapes[whole][2] * BLOCK
            self._placement.places[name] = Place(memory, address + block * BLOCK, self._shapes[name], pixel, block)

    def _stage(self, index: int, layer: Layer) -> None:
        rows, whole, host = layer.output_shape[0], self._whole[layer.output], self._dying_input(index, layer)
        if not layer.sources:  # a concatenation whose parts lie in their places
            self._placement.stages.append(Stage(layer, [(0, rows)], 0))
            return
        if host is not None:  # the output takes the place of an input
            address, size = self._live[host]
            self._free(host, index - 1)
            self._take(whole, address, size, index)
        staged = [name for name in dict.fromkeys((*layer.inputs, layer.output)) if self._whole[name] in self._in_ddr]
        fresh = whole not in self._in_ddr and whole not in self._live
        best = None
        for height in sorted({-(-rows // n) for n in range(1, rows + 1)}, reverse=True) if staged else [rows]:
            bands = [(start, min(start + height, rows)) for start in range(0, rows, height)]
            if best is not None and len(bands) > _MOST_BANDS * len(best[1]):
                break
            buffers = min(2, len(bands))
            bytes_of = {name: self._staging_bytes(layer, name, bands) for name in staged}
            sizes = {name: buffers * size for name, size in bytes_of.items()}
            if fresh:
                sizes[whole] = self._piece(whole)
            sizes[CHUNKS], seconds = self._cost(layer, height)
            if (addresses := self._first_fit(sizes)) is not None:
                seconds = self._seconds(layer, bytes_of, len(bands), seconds)
                if best is None or seconds < best[0]:
                    best = seconds, bands, sizes, addresses
        if best is None:
            live = {name: size for name, (_, size) in self._live.items()}
            read = {self._whole[name] for name in layer.inputs}
            raise _NoRoom({**live, whole: self._piece(whole)}, read, layer, sum(sizes.values()))
        _, bands, sizes, addresses = best
        if fresh:
            self._take(whole, addresses.pop(whole), sizes[whole], index)
        ahead = self._free_before(addresses[CHUNKS], sizes[CHUNKS])
        first = self._before if ahead else index
        self._placement.allocations += [
            Allocation(CHUNKS, addresses[name], sizes[name], first, index)
            if name == CHUNKS
            else Allocation(f"{STAGING}{name}", addresses[name], sizes[name], index, index)
            for name in addresses
        ]
        self._before = index
        chunks, buffers = addresses.pop(CHUNKS), min(2, len(bands))
        staging = {
            name: tuple(address + slot * (sizes[name] // buffers) for slot in range(buffers))
            for name, address in addresses.items()
        }
        self._placement.stages.append(Stage(layer, bands, chunks, staging, ahead))

    def _seconds(self, layer: Layer, staging: dict[str, int], bands: int, seconds: float) -> float:
        """Of a layer in bands that take the array `seconds` each: the next band is loaded and the one before written
        meanwhile, but for the first and the last.
        """
        load = sum(size for name, size in staging.items() if name != layer.output) / self._device.rate("LOAD")
        write = staging.get(layer.output, 0) / self._device.rate("WRITE")
        return load + bands * (max(seconds, load, write) if bands > 1 else seconds) + write

    def _dying_input(self, index: int, layer: Layer) -> str | None:
        """An input that a layer may overwrite: read for the last time, tile by tile, at the places that are written."""
        tile_by_tile = layer.op in ("add", "product", "requantize", "lookup") or layer.residual is not None
        if not tile_by_tile or layer.output in self._in_ddr:
            return None
        if any(
            name in self._in_ddr or len(self._parts[self._whole[name]]) > 1 for name in (*layer.inputs, layer.output)
        ):
            return None
        sources = layer.sources if layer.residual is None else [layer.residual]
        images = [source.tensor for source in sources if not source.broadcast]
        return next((name for name in images if self._last_use[name] == index), None)

    def _piece(self, name: str) -> int:
        return piece_bytes(self._shapes[name], self._shapes[name][0], self._device)

    def _staging_bytes(self, layer: Layer, name: str, bands: list[tuple[int, int]]) -> int:
        shape = self._shapes[name]
        if name == layer.output:
            rows = max(stop - start for start, stop in bands)
            shape = (*shape[:2], layer.blocks)
        else:
            source = next(source for source in layer.sources if source.tensor == name)
            reaches = [source.rows.reach(*band) for band in bands]
            rows = max(stop - start for start, stop, _ in reaches)
        return piece_bytes(shape, rows, self._device)

    def _first_fit(self, sizes: dict[str, int]) -> dict[str, int] | None:
        """Lowest free addresses for all of `sizes`, or None; of chunks one that was free in the stage before too, if
        there is one.
        """
        taken = list(self._live.values())
        found = {}
        for name, size in sizes.items():
            address = self._lowest(taken + self._held_before(), size) if name == CHUNKS else None
            if address is None:
                address = self._lowest(taken, size)
            if address is None:
                return None
            found[name] = address
            taken.append((address, size))
        return found

    def _lowest(self, taken: list[tuple[int, int]], size: int) -> int | None:
        """The lowest address of `size` free bytes."""
        address = 0
        for start, length in sorted(taken):
            if address + size <= start:
                break
            address = max(address, start + length)
        return address if address + size <= self._device.memtile.memory_bytes else None

    def _held_before(self) -> list[tuple[int, int]]:
        """What was held in the stage before and is free now: (address, bytes)."""
        before = self._before
        return [(a.address, a.bytes) for a in self._placement.allocations if before is not None and a.last >= before]

    def _free_before(self, address: int, size: int) -> bool:
        """Whether nothing was held there in the stage before."""
        if self._before is None:
            return False
        return all(address + size <= start or start + length <= address for start, length in self._held_before())

    def _take(self, name: str, address: int, size: int, index: int) -> None:
        self._live[name] = (address, size)
        self._born[name] = index
        self._give_places(name, "memtile", address)

    def _free(self, name: str, last: int) -> None:
        address, size = self._live.pop(name)
        self._placement.allocations.append(Allocation(name, address, size, self._born[name], last))


@dataclass(frozen=True)
class Packing:
    """How good a placement is, in bytes.

    `peak`: of a memory tile, up to the highest address in use; `least`: the most that is held at once, below which no
    placement of the same allocations comes; `spilled`: DDR taken by tensors that are neither images nor results.
    """

    peak: int
    least: int
    spilled: int

    @property
    def gap(self) -> float:
        """The optimality gap: what the peak has over the least, as a fraction of it."""
        return self.peak / self.least - 1 if self.least else 0.0


def packing(allocations: list[Allocation], places: dict[str, Place], ends: set[str]) -> Packing:
    """How good a placement is.

    Args:
        allocations: what memory tiles hold.
        places: of all tensors.
        ends: the network's inputs and outputs, which must be in DDR.
    """
    # Held bytes only grow where something is first held.
    held = [sum(two.bytes for two in allocations if two.first <= one.first <= two.last) for one in allocations]
    in_ddr = {name: place for name, place in places.items() if place.memory == "ddr"}
    known = {in_ddr[name].address for name in ends & in_ddr.keys()}
    spilled = {
        place.address: place.shape[0] * place.shape[1] * place.pixel
        for place in in_ddr.values()
        if place.pixel == place.length and place.address not in known  # parts of a joined tensor lie in it
    }
    peak = max((one.address + one.bytes for one in allocations), default=0)
    return Packing(peak, max(held, default=0), sum(spilled.values()))
