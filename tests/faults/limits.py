"""Runs programs without room: on a disk that gets full, where files may not grow, and with little memory.

    python -m tests.faults.limits --program=compile --output=benchmarks/results/faults

Each run must end well, or with one sentence and exit code 1; every file that a reader would open is whole, what was
there before is as it was, and when there is room again the same command ends well. Memory can also run out inside of
TensorFlow, which then aborts: counted, and its files must be whole too.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from absl import app, flags

from bstf_compiler.files import is_leftover
from tests import records
from tests.faults import programs
from tests.faults.kills import ended, started

FLAGS = flags.FLAGS
NAMES = {"compile": "bstf-compile", "train": "bstf-train"}
_DISK = 2**24  # bytes
_PATIENCE = 600  # seconds


@dataclass
class Counts:
    """How runs of a program ended for want of one thing."""

    program: str
    want: str
    runs: int = 0
    sentences: int = 0
    aborted: int = 0
    completed: int = 0
    broken: list[str] = field(default_factory=list)


@contextlib.contextmanager
def disk(work: Path) -> Iterator[Path]:
    """A small disk of its own, which only a superuser may mount."""
    place = work / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _limited(kind: int, bytes_: int, run: Callable[[], int]) -> int:
    """Runs with a limit of the system's."""
    if kind == resource.RLIMIT_AS:  # beyond what the process has
        bytes_ += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(kind, (bytes_, bytes_))
    return run()


def starve(program: programs.Program, want: str, steps: int, work: Path, folder: Path) -> Counts:
    """Runs a program so often with a part of what it needs, each time more of it.

    Args:
        program: what is run.
        want: "disk", "file" or "memory".
        steps: how many runs.
        work: an empty folder.
        folder: where the output is written, on the disk that gets full.
    """
    counts, place, ballast, log = Counts(program.name, want), folder / "place", folder / "ballast", work / "log.txt"
    place.mkdir()

    def go(version: int, limit: Callable[[Callable[[], int]], int] = lambda run: run()) -> int | None:
        log.unlink(missing_ok=True)
        return ended(started(lambda: limit(partial(program.run, place, version)), log), _PATIENCE, place, False)

    if go(0) != 0:
        raise RuntimeError(f"{program.name} fails with all that it wants: {log.read_text()[-2000:]}")
    first, files = program.read(place), [one for one in place.rglob("*") if one.is_file()]
    sizes = {"disk": sum(one.stat().st_size for one in files), "memory": 2**29}
    needed = sizes.get(want) or max(one.stat().st_size for one in files)
    for step in range(steps):
        if program.begins_anew:
            shutil.rmtree(place)
            place.mkdir()
        before, limit = program.read(place), lambda run: run()
        part = needed * (step + 1) // (steps + 1)
        if want == "disk":
            free = os.statvfs(folder)
            ballast.write_bytes(bytes(max(free.f_bavail * free.f_frsize - part, 0)))
        else:
            limit = partial(_limited, resource.RLIMIT_FSIZE if want == "file" else resource.RLIMIT_AS, part)
        _look(counts, program, place, before, go(1, limit), log)
        ballast.unlink(missing_ok=True)
        if program.read(place) is None and go(1) != 0:
            counts.broken.append(f"run {counts.runs}: with room it fails: {log.read_text()[-500:]}")
        if not program.begins_anew and (go(0) != 0 or program.read(place) != first):
            counts.broken.append(f"run {counts.runs}: what it left isn't replaced: {log.read_text()[-500:]}")
    return counts


def _look(counts: Counts, program: programs.Program, place: Path, before: object, code: int | None, log: Path) -> None:
    """Counts how a run ended, and what is broken."""
    counts.runs += 1
    said = log.read_text(errors="replace").strip()
    sentences = [line for line in said.splitlines() if line.startswith(f"{NAMES[program.name]}: ")]
    aborted = counts.want == "memory" and code in (-signal.SIGABRT, -signal.SIGSEGV, 134)
    if code == 0:
        counts.completed += 1
    elif aborted:
        counts.aborted += 1
    elif code == 1 and len(sentences) == 1 and "Traceback" not in said:
        counts.sentences += 1
    else:
        counts.broken.append(f"run {counts.runs}: exit code {code}: {said[-500:]}")
    try:
        program.check(place)
        found = program.read(place)
    except Exception as error:
        counts.broken.append(f"run {counts.runs}: {type(error).__name__}: {error}")
        return
    if code != 0 and found != before:
        counts.broken.append(f"run {counts.runs}: what was there before has changed")
    if not aborted and (left := [one.name for one in place.rglob(".*") if is_leftover(one)]):
        counts.broken.append(f"run {counts.runs}: it left {left[0]}")


def main(argv: Sequence[str]) -> int:
    """Starves the programs; 0 if nothing was lost."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} isn't a flag.")
    lost = False
    for name in FLAGS.program or NAMES:
        for want in ("disk", "file", "memory"):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as made:
                work = Path(made)
                with disk(work) if want == "disk" else contextlib.nullcontext(work) as folder:
                    counts = starve(programs.made(name, work), want, FLAGS.runs, work, folder)
            record = vars(counts) | {"seconds": round(time.monotonic() - began)}
            print(json.dumps(record), flush=True)
            records.write(record, Path(FLAGS.output) / f"no_{want}_{name}.json")
            lost |= bool(counts.broken)
    return int(lost)


def define_flags() -> None:
    """The flags of the program."""
    flags.DEFINE_multi_enum("program", [], list(NAMES), "What to run; default: each.")
    flags.DEFINE_integer("runs", 8, "How often each.", lower_bound=1)
    flags.DEFINE_string("output", None, "Folder for the counts.", required=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
