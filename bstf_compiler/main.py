"""bstf-compile: compiles a SavedModel for an AIE2 array, tells how long it takes and can prove it in simulation."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.status import Status
from rich.table import Table

import bstf_compiler
from bstf_compiler import DeviceSpec, Graph, Program, bsr, integer
from bstf_compiler.aie.estimate import Estimate
from bstf_compiler.aie.layer import BLOCK
from bstf_compiler.aie.program import check_folder
from bstf_compiler.graph import Conv

FLAGS = flags.FLAGS
_SEED = 0  # of the simulated images
_SAME = "give the same network before its blocks became zero"


def summary(program: Program, estimate: Estimate) -> Table:
    """The times of a program's layers as a table, with their sums below.

    Args:
        program: gives name and device.
        estimate: times of that program.

    Returns:
        One row a layer: name, operation, microseconds, microseconds that no schedule can go below, instruction kind
        that bounds it, effective multiply-adds.

    Example:
        >>> rich.print(summary(program, program.estimate()))
    """
    macs = sum(layer.macs for layer in estimate.layers)
    table = Table(title=f"{program.name} on {estimate.device}", show_footer=True)
    table.add_column("layer", "total", overflow="fold")
    table.add_column("op")
    table.add_column("time us", f"{estimate.total_seconds * 1e6:,.1f}", justify="right")
    table.add_column("least us", f"{estimate.lower_bound_seconds * 1e6:,.1f}", justify="right")
    table.add_column("bound")
    table.add_column("MACs", f"{macs:,}", justify="right")
    for layer in estimate.layers:
        times = (f"{seconds * 1e6:,.1f}" for seconds in (layer.seconds, layer.lower_bound_seconds))
        table.add_row(layer.name, layer.op, *times, layer.bound, f"{layer.macs:,}")
    return table


def random_images(program: Program, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Images whose values are spread evenly over what a program's inputs represent; the same ones at each call.

    Args:
        program: gives shapes and ranges.
        count: number of images.

    Yields:
        For every input, by name, a batch of one image, float32 (1, h, w, c).

    Example:
        >>> program.simulate(next(random_images(program, 1)))
    """
    rng = np.random.default_rng(_SEED)
    for _ in range(count):
        images = {}
        for port in program.inputs:
            image = rng.uniform(*program.image_range(port), (1, *port.shape)).astype(np.float32)
            images[port.tensor] = image.reshape(1, *port.user_shape)
        yield images


def first_difference(program: Program, graph: Graph, images: integer.Images) -> str | None:
    """Simulates a program and compares every layer's output with the integer reference, bit for bit.

    Args:
        program: what was compiled from the graph.
        graph: the reference.
        images: float images (n, h, w, c), of several inputs a list or a dictionary.

    Returns:
        A phrase that names the first layer with another value, or None if all are equal.

    Example:
        >>> assert first_difference(program, graph, images) is None
    """
    reference = integer.trace(graph, images)
    for name, values in program.trace(images).items():
        different = int(np.count_nonzero(values != reference[name]))
        if different:
            return f"layer '{name}' has {different:,} of {values.size:,} values that differ from the integer reference"
    return None


