"""The `published` cost model against the published tables, to the last printed digit."""

import csv
import math
from itertools import accumulate

import pytest

from bstf_compiler.aie import published
from bstf_compiler.aie.published import PublishedLayer, Segment

TABLES = {  # file: (MemTiles, row and column of totals.csv)
    **{f"Res{n}-{kind}": (n, f"{n}x{n}", "Resnet", kind) for n in (2, 4, 8) for kind in ("dense", "sparse")},
    **{f"VGG{n}-{kind}": (n, f"{n}x{n}", "VGG16", kind) for n in (2, 4, 8) for kind in ("dense", "sparse")},
    "Res5-sparse": (5, "5x5", "Resnet", "sparse"),
}
ROWS = {"Res": 72, "VGG": 20}


def shape(text):
    return tuple(int(size) for size in text.split("x")) if text else None


def layer_of(row):
    chunks = shape(row["unified_chunks_bytes"]) or (0, 1, 0)
    return PublishedLayer(
        name=row["layer"],
        op=row["op"],
        input_shapes=tuple(shape(text) for text in row["in_shapes"].split(";") if text),
        output_shape=shape(row["out_shape"]),
        input=shape(row["sub_I_nhwc"]),
        output=shape(row["sub_O_nhwc"]),
        weights=shape(row["sub_W_cout_kh_kw_cin"]),
        density=float(row["density_used"] or 1),
        chunks=chunks[0],
        cin_splits=chunks[1],
        segments=published.parse_segments(row["iters_per_segment"], row["seg_mode"], int(row["n_segments"])),
    )


