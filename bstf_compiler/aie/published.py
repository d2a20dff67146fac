"""The `published` cost model: the time estimates printed in the paper's per-layer tables.

It exists only to reproduce those tables from their own sub-volumes. **Do not plan with it**; `exact` is the
default cost model. It differs from the machine in ways that don't average out:

* `COMP` is not multiply-adds / 256. It multiplies the pixels of the core's *input* (halo included) and all
  its channels by the kernel window and by the *input* channels of the weight sub-volume, so it ignores the
  stride and holds the input channels where the output channels of a core belong.
* `LOADWM` charges one weight chunk for each piece of a layer (see `Segment`), one for a layer that is not
  cut, although a core with many output channels needs several chunks one after the other.
* Sparsity is one number per layer, the density. No mask is read; all cores are equally loaded.
* Layers follow each other without overlap. Locks, latency of transfers and kernel efficiency cost nothing.

Seconds are exact quotients of cycles and bytes. The tables print seven significant digits of every
instruction and print an instruction kind's time of a layer as the sum of those *rounded* numbers:
`printed_sum` does that. Start and end of a layer are exact sums of everything before, rounded once, and the
layer's time is printed as the difference of those two rounded numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LINK_RATE = 2.0**32
"""Bytes per second of one link: what the tables call 4 GB/s is 4 GiB/s."""

CLOCK = 1.0e9
"""Cycles per second of a core."""

_MACS_PER_CYCLE = 256
_PARAMETER_BYTES = {"conv2d": 192, "maxpool2d": 96, "avgpool2d": 96, "add": 160}
_FREE = ("data", "concat")


@dataclass(frozen=True)
class Segment:
    """A run of equal iterations of a layer.

    A layer is one piece, or several (by height, width or output channels) if its tensors or its weights don't
    fit the MemTiles at once. Each piece has one parallel segment, its body, which may have a sequential head
    and tail: the rows next to the vertical padding.

    Args:
        iterations: how many sub-volumes a core computes, at least 1.
        parallel: True: LOADFM, COMP and WRITEFM overlap. False: one after the other.
    """

    iterations: int
    parallel: bool


@dataclass(frozen=True)
class PublishedLayer:
    """What a published table says about a layer before any time.

    Args:
        name: name of the layer.
        op: "conv2d", "maxpool2d", "avgpool2d", "add", "data" or "concat"; the last two take no time.
        input_shapes: full shape (n, h, w, c) of each input.
        output_shape: full shape (n, h, w, c).
        input: sub-volume (n, h, w, c) that one core reads in an iteration, halo included.
        output: sub-volume (n, h, w, c) that one *column* of cores writes in an iteration.
        weights: sub-volume (cout, kh, kw, cin) of one weight chunk; None without weights.
        density: fraction of the weights that is kept, in (0, 1].
        chunks: weight chunks over the output channels of the whole layer; 0 without weights.
        cin_splits: parts of each chunk by input channels, one chunk sub-volume each; 1 when uncut.
        segments: head, body, tail of every piece, in order.

    Raises:
        ValueError: the op is unknown, or a field is missing or outside its range.
    """

    name: str
    op: str
    input_shapes: tuple[tuple[int, int, int, int], ...]
    output_shape: tuple[int, int, int, int]
    input: tuple[int, int, int, int] | None = None
    output: tuple[int, int, int, int] | None = None
    weights: tuple[int, int, int, int] | None = None
    density: float = 1.0
    chunks: int = 0
    cin_splits: int = 1
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if self.op in _FREE:
            return
        if self.op not in _PARAMETER_BYTES:
            known = ", ".join((*_PARAMETER_BYTES, *_FREE))
            raise ValueError(f"Layer {self.name}: op {self.op!r} has no published cost; known are {known}.")
        if self.input is None or self.output is None or not self.segments:
            raise ValueError(f"Layer {self.name}: {self.op} needs input and output sub-volumes and segments.")
        if any(segment.iterations < 1 for segment in self.segments):
            raise ValueError(f"Layer {self.name}: every segment needs at least 1 iteration.")
        if self.op == "conv2d" and (self.weights is None or self.chunks < 1 or self.cin_splits < 1):
            raise ValueError(f"Layer {self.name}: conv2d needs weights, and 1 or more chunks and splits.")
        if not 0 < self.density <= 1:
            raise ValueError(f"Layer {self.name}: density {self.density} is outside (0, 1].")


def parse_segments(iterations: str, modes: str, count: int) -> tuple[Segment, ...]:
    """Reads the segment columns of a published table.

    Long rows are abbreviated to their beginning, `"1 26 1 1 26 1 1 26 ...(48)"` with 48 segments: the piece
    `1 26 1` (head, body, tail) repeats. The missing segments are the beginning continued with its shortest
    period that divides `count`; here 3, so 16 pieces. (The printed seconds of both abbreviated rows agree
    with that to the last digit: COMP, LOADFM and WRITEFM need 16 x 28 iterations, LOADWM 16 chunks, and the
    layer's time 32 sequential segments.)

    Args:
        iterations: iterations of each segment, separated by spaces; may end in `...(count)`.
        modes: `seq` or `par` for each; may end in `...(count)`.
        count: number of segments.

    Raises:
        ValueError: the columns don't fit each other, the count, or any period.

    Example:
        >>> parse_segments("1 8 1", "seq par seq", 3)[1]
        Segment(iterations=8, parallel=True)
    """
    runs, kinds = ([word for word in text.split() if not word.startswith("...")] for text in (iterations, modes))
    head = list(zip(runs, kinds))
    abbreviated = "..." in iterations and "..." in modes
    fits = len(runs) == len(kinds) and (abbreviated or len(head) == count)
    if not fits or not set(kinds) <= {"seq", "par"}:
        raise ValueError(f"{count} segments don't fit the iterations {iterations!r} and the modes {modes!r}.")
    if abbreviated:
        period = next((p for p in range(1, len(head)) if count % p == 0 and head[p:] == head[:-p]), None)
        if period is None:
            raise ValueError(f"The segments {iterations!r} ({modes!r}) have no period that divides {count}.")
        head = head[:period] * (count // period)
    return tuple(Segment(int(run), kind == "par") for run, kind in head)


def weight_chunk_bytes(layer: PublishedLayer) -> int:
    """Bytes of one weight chunk: `d |W| + Cout (4 + Cin / 32)`.

    int8 weights kept by the density, 4 bytes of bias per output channel, and 2 bytes of index per 8x8 block.
    The index counts every block, kept or not, and dense layers carry it too. 0 without weights.
    """
    if layer.weights is None:
        return 0
    cout, kh, kw, cin = layer.weights
    return math.ceil(layer.density * cout * kh * kw * cin + cout * (4 + cin / 32))


def comp_seconds(layer: PublishedLayer, clock: float = CLOCK) -> tuple[float, ...]:
    """Seconds of COMP, one number a segment.

    `n ceil(d |I_sub| kh kw Cin_W / 256) / clock` for a convolution and `n ceil(|I_sub| / 256) / clock` for
    pooling and additions, with n iterations, density d, `|I_sub| = h w c` elements of the input sub-volume
    (its pixels, whatever the stride) and `Cin_W` input channels of the weight sub-volume. **Not**
    multiply-adds / 256: those count output pixels and output channels.

    Args:
        layer: the layer.
        clock: cycles per second.
    """
    if layer.op in _FREE:
        return ()
    work = float(math.prod(layer.input[1:]))
    if layer.weights is not None:
        _, kh, kw, cin = layer.weights
        work *= layer.density * kh * kw * cin
    cycles = math.ceil(work / _MACS_PER_CYCLE)
    return tuple(segment.iterations * cycles / clock for segment in layer.segments)


def loadfm_seconds(layer: PublishedLayer, link_rate: float = LINK_RATE) -> tuple[float, ...]:
    """Seconds of LOADFM, one number a segment: `n h r8(w) c / link_rate` of the input sub-volume.

    r8 rounds the width up to a multiple of 8, for convolutions only. An addition loads all its inputs.
    """
    if layer.op in _FREE:
        return ()
    inputs = len(layer.input_shapes) if layer.op == "add" else 1
    return _feature_map_seconds(layer, layer.input, inputs, link_rate)


def writefm_seconds(layer: PublishedLayer, link_rate: float = LINK_RATE) -> tuple[float, ...]:
    """Seconds of WRITEFM, one number a segment: `n h r8(w) c / link_rate` of the output sub-volume.

    All output channels of a column of cores share one link. r8 as in `loadfm_seconds`.
    """
    if layer.op in _FREE:
        return ()
    return _feature_map_seconds(layer, layer.output, 1, link_rate)


def loadwm_seconds(layer: PublishedLayer, link_rate: float = LINK_RATE) -> tuple[float, ...]:
    """Seconds of LOADWM, one number a load: `r16(chunk) / link_rate`, the first with the parameters.

    One chunk for each piece of the layer (each parallel segment), however many chunks a core goes through.
    Parameters are 192 bytes for a convolution. Pooling (96 bytes) and additions (160) load only those, once.
    """
    if layer.op in _FREE:
        return ()
    parameters = _PARAMETER_BYTES[layer.op]
    if layer.weights is None:
        return (parameters / link_rate,)
    chunk = _round_up(weight_chunk_bytes(layer), 16)
    return ((chunk + parameters) / link_rate, *[chunk / link_rate] * (_pieces(layer) - 1))


def loadw_seconds(layer: PublishedLayer, memtiles: int, weight_loads: int = 1, link_rate: float = LINK_RATE) -> float:
    """Seconds of LOADW: `(m r128(ceil(chunks / N) cin_splits chunk) + r64(parameters)) / link_rate`.

    Every one of the N MemTiles loads its share of the chunks, m times, at the same time as the others.

    Args:
        layer: the layer.
        memtiles: N, MemTiles of the device (columns of the mesh).
        weight_loads: m, how often the weights come from DDR. 1 for a layer in one piece. For a layer in
            several pieces 1 or the number of pieces (45 and 24 layers of the tables): that depends on the
            memory allocation and can't be derived from sub-volumes.
        link_rate: bytes per second.
    """
    if layer.op in _FREE:
        return 0.0
    share = -(-layer.chunks // memtiles) * layer.cin_splits * weight_chunk_bytes(layer)
    return (weight_loads * _round_up(share, 128) + _round_up(_PARAMETER_BYTES[layer.op], 64)) / link_rate


def layer_seconds(
    layer: PublishedLayer,
    load: float,
    loadw: float,
    write: float,
    link_rate: float = LINK_RATE,
    clock: float = CLOCK,
) -> float:
    """Seconds of a layer, given the transfers between DDR and MemTiles.

    `max(LOAD, LOADW) + LOADWM + segments + WRITE`. A parallel segment takes `max(LOADFM, COMP, WRITEFM)`,
    also with a single iteration; a sequential one `LOADFM + COMP + WRITEFM`.

    Args:
        layer: the layer.
        load: seconds of LOAD, 0 if the input already lies in the MemTiles.
        loadw: seconds of LOADW.
        write: seconds of WRITE, 0 if the output stays in the MemTiles.
        link_rate: bytes per second.
        clock: cycles per second.
    """
    kinds = zip(
        layer.segments,
        loadfm_seconds(layer, link_rate),
        comp_seconds(layer, clock),
        writefm_seconds(layer, link_rate),
    )
    segments = [max(times) if segment.parallel else sum(times) for segment, *times in kinds]
    return math.fsum([max(load, loadw), *loadwm_seconds(layer, link_rate), *segments, write])


def network_seconds(layers: Iterable[float]) -> float:
    """Seconds of a network: the sum over its layers, which don't overlap."""
    return math.fsum(layers)


def transfer_seconds(printed: float, link_rate: float = LINK_RATE) -> float:
    """Undoes the rounding of a printed transfer time: the seconds of the nearest whole number of bytes.

    Seven digits name the byte count of every transfer in the tables. Sums over a network need the unrounded
    times: those of the printed ones are off by one in the last digit in 17 places.
    """
    return round(printed * link_rate) / link_rate


def printed(seconds: float) -> str:
    """A time as the tables print it, with seven significant digits."""
    return f"{seconds:.6e}"


def printed_sum(seconds: Sequence[float]) -> str:
    """An instruction kind's time of a layer as the tables print it: the sum of the printed instructions.

    Plain sum in order, in double precision, as in the tables: an exact sum rounds two of them differently.
    """
    total = 0.0
    for part in seconds:
        total += float(printed(part))
    return printed(total)


def _pieces(layer: PublishedLayer) -> int:
    return max(1, sum(segment.parallel for segment in layer.segments))


def _feature_map_seconds(
    layer: PublishedLayer, shape: tuple[int, int, int, int], tensors: int, link_rate: float
) -> tuple[float, ...]:
    _, height, width, channels = shape
    if layer.op == "conv2d":
        width = _round_up(width, 8)
    size = tensors * height * width * channels
    return tuple(segment.iterations * size / link_rate for segment in layer.segments)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
