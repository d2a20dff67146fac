"""bstf-compile: compiles a SavedModel for an AIE2 array, tells how long it takes and can prove it in simulation."""

from __future__ import annotations

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


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Defines the program's flags; not at import, so that other programs can use this module's functions."""
    flags.DEFINE_string("model", None, "SavedModel folder of a quantised network.", values, required=True)
    flags.DEFINE_string("device", "aie2_4x4", "Name of a device, or path of a device's .toml file.", values)
    place = "Folder for the program: new, empty, or of an earlier program."
    flags.DEFINE_string("output", None, place, values, required=True)
    images = "Random images to simulate and compare with the integer reference."
    flags.DEFINE_integer("simulate", 0, images, lower_bound=0, flag_values=values)
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
    except KeyboardInterrupt:
        print(f"bstf-compile: interrupted; '{FLAGS.output}' holds a whole program or none", file=sys.stderr)
        return 130


def _road() -> int:
    """Loads, compiles, estimates, writes, simulates; returns the exit code."""
    output = check_folder(FLAGS.output)
    device = DeviceSpec.load(FLAGS.device)
    with _progress() as status:
        status.update(f"loading {FLAGS.model}")
        with _without_stderr():
            graph = bstf_compiler.load(FLAGS.model)
        status.update(f"compiling for {device.name}")
        program = bstf_compiler.compile(graph, device)
        status.update("estimating times")
        estimate = program.estimate(FLAGS.cost_model)
        status.update(f"writing {output}")
        program.write(output, estimate)
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(summary(program, estimate))
    if FLAGS.explain:
        console.print(program.explain().table())
    print(f"time: {estimate.total_seconds * 1e3:.3f} ms an image ({estimate.cost_model} cost model)")
    print(f"lower bound: {estimate.lower_bound_seconds * 1e3:.3f} ms in any schedule of these layers on this device")
    print(f"weights: {program.weight_bytes:,} bytes")
    print(_found_zeros(graph))
    print(f"device: {device.name}, {device.columns} x {device.rows} cores at {device.clock_hz / 1e9:g} GHz")
    if estimate.host:
        print(f"on the host, in none of these times: {'; '.join(estimate.host)}")
    print(f"written to: {output}")
    return _simulate(program, graph, FLAGS.simulate) if FLAGS.simulate else 0


def _found_zeros(graph: Graph) -> str:
    """How many weight blocks are zero, whoever made them so."""
    kernels = [
        graph.tensors[node.inputs[1]].data for node in graph if isinstance(node.op, Conv) and node.op.groups == 1
    ]
    kept = [bsr.nonzero_blocks(kernel, (BLOCK, BLOCK)) for kernel in kernels]
    blocks = sum(one.size for one in kept)
    zero = blocks - sum(int(one.sum()) for one in kept)
    sparse = sum(not one.all() for one in kept)
    return (
        f"blocks: {zero:,} of {blocks:,} weight blocks of {BLOCK}x{BLOCK} are zero, in {sparse} of {len(kept)} layers, "
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
