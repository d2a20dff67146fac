"""bstf-compile: compiles a SavedModel for an AIE2 array, tells how long it takes and can prove it in simulation.

Examples, all flags being --name=value:

  A network that bstf-train or bstf.export wrote; build/program/report.html is a page about the result:
    bstf-compile --model=build/digits/int8 --output=build/program

  What its zero blocks gain, and what holds each layer back:
    bstf-compile --model=sparse/int8 --dense=dense/int8 --device=npu1 --explain --output=build/program

  Whether the simulated array computes what the integer reference does, on ten random images:
    bstf-compile --model=build/digits/int8 --simulate=10 --output=build/program

  For another program:
    bstf-compile --model=build/digits/int8 --output=build/program --json | jq .seconds

Exit codes: 0 all went well, 1 something went wrong (a sentence on stderr says what) or the simulation differs, 2 the
command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import bstf_compiler
from bstf_compiler import DeviceSpec, Graph, Program, bsr, console, integer
from bstf_compiler.aie.estimate import Estimate
from bstf_compiler.aie.layer import BLOCK
from bstf_compiler.aie.mlir.package import require_target
from bstf_compiler.aie.mlir.pretty import VERSIONS
from bstf_compiler.aie.program import check_folder
from bstf_compiler.graph import Conv

FLAGS = flags.FLAGS
_SEED = 0  # of the simulated images
_SAME = "give the same network before its blocks became zero"


class _Say(Protocol):
    """Says what goes on, and how much of it is done where that is known."""

    def __call__(self, what: str, done: int = 0, total: int | None = None) -> None: ...


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
    flags.DEFINE_string("model", None, "SavedModel folder of a quantised network; needed.", values, required=True)
    flags.DEFINE_string("device", "aie2_4x4", "Name of a device, or path of a device's .toml file.", values)
    place = "Folder for the program: new, empty, or of an earlier program; needed."
    flags.DEFINE_string("output", None, place, values, required=True)
    images = "Random images to simulate and compare with the integer reference."
    flags.DEFINE_integer("simulate", 0, images, lower_bound=0, flag_values=values)
    dense = "SavedModel folder of the same network without zero blocks, to draw beside and to explain what zeros gain."
    flags.DEFINE_string("dense", None, dense, values)
    reasons = "Print what bounds each layer and which change of the device would help it."
    flags.DEFINE_bool("explain", False, reasons, values)
    design = "Folder for an mlir-aie design of the program too, for npu1, npu2, ve2302, ve2802 or a region of one."
    flags.DEFINE_string("emit_mlir", None, design, values)
    flags.DEFINE_enum("mlir_version", "1.4", list(VERSIONS), "Version of mlir-aie's syntax.", values)
    model = "Cost model of the times, printed and written."
    flags.DEFINE_enum("cost_model", "exact", ["exact", "calibrated", "published"], model, values)
    flags.DEFINE_bool("quiet", False, "Print nothing but errors.", values)
    flags.DEFINE_bool("json", False, "Print one JSON object instead of tables and sentences: seconds, bytes.", values)


def main(_: Sequence[str]) -> int:
    """Runs the program; returns its exit code. What the input gets wrong is one sentence on stderr."""
    try:
        return _road()
    except (ValueError, OSError) as error:
        print(f"bstf-compile: {error}", file=sys.stderr)
        return console.ERROR
    except KeyboardInterrupt:
        print(f"bstf-compile: interrupted; '{FLAGS.output}' holds a whole program or none", file=sys.stderr)
        return console.INTERRUPTED


def _road() -> int:
    """Loads, compiles, estimates, writes, simulates; returns the exit code."""
    output = check_folder(FLAGS.output)
    device = DeviceSpec.load(FLAGS.device)
    if FLAGS.emit_mlir:
        require_target(device, FLAGS.emit_mlir, FLAGS.mlir_version)
    with _progress() as say:
        graph = _load(FLAGS.model, say)
        dense = _dense(graph, device, say) if FLAGS.dense else None
        say(f"compiling for {device.name}")
        program = bstf_compiler.compile(graph, device)
        say("estimating times")
        estimate = program.estimate(FLAGS.cost_model)
        dense_estimate = None if dense is None else dense.estimate(FLAGS.cost_model)
        if FLAGS.emit_mlir:
            say(f"executing and writing the mlir-aie design {FLAGS.emit_mlir}")
            program.emit_mlir(FLAGS.emit_mlir, FLAGS.mlir_version)
        say(f"writing {output}")
        program.write(output, estimate, dense, graph)
    found = results(program, graph, estimate, dense_estimate) | {"output": str(output), "mlir": FLAGS.emit_mlir}
    explanation = program.explain(dense) if FLAGS.explain else None
    if _talks():
        plain = Console(markup=False, highlight=False, emoji=False)
        plain.print(summary(program, estimate))
        if explanation is not None:
            plain.print(explanation.table())
        print("\n".join(sentences(found)))
    differences = _simulate(program, graph, FLAGS.simulate) if FLAGS.simulate else {}
    if FLAGS.json:
        equal = FLAGS.simulate - len(differences)
        found["simulation"] = {"images": FLAGS.simulate, "equal": equal} if FLAGS.simulate else None
        found["explanation"] = None if explanation is None else explanation.to_dict()
        print(json.dumps(found, indent=1))
    return console.ERROR if differences else 0


def _talks() -> bool:
    """Whether tables and sentences are printed."""
    return not FLAGS.quiet and not FLAGS.json


def _load(folder: str, say: _Say) -> Graph:
    say(f"loading {folder}")
    with _without_stderr():
        graph = bstf_compiler.load(folder)
    gc.collect()  # TensorFlow's graphs refer to themselves; a GiB of them would stay beside the next network
    return graph


def _dense(graph: Graph, device: DeviceSpec, say: _Say) -> Program:
    """The dense network, compiled."""
    dense = _load(FLAGS.dense, say)
    check_same_network(graph, dense)
    say(f"compiling the dense network for {device.name}")
    try:
        return bstf_compiler.compile(dense, device)
    except ValueError as error:
        raise ValueError(f"the dense network: {error}") from None


def results(program: Program, graph: Graph, estimate: Estimate, dense: Estimate | None) -> dict[str, Any]:
    """What a compilation found, for json: seconds, bytes, Hz.

    Args:
        program: what was compiled.
        graph: what from.
        estimate: the program's times.
        dense: those of the same network without zero blocks.
    """
    device, packing = program.device, program.packing
    zero, blocks, sparse, layers = _zero_blocks(graph)
    shown = ("name", "op", "seconds", "lower_bound_seconds", "bound", "macs", "bytes")
    return {
        "network": program.name,
        "device": {"name": device.name, "columns": device.columns, "rows": device.rows, "clock_hz": device.clock_hz},
        "cost_model": estimate.cost_model,
        "seconds": estimate.total_seconds,
        "dense_seconds": None if dense is None else dense.total_seconds,
        "lower_bound_seconds": estimate.lower_bound_seconds,
        "weight_bytes": program.weight_bytes,
        "blocks": {"zero": zero, "all": blocks, "sparse_layers": sparse, "layers": layers},
        "memory_tile": {
            "bytes": device.memtile.memory_bytes,
            "peak": packing.peak,
            "least": packing.least,
            "gap": packing.gap,
            "spilled": packing.spilled,
        },
        "host": list(estimate.host),
        "layers": [{name: getattr(layer, name) for name in shown} for layer in estimate.layers],
    }


def sentences(found: dict[str, Any]) -> Iterator[str]:
    """Results of a whole program in words, a line each: times, weights, zero blocks, memory, device, host, place."""
    device, blocks, tile = found["device"], found["blocks"], found["memory_tile"]
    seconds, dense = found["seconds"], found["dense_seconds"]
    yield f"time: {seconds * 1e3:.3f} ms an image ({found['cost_model']} cost model)"
    if dense is not None:
        yield f"dense: {dense * 1e3:.3f} ms an image, {dense / seconds:.2f} times as long"
    bound = found["lower_bound_seconds"] * 1e3
    yield f"lower bound: {bound:.3f} ms in any schedule of these layers on this device"
    yield f"weights: {found['weight_bytes']:,} bytes"
    yield (
        f"blocks: {blocks['zero']:,} of {blocks['all']:,} weight blocks of {BLOCK}x{BLOCK} are zero, in "
        f"{blocks['sparse_layers']} of {blocks['layers']} layers, and are skipped"
    )
    yield (
        f"memory tiles: {tile['peak']:,} of {tile['bytes']:,} bytes of each, {tile['least']:,} at least "
        f"(optimality gap {tile['gap']:.1%}); {tile['spilled']:,} bytes of tensors spilled to DDR"
    )
    size = f"{device['columns']} x {device['rows']} cores at {device['clock_hz'] / 1e9:g} GHz"
    yield f"device: {device['name']}, {size}"
    if found["host"]:
        yield f"on the host, in none of these times: {'; '.join(found['host'])}"
    yield f"written to: {found['output']}"
    yield f"report: {Path(found['output']) / 'report.html'}"
    if found["mlir"]:
        yield f"mlir-aie design: {found['mlir']}; it was read back and executed, its outputs are the program's"


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


def _simulate(program: Program, graph: Graph, count: int) -> dict[int, str]:
    """Compares random images; says how many are equal; returns where the others differ, by number of the image."""
    differences = {}
    with _progress() as say:
        for number, image in enumerate(random_images(program, count), start=1):
            say("simulating images", number - 1, count)
            if difference := first_difference(program, graph, image):
                differences[number] = difference
    if _talks():
        print(f"simulation equals integer reference on {count - len(differences)} of {count} images")
    for number, difference in differences.items():
        print(f"bstf-compile: image {number}: {difference}; please report it", file=sys.stderr)
    return differences


@contextmanager
def _progress() -> Iterator[_Say]:
    """A line on stderr that says what goes on, with a bar where the end is known; nothing if it isn't a terminal."""
    # A copy of the descriptor, so that the line goes on while `_without_stderr` holds the original.
    with open(os.dup(2), "w", encoding="utf-8") as stream:
        terminal = Console(file=stream, markup=False, highlight=False)
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        hidden = FLAGS.quiet or not terminal.is_terminal
        with Progress(*columns, console=terminal, transient=True, disable=hidden) as progress:
            task = progress.add_task("starting", total=None)

            def say(what: str, done: int = 0, total: int | None = None) -> None:
                progress.columns = (*columns, BarColumn(), MofNCompleteColumn()) if total else columns
                progress.update(task, description=what, completed=done, total=total)

            yield say


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


def run() -> NoReturn:
    """Entry point of the console program."""
    console.run("bstf-compile", __doc__, main, define_flags)


if __name__ == "__main__":
    run()
