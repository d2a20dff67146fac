from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler.aie import codegen, schedule, text, tiling
from bstf_compiler.aie.dealing import Piece, balanced, by_parts, contiguous, refined
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import Compute
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.aie.test_simulate import assert_equal_to_reference
from tests.bstf_compiler.networks import Builder, network_of_everything, random_images, random_network

SAME = Window((3, 3), padding=(1, 1, 1, 1))


def peaks(pieces, costs):
    """The highest cost of every round and input chunk, summed."""
    return sum(np.max([costs[piece.numbers].sum(axis=0) for piece in row], axis=0).sum() for row in pieces)


@given(st.sets(st.integers(0, 40)))
def test_a_piece_is_its_blocks_in_runs(blocks):
    piece = Piece.of(blocks)
    assert piece.numbers == sorted(blocks) and piece.blocks == len(blocks)
    assert all(one[1] < two[0] for one, two in pairwise(piece.runs))
    assert [first + i for _, first, count in piece.places for i in range(count)] == sorted(blocks)
    assert [before for before, _, _ in piece.places] == [piece.numbers.index(start) for start, _ in piece.runs]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_every_block_is_in_one_piece_and_exchanges_never_harm(seed, blocks, rows, rounds, chunks):
    rounds = min(rounds, -(-blocks // rows))
    costs = np.random.default_rng(seed).integers(0, 9, (blocks, chunks))
    deals = [contiguous(blocks, rounds, rows), balanced(costs, rounds, rows)]
    deals += [refined(pieces, costs) for pieces in deals]
    for pieces in deals:
        sizes = [piece.blocks for row in pieces for piece in row]
        assert sorted(block for row in pieces for piece in row for block in piece.numbers) == list(range(blocks))
        assert [len(row) for row in pieces] == [rows] * rounds and max(sizes) == -(-blocks // (rounds * rows))
        assert sizes == sorted(sizes, key=lambda size: size == 0)  # the last cores of the last round may have none
        assert all(sizes[: rows * (rounds - 1)])
    for before, after in zip(deals[:2], deals[2:]):
        assert peaks(after, costs) <= peaks(before, costs)
        assert refined(before, costs) == after


@pytest.mark.parametrize(("blocks", "rounds", "rows"), [(6, 1, 2), (8, 1, 2), (7, 1, 3), (6, 3, 2), (6, 2, 2)])
def test_deals_are_near_the_best_of_all(blocks, rounds, rows):
    """Of all ways to deal few blocks; half the deals or more are the best one."""
    limit, rng, found = -(-blocks // (rounds * rows)), np.random.default_rng(blocks), []
    owners = np.array([o for o in product(range(rounds * rows), repeat=blocks) if np.bincount(o).max() <= limit])
    for _ in range(20):
        costs = rng.integers(1, 12, (blocks, 1))
        loads = np.stack(
            [np.where(owners == piece, costs[:, 0], 0).sum(axis=1) for piece in range(rounds * rows)], axis=1
        )
        best = loads.reshape(-1, rounds, rows).max(axis=2).sum(axis=1).min()
        made = refined(balanced(costs, rounds, rows), costs)
        found.append(peaks(made, costs) / best)
    assert max(found) <= 1.15 and np.median(found) == 1


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_columns_of_cores_with_parts_of_the_channels_have_even_shares(blocks, rounds, parts, rows):
    pieces = by_parts(blocks, rounds, parts, rows)
    assert [number for row in pieces for piece in row for number in piece.numbers] == list(range(blocks))
    assert [len(row) for row in pieces] == [parts * rows] * rounds
    sizes = np.array([[piece.blocks for piece in row] for row in pieces]).reshape(rounds * parts, rows)
    assert np.ptp(sizes.sum(axis=1)) <= 1 and np.ptp(sizes, axis=1).max() <= 1
    assert (np.diff(sizes.reshape(rounds, parts, rows), axis=0) <= 0).all()  # who has none has none later


def test_equal_blocks_and_what_works_channel_by_channel_stay_together():
    build = Builder(np.random.default_rng(0))
    x = build.conv(build.input(12, 12, 24), 72, SAME, ratio=0.0)
    x = build.max_pool(build.conv(x, 72, SAME, ratio=0.0, groups=72), Window((2, 2), (2, 2)))
    graph = build.finish(build.conv(x, 40, Window((1, 1)), ratio=0.0))
    for step in bstf_compiler.compile(graph, "aie2_4x4").steps:
        assert all(len(i.blocks) == 1 for i in step.instructions if isinstance(i, Compute))


def uneven_convolution(keep):
    """One 3x3 convolution of 28 x 28 pixels with a given Γ."""
    build = Builder(np.random.default_rng(0))
    inputs, outputs = (8 * size for size in keep.shape)
    x = build.conv(build.input(28, 28, inputs), outputs, SAME, ratio=0.0)
    kernel = build.graph.tensors[f"{x} kernel"].data
    kernel[kernel == 0] = 1
    kernel *= np.kron(keep, np.ones((8, 8), np.int8)).astype(np.int8)
    return build.finish(x)


@pytest.mark.parametrize("device", ["aie2_4x4", "aie2_2x4"])
def test_columns_of_any_weight_take_the_time_of_equal_ones(device):
    """Half of all blocks, in columns that keep 8 and then 1 to 15 of 16, and in columns that all keep 8."""
    rng = np.random.default_rng(0)
    places = rng.permuted(np.tile(np.arange(16)[:, None], 16), axis=0)
    gammas = [places < kept for kept in ([8, *range(1, 16)], [8] * 16)]
    programs = (bstf_compiler.compile(uneven_convolution(gamma), device) for gamma in gammas)
    one, two = (program.estimate().layers[0] for program in programs)
    assert one.macs == two.macs
    assert one.kinds["COMP"] <= 1.07 * one.unavoidable["COMP"]
    assert one.seconds <= 1.05 * two.seconds


@pytest.mark.parametrize("seed", range(24))
def test_scattered_blocks_are_computed_and_found_again(seed, monkeypatch):
    """Ragged channels, groups, rounds, input chunks, sums, parts of joined tensors, spilled ones; every layer."""
    monkeypatch.setattr(tiling, "_MOVE_CYCLES", -64)  # the more runs the better
    rng = np.random.default_rng(seed)
    build = Builder(rng)
    size, ragged = int(rng.integers(3, 9)), int(rng.integers(0, 8))
    channels = 8 * int(rng.integers(5, 12)) - ragged
    x = build.conv(build.input(size, size + 1, int(rng.integers(8, 90))), channels, SAME, rng.random() * 0.9)
    x = build.add(x, build.conv(x, channels, Window((1, 1)), rng.random() * 0.9, "linear"), "relu")
    groups = int(rng.choice([n for n in range(1, 9) if channels % n == 0]))
    y = build.conv(x, channels, SAME, 0.6, groups=groups)
    z = build.conv(x, 8 * int(rng.integers(2, 9)), Window((1, 1)), 0.7)
    position = build.graph.tensors[z].position
    graph = build.finish(build.conv(build.concat(z, y, position=position), 40, Window((1, 1)), 0.5))
    core, memtile = int(rng.choice([6000, 16384, 65536])), int(rng.choice([6000, 16384, 524288]))
    device = small_device(int(rng.integers(1, 4)), int(rng.integers(2, 5)), core, memtile)
    program = assert_equal_to_reference(graph, device, random_images(seed, graph, 1))
    computed = [i for step in program.steps for i in step.instructions if isinstance(i, Compute)]
    assert any(len(i.blocks) > 1 for i in computed)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("network", [random_network, network_of_everything])
def test_the_search_counts_what_the_program_has(network, seed):
    """Kept blocks, bytes of chunks and loaded blocks of the chosen deal are those of the instructions."""
    graph, device = network(seed, most_channels=90), DeviceSpec.load("aie2_2x3")
    plan = schedule.plan(graph, device)
    code, compared = codegen.generate(graph, device, plan), 0
    for step in code.steps:
        tiles, layer = plan.tilings[step.stage], plan.placement.stages[step.stage].layer
        if not layer.sums_channels:
            continue
        dealt = tiling._Dealt(layer, device, 0, tiles.pieces, tiles.input_chunks)
        computed = [i for i in step.instructions if isinstance(i, Compute) and i.unit.startswith("core.0.")]
        for r in range(device.rows):
            for number, do in enumerate(i for i in computed if i.unit == f"core.0.{r}"):
                k = next(k for k, row in enumerate(tiles.pieces) if row[r].runs == do.blocks)
                j = number % tiles.input_chunks
                rows, columns, _ = do.output.sizes
                assert do.work == layer.work(rows * columns, dealt.kept[k, r, j])
                assert do.parameters.bytes == dealt.chunks[k, r, j] <= dealt.weight_bytes[k, j]
                assert do.inputs[0].sizes[2] <= 8 * dealt.most[0]
                compared += 1
        if layer.window.kernel == layer.window.strides == (1, 1):
            loaded = sum(i.bytes * i.iterations for i in step.instructions if i.unit == "loadfm.0")
            first, *_ = tiles.split.regions(step.rows[1] - step.rows[0], layer.output_shape[1], device.columns)
            pixels = sum((bottom - top) * (right - left) for (top, bottom), (left, right) in first)
            assert loaded == 8 * pixels * dealt.loads.sum()
    assert compared or not any(stage.layer.sums_channels for stage in plan.placement.stages)


def scattered_program():
    rising = np.arange(16)[:, None] < np.arange(1, 17)
    return bstf_compiler.compile(uneven_convolution(rising), "aie2_2x2")


def test_a_piece_that_two_cores_compute_is_found():
    program = scattered_program()
    instructions = program.steps[0].instructions
    one, two = (next(i for i in instructions if i.unit == f"core.0.{row}") for row in range(2))
    assert len(one.blocks) > 1 and one.blocks != two.blocks
    instructions[instructions.index(one)] = replace(one, blocks=two.blocks)
    assert "cores make output block" in program.verify()[0]


def test_a_block_that_goes_to_another_ones_place_is_found():
    program = scattered_program()
    instructions = program.steps[0].instructions
    transfer = next(i for i in instructions if i.kind == "WRITEFM")
    first, *others = transfer.moves
    other = next(i for i in others if i.source.sizes == first.source.sizes)
    swapped = {first: replace(first, target=other.target), other: replace(other, target=first.target)}
    moves = tuple(swapped.get(move, move) for move in transfer.moves)
    instructions[instructions.index(transfer)] = replace(transfer, moves=moves)
    (violation,) = program.verify()
    assert "takes blocks of c0." in violation


def test_the_blocks_of_computations_are_in_the_text():
    program = scattered_program()
    again = text.parse(program.assembly, program.data)
    made, found = ([i for i in code.steps[0].instructions if isinstance(i, Compute)] for code in (program, again))
    assert made == found and any(len(i.blocks) > 1 for i in found)