def read(folder, table):
    with open(folder / f"{table}.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == ROWS[table[:3]]
    return [(row, layer_of(row)) for row in rows]


def seconds_of(row, layer):
    """Layer time from the table's own LOAD, LOADW and WRITE, as whole bytes."""
    given = (published.transfer_seconds(float(row[f"{kind}_s"])) for kind in ("LOAD", "LOADW", "WRITE"))
    return published.layer_seconds(layer, *given)


@pytest.mark.parametrize("table", TABLES)
def test_kinds_of_every_layer_to_the_last_digit(paper_tables, table):
    for row, layer in read(paper_tables, table):
        assert {
            "COMP_s": published.printed_sum(published.comp_seconds(layer)),
            "LOADFM_s": published.printed_sum(published.loadfm_seconds(layer)),
            "WRITEFM_s": published.printed_sum(published.writefm_seconds(layer)),
            "LOADWM_s": published.printed_sum(published.loadwm_seconds(layer)),
        }.items() <= row.items(), row["layer"]
        if layer.weights is not None:
            assert published.weight_chunk_bytes(layer) == shape(row["unified_chunks_bytes"])[2], row["layer"]


@pytest.mark.parametrize("table", TABLES)
def test_loadw_of_every_layer_to_the_last_digit(paper_tables, table):
    """In one piece: from the sub-volume alone. In pieces: loaded once, or once a piece."""
    memtiles = TABLES[table][0]
    for row, layer in read(paper_tables, table):
        pieces = max(1, sum(segment.parallel for segment in layer.segments))
        candidates = {published.printed(published.loadw_seconds(layer, memtiles, loads)) for loads in (1, pieces)}
        assert row["LOADW_s"] in candidates, row["layer"]


@pytest.mark.parametrize("table", TABLES)
def test_layer_and_network_totals_to_the_last_digit(paper_tables, table):
    """Start and end are printed sums over all layers before; the layer's time is their printed difference."""
    rows = read(paper_tables, table)
    layers = [seconds_of(row, layer) for row, layer in rows]
    ends = [published.printed(end) for end in accumulate(layers)]
    starts = [published.printed(0.0), *ends[:-1]]
    for (row, _), start, end in zip(rows, starts, ends):
        duration = published.printed(float(end) - float(start))
        assert (start, end, duration) == (row["t_start_s"], row["t_end_s"], row["t_layer_s"]), row["layer"]

    _, mesh, model, kind = TABLES[table]
    with open(paper_tables / "totals.csv", newline="", encoding="utf-8") as stream:
        total = {(r["mesh"], r["model"]): r for r in csv.DictReader(stream)}[mesh, model][f"{kind}_s"]
    assert published.printed(published.network_seconds(layers)) == total


def test_every_timed_table_is_covered(paper_tables):
    timed = {path.stem for path in paper_tables.glob("*.csv")} - {"totals"}
    assert {name for name in timed if not name.endswith(".notime")} == set(TABLES)


def conv(weights, sub_input, sub_output, segments, chunks, density=1.0, cin_splits=1):
    """A convolution whose full shapes don't matter to any formula."""
    return PublishedLayer(
        name="conv",
        op="conv2d",
        input_shapes=((1, 56, 56, 64),),
        output_shape=(1, 56, 56, 64),
        input=sub_input,
        output=sub_output,
        weights=weights,
        density=density,
        chunks=chunks,
        cin_splits=cin_splits,
        segments=segments,
    )


HEAD_BODY_TAIL = (Segment(1, False), Segment(8, True), Segment(1, False))

# ResNet-50 on 4x4, typed from the published tables: layer, chunk bytes,
# (COMP, LOADFM, WRITEFM, LOADWM, LOADW) and the layer's own time without LOAD and WRITE in us.
RESNET_4X4 = {
    "layer1.0.conv1 dense": (
        conv((16, 1, 1, 64), (1, 8, 14, 64), (1, 8, 14, 64), (Segment(7, True),), 4),
        1120,
        ("1.254400e-05", "1.335144e-05", "1.335144e-05", "3.054738e-07", "3.129244e-07"),
        14.0,
    ),
    "layer1 conv2 dense": (
        conv((16, 3, 3, 64), (1, 8, 16, 64), (1, 6, 14, 64), HEAD_BODY_TAIL, 4),
        9312,
        ("1.843200e-04", "1.907349e-05", "1.430511e-05", "2.212822e-06", "2.220273e-06"),
        195.4,
    ),
    "layer1 conv2 sparse": (
        conv((16, 3, 3, 64), (1, 8, 16, 64), (1, 6, 14, 64), HEAD_BODY_TAIL, 4, density=0.5),
        4704,
        ("9.216000e-05", "1.907349e-05", "1.430511e-05", "1.139939e-06", "1.147389e-06"),
        101.1,
    ),
    "layer1 conv3 dense": (
        conv((64, 1, 1, 64), (1, 2, 14, 64), (1, 2, 14, 256), (Segment(28, True),), 4),
        4480,
        ("1.254400e-05", "1.335144e-05", "5.340576e-05", "1.087785e-06", "1.087785e-06"),
        55.6,
    ),
    "layer1.1 conv1 dense": (
        conv((16, 1, 1, 256), (1, 2, 14, 256), (1, 2, 14, 64), (Segment(28, True),), 4),
        4288,
        ("2.007040e-04", "5.340576e-05", "1.335144e-05", "1.043081e-06", "1.057982e-06"),
        202.8,
    ),
}


@pytest.mark.parametrize("name", RESNET_4X4)
def test_published_rows(name):
    layer, chunk, times, microseconds = RESNET_4X4[name]
    loadw = published.loadw_seconds(layer, memtiles=4)
    assert published.weight_chunk_bytes(layer) == chunk
    assert times == (
        published.printed_sum(published.comp_seconds(layer)),
        published.printed_sum(published.loadfm_seconds(layer)),
        published.printed_sum(published.writefm_seconds(layer)),
        published.printed_sum(published.loadwm_seconds(layer)),
        published.printed(loadw),
    )
    assert f"{published.layer_seconds(layer, 0.0, loadw, 0.0) * 1e6:.1f}" == f"{microseconds}"


def test_published_addition():
    whole, sub = (1, 56, 56, 256), (1, 2, 14, 256)
    layer = PublishedLayer("add", "add", (whole, whole), whole, sub, sub, segments=(Segment(28, True),))
    assert published.printed_sum(published.comp_seconds(layer)) == "7.840000e-07"
    assert published.printed_sum(published.loadfm_seconds(layer)) == "9.346008e-05"
    assert published.printed_sum(published.writefm_seconds(layer)) == "4.673004e-05"
    assert published.printed_sum(published.loadwm_seconds(layer)) == "3.725290e-08"
    assert published.printed(published.loadw_seconds(layer, 4)) == "4.470348e-08"
    assert published.weight_chunk_bytes(layer) == 0


def test_pieces_load_a_chunk_each():
    """First layer of VGG-16 on 2x2: four pieces, so four chunks, the first with 192 bytes of parameters."""
    segments = published.parse_segments("1 55 56 56 55 1", "seq par par par par seq", 6)
    layer = conv((32, 3, 3, 8), (1, 3, 114, 8), (1, 1, 112, 64), segments, 2)
    loads = published.loadwm_seconds(layer)
    assert len(loads) == 4
    assert published.printed_sum(loads) == "2.324581e-06"
    assert published.printed(published.loadw_seconds(layer, 2)) == "6.407499e-07"
    twice, once = published.loadw_seconds(layer, 2, weight_loads=2), published.loadw_seconds(layer, 2)
    assert math.isclose(twice - once, 2560 / published.LINK_RATE)


def test_sequential_segments_add_up_and_parallel_ones_overlap():
    both = [conv((8, 3, 3, 8), (1, 4, 8, 8), (1, 2, 8, 8), (Segment(2, parallel),), 1) for parallel in (False, True)]
    times = [sum(kind(both[0])) for kind in (published.loadfm_seconds, published.writefm_seconds)]
    times.append(sum(published.comp_seconds(both[0])))
    rest = max(3e-6, 1e-6) + sum(published.loadwm_seconds(both[0])) + 2e-6
    sequential, parallel = (published.layer_seconds(layer, 1e-6, 3e-6, 2e-6) for layer in both)
    assert math.isclose(sequential, rest + sum(times))
    assert math.isclose(parallel, rest + max(times))


def test_link_rate_and_clock_are_arguments():
    layer = RESNET_4X4["layer1 conv2 dense"][0]
    double = 2 * published.LINK_RATE
    for kind in (published.loadfm_seconds, published.writefm_seconds, published.loadwm_seconds):
        assert math.isclose(2 * sum(kind(layer, double)), sum(kind(layer)))
    assert math.isclose(2 * published.loadw_seconds(layer, 4, link_rate=double), published.loadw_seconds(layer, 4))
    assert math.isclose(2 * sum(published.comp_seconds(layer, 2 * published.CLOCK)), sum(published.comp_seconds(layer)))
    assert math.isclose(
        2 * published.layer_seconds(layer, 0, 0, 0, double, 2 * published.CLOCK),
        published.layer_seconds(layer, 0, 0, 0),
    )


@pytest.mark.parametrize("op", ["data", "concat"])
def test_free_operations_take_no_time(op):
    layer = PublishedLayer("free", op, (), (1, 8, 8, 8))
    assert published.layer_seconds(layer, 0.0, published.loadw_seconds(layer, 4), 0.0) == 0.0
    assert published.printed_sum(published.comp_seconds(layer)) == "0.000000e+00"


def test_abbreviated_segments_repeat():
    segments = published.parse_segments("1 26 1 1 26 1 1 26 ...(48)", "seq par seq seq par seq seq par ...(48)", 48)
    assert segments == (Segment(1, False), Segment(26, True), Segment(1, False)) * 16
    assert published.parse_segments("", "", 0) == ()


@pytest.mark.parametrize(
    ("iterations", "modes", "count"),
    [
        ("1 8 1", "seq par", 3),
        ("1 8 1", "seq par seq", 4),
        ("1 8", "seq both", 2),
        ("1 2 3 ...(9)", "seq par par ...(9)", 9),
    ],
)
def test_segments_that_do_not_fit_are_refused(iterations, modes, count):
    with pytest.raises(ValueError, match="segments"):
        published.parse_segments(iterations, modes, count)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"op": "softmax"}, "no published cost"),
        ({"op": "add"}, "needs input and output sub-volumes"),
        ({"op": "add", "segments": (Segment(0, True),)}, "at least 1 iteration"),
        ({"op": "conv2d", "segments": (Segment(1, True),)}, "needs weights"),
        ({"op": "add", "segments": (Segment(1, True),), "density": 0.0}, "outside"),
    ],
)
def test_incomplete_layers_are_refused(fields, message):
    volumes = {"input": (1, 1, 1, 8), "output": (1, 1, 1, 8)} if "segments" in fields else {}
    with pytest.raises(ValueError, match=f"Layer bad: .*{message}"):
        PublishedLayer(name="bad", input_shapes=(), output_shape=(1, 1, 1, 8), **volumes, **fields)
