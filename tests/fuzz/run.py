"""Fuzzes one target with atheris, guided by coverage, and writes how it went.

    python -m tests.fuzz.run --target=device --runs=1000000 --output=benchmarks/results/fuzz

An input that ends in another way than it may (an exception that is no sentence, more than 1 GiB, 120 seconds) stops the
run; libFuzzer leaves it in the work folder. `tests/fuzz/corpus/TARGET` holds the inputs to begin with. With --work a
run that was stopped goes on where it was: its inputs are kept, its executions count.
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from absl import app, flags

from tests import records

FLAGS = flags.FLAGS
CORPUS = Path(__file__).parent / "corpus"
TARGETS = ("assembly", "program", "device", "bstf_json")
_LIMITS = {"rss_limit_mb": 1024, "timeout": 120, "max_len": 8192}
# In a process of its own, since libFuzzer ends its process.
_FUZZER = """
import sys, atheris
rooms = "cpu aie.chunks aie.events aie.footprint aie.kernels aie.pointwise"  # compiled: Numba takes no instruments
compiled = ["bstf_compiler." + name for name in rooms.split()]
with atheris.instrument_imports(include=["bstf_compiler", "tomllib"], exclude=compiled, enable_loader_override=False):
    from tests.fuzz.targets import TARGETS
atheris.Setup(sys.argv[1:], TARGETS["{target}"])
atheris.Fuzz()
"""


def fuzz(target: str, runs: int, work: Path, seed: int) -> dict[str, object]:
    """Runs the fuzzer until there were so many executions, those of earlier runs in the work folder among them; returns
    the record, with `ending` "whole" if nothing was found, and `seconds` of this run alone.
    """
    before = [_read(log) for log in sorted(work.glob(f"{target}.*.log"))]
    seed, runs = seed + len(before), runs - sum(before)
    if runs < 1:
        raise ValueError(f"'{work}' holds {sum(before):,} executions already; give more --runs, or another folder")
    grown = work / "corpus" / target
    grown.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", _FUZZER.format(target=target), f"-atheris_runs={runs}", f"-seed={seed}"]
    command += [f"-{name}={value}" for name, value in _LIMITS.items()]
    command += [f"-artifact_prefix={work}/{target}-", str(grown), str(CORPUS / target)]
    if (tokens := CORPUS / f"{target}.dict").is_file():
        command.insert(-2, f"-dict={tokens}")
    began = time.monotonic()
    log = work / f"{target}.{len(before)}.log"
    with log.open("wb") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(encoding="utf-8", errors="replace")
    done = re.search(r"^Done \d+ in", text, re.MULTILINE)  # then its own alarm may end it
    stopped = "run interrupted" in text
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
    return {
        "target": target,
        "ending": "whole" if done else "stopped by a user" if stopped else f"exit code {code}",
        "executions": sum(before) + _read(log),
        "runs": len(before) + 1,
        "seconds": round(time.monotonic() - began),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "seed": seed,
        "branches": int(covered[-1][0]) if covered else 0,
        "inputs_kept": int(covered[-1][2]) if covered else 0,
        "limits": _LIMITS,
        "atheris": version("atheris"),
        "python": sys.version.split()[0],
    }


def _read(log: Path) -> int:
    """How many executions a log tells of."""
    counted = re.findall(r"^(?:#|Done )(\d+)\s", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return int(counted[-1]) if counted else 0


def main(argv: Sequence[str]) -> int:
    """Fuzzes one target; 0 if nothing was found."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} isn't a flag.")
    work = Path(FLAGS.work or tempfile.mkdtemp(prefix="fuzz-"))
    record = fuzz(FLAGS.target, FLAGS.runs, work, FLAGS.seed)
    print(json.dumps(record), f"\nlog and inputs: {work}")
    records.write(record, Path(FLAGS.output) / f"{FLAGS.target}.json")
    return 0 if record["ending"] == "whole" else 1


def define_flags() -> None:
    """The flags of the program."""
    flags.DEFINE_enum("target", None, TARGETS, "What to fuzz.", required=True)
    flags.DEFINE_integer("runs", 1_000_000, "Executions.", lower_bound=1)
    flags.DEFINE_integer("seed", 1, "Of libFuzzer's mutations.", lower_bound=1)
    flags.DEFINE_string("work", None, "Folder for the log and what is found; a temporary one by default.")
    flags.DEFINE_string("output", None, "Folder for the counts.", required=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
