"""Products with block-sparse matrices: this package, and what else there is, on the same matrices.

    python -m benchmarks.block_matmul --preset=square --preset=resnet50 --output=DIR
    python -m benchmarks.block_matmul --op=spgemm --preset=fig1 --output=DIR

`spmm` is dense times block sparse. `bstf` packs the dense operand inside of the time, and `bstf_packed` apart; both
write into an array that exists, as NumPy does. `spgemm` is block sparse times block sparse, on the grid of the
published study of block sizes; there sorting is apart. Effective operations are 2 x multiply-adds on kept blocks; a
dense peer multiplies the zeros, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console

from benchmarks import harness, spgemm, spmm
from benchmarks.harness import Peer

FLAGS = flags.FLAGS
_CONSOLE = Console(width=130)
_OPS = {"spmm": spmm, "spgemm": spgemm}


def measure(op: str, cases: Sequence[Any], names: Sequence[str], rounds: int, log: harness.Log) -> None:
    """Times the cases, all of the same number of threads, on the named peers; a record each."""
    module = _OPS[op]
    peers = [Peer(name, module.PEERS[name], cases[0].threads, module.ENVIRONMENTS.get(name, {})) for name in names]
    try:
        for case in cases:
            results = harness.compare(peers, case, rounds, module.TOLERANCES[case.dtype])
            for name, result in results.items():
                log.add(record(op, case, name, result, results))
            times = [f"{name} {one['seconds'] * 1e3:.3f} ms" for name, one in results.items() if "seconds" in one]
            what = ", ".join(f"{value}" for value in case.fields().values())
            _CONSOLE.print(f"{what}: {', '.join(times)}", highlight=False)
    finally:
        for peer in peers:
            peer.close()


def record(op: str, case: Any, name: str, result: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """A measurement as it is written."""
    base = _OPS[op].BASE
    made = {"op": op, "case": case.name, **case.fields(), "peer": name, "operations": case.operations, **result}
    if "seconds" in result and not name.startswith("sort"):
        made["effective_gflops"] = case.operations / result["seconds"] / 1e9
        if "seconds" in results.get(base, {}):
            made[f"speedup_over_{base}"] = results[base]["seconds"] / result["seconds"]
    return made


def show(op: str, log: harness.Log, ceilings: dict[int, dict[str, float]]) -> None:
    """Prints the table."""
    base = _OPS[op].BASE

    def percent(one: dict[str, Any]) -> str:
        ceiling = ceilings.get(one["threads"], {}).get(one["dtype"])
        return f"{one['effective_gflops'] / ceiling * 1e11:.0f} %" if ceiling and "effective_gflops" in one else ""

    def number(name: str, digits: int) -> Any:
        return lambda one: f"{one[name]:.{digits}f}" if name in one else ""

    columns = {
        "case": lambda one: one["case"],
        "type": lambda one: one["dtype"],
        "block": lambda one: one["block"],
        **({"density": lambda one: f"{one['density']:g}"} if op == "spmm" else {}),
        "threads": lambda one: str(one["threads"]),
        "peer": lambda one: one["peer"],
        "ms": lambda one: f"{one['seconds'] * 1e3:.3f}",
        "± %": lambda one: f"{one['mad'] / one['seconds'] * 100:.0f}",
        "eff. GFLOPS": number("effective_gflops", 2),
        "of FMA peak": percent,
        f"over {base}": number(f"speedup_over_{base}", 2),
    }
    done = [one for one in log.records if "seconds" in one]
    _CONSOLE.print(harness.table(f"{op}, medians", done, columns))
    for name, reason in {one["peer"]: one["missing"] for one in log.records if "missing" in one}.items():
        _CONSOLE.print(f"{name}: not measured in some case, {reason}")


def define_flags() -> None:
    """The flags of the program."""
    flags.DEFINE_enum("op", "spmm", sorted(_OPS), "dense times block sparse, or block sparse times block sparse")
    flags.DEFINE_multi_enum("preset", [], sorted({*spmm.PRESETS, *spgemm.PRESETS}), "named lists of shapes")
    flags.DEFINE_list("shapes", [], "more shapes: MxKxN for spmm; rows of blocks x blocks a row for spgemm")
    flags.DEFINE_multi_string("block", ["8"], "block shapes: 8, or 16x4")
    flags.DEFINE_multi_enum("dtype", ["float32"], sorted(spmm.TOLERANCES), "types")
    flags.DEFINE_multi_integer("threads", [2], "numbers of threads", lower_bound=1)
    flags.DEFINE_multi_float("density", [0.5], "spmm: fractions of the blocks that are kept", 0.0, 1.0)
    flags.DEFINE_multi_enum("algorithm", [], sorted({*spmm.PEERS, *spgemm.PEERS}), "who multiplies; default: all")
    flags.DEFINE_integer("rounds", 7, "samples of every peer", lower_bound=3)
    flags.DEFINE_string("output", None, "folder for the records (jsonl, csv) and the plots", required=True)


def main(_: Sequence[str]) -> None:
    """Runs the cases."""
    module = _OPS[FLAGS.op]
    for flag, allowed in (("preset", module.PRESETS), ("algorithm", module.PEERS), ("dtype", module.TOLERANCES)):
        wrong = [value for value in FLAGS[flag].value if value not in allowed]
        if wrong:
            raise app.UsageError(f"--op={FLAGS.op} has no --{flag}={wrong[0]}: use one of {', '.join(allowed)}.")
    blocks = [tuple(map(int, block.split("x"))) * (1 if "x" in block else 2) for block in FLAGS.block]
    densities = {"densities": FLAGS.density} if FLAGS.op == "spmm" else {}
    cases = {
        threads: module.cases(FLAGS.preset, FLAGS.shapes, blocks, FLAGS.dtype, threads=threads, **densities)
        for threads in FLAGS.threads
    }
    if not any(cases.values()):
        raise app.UsageError("There is nothing to do: name a --preset or --shapes.")
    folder = Path(FLAGS.output)
    log = harness.Log(folder, FLAGS.op)
    ceilings = {threads: harness.roofs(FLAGS.dtype, threads) for threads in FLAGS.threads}
    log.header({"machine": harness.machine(), "roofs": ceilings})
    for threads in FLAGS.threads:
        measure(FLAGS.op, cases[threads], FLAGS.algorithm or list(module.PEERS), FLAGS.rounds, log)
    for threads, ceiling in ceilings.items():  # again, in case something else ran at the start
        for name, value in harness.roofs(FLAGS.dtype, threads).items():
            ceiling[name] = max(ceiling[name], value)
    log.header({"roofs": ceilings})
    log.write_csv()
    show(FLAGS.op, log, ceilings)
    module.plot(log.records, ceilings, folder)


if __name__ == "__main__":
    define_flags()
    app.run(main)