def check_same_network(graph: Graph, dense: Graph) -> None:
    """Refuses a "dense" network that isn't the other one before its blocks became zero.

    Args:
        graph: the network with zero blocks.
        dense: the one to compare with.

    Raises:
        ValueError: they differ in images or convolutions, or the "dense" one has more zero blocks.

    Example:
        >>> check_same_network(bstf_compiler.load("sparse"), bstf_compiler.load("dense"))
    """
    images, dense_images = (", ".join(map(str, one.inputs.values())) for one in (graph, dense))
    if images != dense_images:
        raise ValueError(f"the dense network takes images of {dense_images}, '{graph.name}' of {images}; {_SAME}")
    kernels, dense_kernels = _kernels(graph), _kernels(dense)
    for one, other, which in ((kernels, dense_kernels, "dense network"), (dense_kernels, kernels, "sparse network")):
        if missing := [name for name in one if name not in other]:
            raise ValueError(f"the {which} has no layer '{missing[0]}', the other one has; {_SAME}")
    for name, kernel in kernels.items():
        if kernel.shape != dense_kernels[name].shape:
            shapes = f"{dense_kernels[name].shape} in the dense network and {kernel.shape} in '{graph.name}'"
            raise ValueError(f"layer '{name}' has a kernel of {shapes}; {_SAME}")
    zero, dense_zero = (_zero_blocks(one)[0] for one in (graph, dense))
    if dense_zero > zero:
        raise ValueError(f"the dense network has {dense_zero:,} zero blocks, '{graph.name}' {zero:,}; exchange them")


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Defines the program's flags; not at import, so that other programs can use this module's functions."""
    flags.DEFINE_string("model", None, "SavedModel folder of a quantised network.", values, required=True)
    flags.DEFINE_string("device", "aie2_4x4", "Name of a device, or path of a device's .toml file.", values)
    place = "Folder for the program: new, empty, or of an earlier program."
    flags.DEFINE_string("output", None, place, values, required=True)
    images = "Random images to simulate and compare with the integer reference."
    flags.DEFINE_integer("simulate", 0, images, lower_bound=0, flag_values=values)
    dense = "SavedModel folder of the same network without zero blocks, to draw beside and to explain what zeros gain."
    flags.DEFINE_string("dense", None, dense, values)
    reasons = "Print what bounds each layer and which change of the device would help it."
    flags.DEFINE_bool("explain", False, reasons, values)
    model = "Cost model of the times, printed and written."
    flags.DEFINE_enum("cost_model", "exact", ["exact", "calibrated", "published"], model, values)


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code. What the input gets wrong is one sentence on stderr."""
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} isn't a flag; all arguments are --name=value, see --help")
        return _road()
    except (ValueError, OSError) as error:
        print(f"bstf-compile: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        reason = "there is not enough memory; close other programs, or take a smaller network or smaller images"
        print(f"bstf-compile: {reason}; nothing was written to '{FLAGS.output}'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"bstf-compile: interrupted; '{FLAGS.output}' holds a whole program or none", file=sys.stderr)
        return 130


def _road() -> int:
    """Loads, compiles, estimates, writes, simulates; returns the exit code."""
    output = check_folder(FLAGS.output)
    device = DeviceSpec.load(FLAGS.device)
    with _progress() as status:
        graph = _load(FLAGS.model, status)
        dense = _dense(graph, device, status) if FLAGS.dense else None
        status.update(f"compiling for {device.name}")
        program = bstf_compiler.compile(graph, device)
        status.update("estimating times")
        estimate = program.estimate(FLAGS.cost_model)
        dense_estimate = None if dense is None else dense.estimate(FLAGS.cost_model)
        status.update(f"writing {output}")
        program.write(output, estimate, dense_estimate)
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(summary(program, estimate))
    if FLAGS.explain:
        console.print(program.explain(dense).table())
    _report(program, graph, estimate, dense_estimate)
    print(f"written to: {output}")
    return _simulate(program, graph, FLAGS.simulate) if FLAGS.simulate else 0


def _load(folder: str, status: Status) -> Graph:
    status.update(f"loading {folder}")
    with _without_stderr():
        graph = bstf_compiler.load(folder)
    gc.collect()  # TensorFlow's graphs refer to themselves; a GiB of them would stay beside the next network
    return graph


def _dense(graph: Graph, device: DeviceSpec, status: Status) -> Program:
    """The dense network, compiled."""
    dense = _load(FLAGS.dense, status)
    check_same_network(graph, dense)
    status.update(f"compiling the dense network for {device.name}")
    try:
        return bstf_compiler.compile(dense, device)
    except ValueError as error:
        raise ValueError(f"the dense network: {error}") from None


def _report(program: Program, graph: Graph, estimate: Estimate, dense: Estimate | None) -> None:
    """A line each about times, weights, zero blocks, memory, device and host."""
    device, packing = program.device, program.packing
    print(f"time: {estimate.total_seconds * 1e3:.3f} ms an image ({estimate.cost_model} cost model)")
    if dense is not None:
        gain = dense.total_seconds / estimate.total_seconds
        print(f"dense: {dense.total_seconds * 1e3:.3f} ms an image, {gain:.2f} times as long")
    print(f"lower bound: {estimate.lower_bound_seconds * 1e3:.3f} ms in any schedule of these layers on this device")
    print(f"weights: {program.weight_bytes:,} bytes")
    print(_found_zeros(graph))
    print(
        f"memory tiles: {packing.peak:,} of {device.memtile.memory_bytes:,} bytes of each, {packing.least:,} at least "
        f"(optimality gap {packing.gap:.1%}); {packing.spilled:,} bytes of tensors spilled to DDR"
    )
    print(f"device: {device.name}, {device.columns} x {device.rows} cores at {device.clock_hz / 1e9:g} GHz")
    if estimate.host:
        print(f"on the host, in none of these times: {'; '.join(estimate.host)}")


def _kernels(graph: Graph) -> dict[str, np.ndarray]:
    """Kernels (h, w, cin, cout) of all convolutions, by layer."""
    return {node.name: graph.tensors[node.inputs[1]].data for node in graph if isinstance(node.op, Conv)}


def _zero_blocks(graph: Graph) -> tuple[int, int, int, int]:
    """Zero blocks and all blocks, layers with a zero block and all layers, of convolutions that skip zero blocks."""
    skipping = {node.name for node in graph if isinstance(node.op, Conv) and node.op.groups == 1}
    kept = [bsr.nonzero_blocks(one, (BLOCK, BLOCK)) for name, one in _kernels(graph).items() if name in skipping]
    blocks = sum(one.size for one in kept)
    zero = blocks - sum(int(one.sum()) for one in kept)
    return zero, blocks, sum(not one.all() for one in kept), len(kept)


def _found_zeros(graph: Graph) -> str:
    """How many weight blocks are zero, whoever made them so."""
    zero, blocks, sparse, layers = _zero_blocks(graph)
    return (
        f"blocks: {zero:,} of {blocks:,} weight blocks of {BLOCK}x{BLOCK} are zero, in {sparse} of {layers} layers, "
        "and are skipped"
    )


def _simulate(program: Program, graph: Graph, count: int) -> int:
    """Compares random images; says how many are equal and where the others differ; returns the exit code."""
    differences = {}
    with _progress() as status:
        for number, image in enumerate(random_images(program, count), start=1):
            status.update(f"simulating image {number} of {count}")
            if difference := first_difference(program, graph, image):
                differences[number] = difference
    print(f"simulation equals integer reference on {count - len(differences)} of {count} images")
    for number, difference in differences.items():
        print(f"bstf-compile: image {number}: {difference}; please report it", file=sys.stderr)
    return 1 if differences else 0


@contextmanager
def _progress() -> Iterator[Status]:
    """A line on stderr that says what goes on; nothing if stderr isn't a terminal."""
    # A copy of the descriptor, so that the line goes on while `_without_stderr` holds the original.
    with (
        open(os.dup(2), "w", encoding="utf-8") as stream,
        Console(file=stream, markup=False, highlight=False).status("starting") as status,
    ):
        yield status


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drops what the body writes to the standard error descriptor.

    TensorFlow's C++ libraries write there while they are imported, before any log level of theirs applies. What they
    wrote is shown if the body ends in an error that isn't about the input.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except (ValueError, OSError):
            raise
        except Exception:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def run() -> None:
    """Entry point of the console program."""
    define_flags()
    for flag in FLAGS.get_flags_for_module(__name__):  # --help shows the flags of the script, which defines none
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(main)


if __name__ == "__main__":
    run()
