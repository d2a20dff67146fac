"""Kills a program (SIGKILL) at random moments, again and again, and looks at what it leaves.

    python -m tests.faults.kills --program=export --kills=50 --output=benchmarks/results/faults

After each kill every file that a reader would open is whole: the old one or the new one. Then the same command runs
again; in the end it must succeed, with the result of a run that nobody killed. Half of the kills come at any time of
the run, the others while something is being written, for these moments are short.

Programs run as forked processes that find TensorFlow imported; the study's trials run in the process that is killed.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags

from bstf_compiler.files import is_leftover
from tests import records
from tests.faults import programs

FLAGS = flags.FLAGS
_PATIENCE = 600  # seconds in which a run must end


@dataclass
class Counts:
    """What came of the kills of one program."""

    program: str
    kills: int = 0
    while_writing: int = 0
    left_old: int = 0
    left_new: int = 0
    unfinished: int = 0
    leftovers: int = 0
    completed: int = 0
    broken: list[str] = field(default_factory=list)


def started(run: Callable[[], int], log: Path) -> int:
    """Runs a function in a forked process of a session of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def ended(child: int, moment: float, folder: Path, writing: bool) -> int | None:
    """Kills a process after so many seconds, or so long after it has begun to write; its exit code if it was faster."""
    began, due = time.monotonic(), None if writing else moment
    while time.monotonic() - began < _PATIENCE:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if due is None and any(map(is_leftover, folder.rglob(".*"))):
            due = time.monotonic() - began + moment
        if due is not None and time.monotonic() - began >= due:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a run took more than {_PATIENCE} s")


def kill(program: programs.Program, kills: int, seed: int, work: Path, seconds: float) -> Counts:
    """Kills a program so often; restarts it after each kill, and begins anew when it is done.

    Args:
        program: what is run, and how its output is read.
        kills: how often.
        seed: of the moments.
        work: an empty folder.
        seconds: after which no more kills begin.
    """
    rng, counts, log = random.Random(seed), Counts(program.name), work / "log.txt"
    place = work / "place"
    place.mkdir()
    expected = []
    for version in (0, 1):  # two outputs that can be told apart, and how long each takes
        began = time.monotonic()
        if ended(started(partial(program.run, place, version), log), _PATIENCE, place, False) != 0:
            raise RuntimeError(f"{program.name} fails without a kill: {log.read_text()[-2000:]}")
        expected.append((program.read(place), time.monotonic() - began))
        if program.begins_anew:
            shutil.rmtree(place)
            place.mkdir()
    version, end = 0, time.monotonic() + seconds
    before = None if program.begins_anew else expected[1][0]
    while counts.kills < kills and not counts.broken and time.monotonic() < end:
        writing = rng.random() < 0.5
        moment = rng.random() * (program.write_seconds if writing else expected[version][1])
        code = ended(started(partial(program.run, place, version), log), moment, place, writing)
        if code is None:
            counts.kills += 1
            counts.while_writing += any(map(is_leftover, place.rglob(".*")))
            if _look(program, place, before, expected[version][0], counts) and not program.begins_anew:
                version, before = 1 - version, expected[version][0]  # the next run replaces what this one left
        elif code == 0 and program.read(place) == expected[version][0]:
            counts.completed += 1
            counts.leftovers += sum(map(is_leftover, place.rglob(".*")))
            version, before = 1 - version, expected[version][0]
            if program.begins_anew:
                shutil.rmtree(place)
                place.mkdir()
                before = None
        else:
            counts.broken.append(f"exit code {code}, and another result: {log.read_text()[-1000:]}")
    if not counts.broken:  # whatever the last kill left, the next run ends well
        code = ended(started(partial(program.run, place, version), log), _PATIENCE, place, False)
        if code != 0 or program.read(place) != expected[version][0]:
            counts.broken.append(f"the run after the last kill: exit code {code}: {log.read_text()[-1000:]}")
        counts.leftovers += sum(map(is_leftover, place.rglob(".*")))
    return counts


def _look(program: programs.Program, place: Path, before: Any, after: Any, counts: Counts) -> bool:
    """Counts what a kill left; whether it is the new output."""
    try:
        program.check(place)
        found = program.read(place)
    except Exception as error:
        counts.broken.append(f"after kill {counts.kills}: {type(error).__name__}: {error}")
        return False
    if found is None:
        counts.unfinished += 1
    elif found == after:
        counts.left_new += 1
    elif found == before:
        counts.left_old += 1
    else:
        counts.broken.append(f"after kill {counts.kills}: neither the old nor the new output")
    if found is None and before is not None:
        counts.broken.append(f"after kill {counts.kills}: the old output is gone")
    return found is not None and found == after


def main(argv: Sequence[str]) -> int:
    """Kills the programs; 0 if nothing was lost."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} isn't a flag.")
    lost = False
    for name in FLAGS.program or programs.NAMES:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            counts = kill(programs.made(name, Path(work)), FLAGS.kills, FLAGS.seed, Path(work), FLAGS.seconds)
        record = vars(counts) | {"seed": FLAGS.seed, "seconds": round(time.monotonic() - began)}
        print(json.dumps(record), flush=True)
        records.write(record, Path(FLAGS.output) / f"kills_{name}.json")
        lost |= bool(counts.broken)
    return int(lost)


def define_flags() -> None:
    """The flags of the program."""
    flags.DEFINE_multi_enum("program", [], programs.NAMES, "What to kill; default: each.")
    flags.DEFINE_integer("kills", 50, "How often each.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_float("seconds", 7200, "After which no more kills of a program begin.", lower_bound=0)
    flags.DEFINE_string("output", None, "Folder for the counts.", required=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
