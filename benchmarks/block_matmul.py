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

from absl import app, flags

from benchmarks import harness, spgemm, spmm
from bstf_compiler import console

FLAGS = flags.FLAGS
_OPS = {"spmm": spmm, "spgemm": spgemm}


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
    flags.DEFINE_integer("rounds", 5, "samples of every peer", lower_bound=3)
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
        module.SUITE.measure([[case] for case in cases[threads]], FLAGS.algorithm, FLAGS.rounds, log)
    for threads, ceiling in ceilings.items():  # again, in case something else ran at the start
        for name, value in harness.roofs(FLAGS.dtype, threads).items():
            ceiling[name] = max(ceiling[name], value)
    log.header({"roofs": ceilings})
    log.write_csv()
    module.SUITE.show(log, ceilings)
    module.plot(log.records, ceilings, folder)


if __name__ == "__main__":
    console.run("block_matmul", __doc__, main, define_flags)
