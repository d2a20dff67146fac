"""What every benchmark here shares: peers in their own processes, interleaved rounds, roofs, records and files.

Two thread pools in one process take each other's cores, so each back end runs in a process of its own, with its number
of threads set before it starts. Rounds go through all back ends in turn: what disturbs the machine disturbs all.
Cases are measured again if one is noisy, and keep their noise in the record if that doesn't help.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numba
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.records import Records
from bstf_compiler.cpu import dots, simd
from bstf_compiler.files import replacing
from bstf_compiler.suggestion import suggestion

_CONSOLE = Console(width=130)
# Environment variables by which thread pools learn their size, before they start.
_POOLS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
# A sample repeats short work for at least so many seconds.
_SAMPLE_SECONDS = 0.05
# Threads of the peer before spin for a tenth of a second, in case more work comes.
_PAUSE_SECONDS = 0.2
# Work that takes longer needs no warm-up, and three samples of it do.
_LONG_SECONDS = 0.5
# Median absolute deviation over median above which a case is measured again.
_NOISE = 0.05


@dataclass(frozen=True)
class Work:
    """What a back end prepares: the function to time, and how wrong its result is, relative to the largest value."""

    run: Callable[[], Any]
    error: float


class Peer:
    """A back end in its own process.

    Args:
        name: as in the records.
        prepare: `prepare(case) -> Work`, a module-level function; ImportError says that a library is missing.
        threads: of every pool of the process.
        environment: more variables that it starts with.
    """

    def __init__(
        self, name: str, prepare: Callable[[Any], Work], threads: int, environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(there, prepare, threads), daemon=True)
        with _environment(dict.fromkeys(_POOLS, str(threads)) | (environment or {})):
            self._process.start()
        there.close()
        self._pipe = here

    def setup(self, *cases: Any) -> list[dict[str, Any]]:
        """Prepares cases in place of those before, and warms up; returns {"error": ...} or {"missing": why} of each."""
        self._ask(("free", None))
        return [self._ask(("setup", case)) for case in cases]

    def sample(self, place: int = 0) -> float:
        """Seconds of one run of the case at a place: the median of as many as fill the time of a sample."""
        return self._ask(("sample", place))

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(10)

    def _ask(self, message: tuple[str, Any]) -> Any:
        try:
            self._pipe.send(message)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"The process of {self.name} ended (exit code {self._process.exitcode}).") from error
        if isinstance(answer, Exception):
            raise RuntimeError(f"{self.name} failed: {answer!r}") from answer
        return answer


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Any, prepare: Callable[[Any], Work], threads: int) -> None:
    """The life of a peer's process: answers until the other end closes."""
    made: list[tuple[Work, float] | None] = []  # and the seconds that each takes
    while True:
        try:
            task, what = pipe.recv()
        except EOFError:
            return
        try:
            if task == "free":
                work = None  # it would keep the last case
                made.clear()
                pipe.send(None)
            elif task == "setup":
                made.append(None)
                work = prepare(what)
                seconds = _seconds(work.run)
                if seconds < _LONG_SECONDS:
                    seconds = min(seconds, _seconds(work.run), _seconds(work.run))
                made[-1] = work, seconds
                pipe.send({"error": work.error})
            else:
                work, seconds = made[what]
                time.sleep(_PAUSE_SECONDS)
                if seconds < _LONG_SECONDS:
                    work.run()
                repeats = max(1, int(_SAMPLE_SECONDS / seconds))
                pipe.send(statistics.median(_seconds(work.run) for _ in range(repeats)))
        except ImportError as error:
            pipe.send({"missing": str(error)})
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    peers: Sequence[Peer], cases: Sequence[Any], rounds: int, tolerance: float, approximate: Sequence[str] = ()
) -> list[dict[str, dict[str, Any]]]:
    """Times cases on every peer, in turn, so that cases can be compared with one another, too.

    Args:
        peers: who runs them.
        cases: what they run; each peer holds all of them.
        rounds: samples of each.
        tolerance: how wrong a result may be.
        approximate: peers that are left out where their result is worse; one of any other ends the run.

    Returns:
        For each case, by peer: `seconds` (median), `mad`, `p10`, `p90`, `samples`, `error`, `others` (the part of the
        machine that other programs used just before); or `missing`, why it isn't timed.

    Raises:
        ValueError: a result is further than `tolerance` from the right one.
    """
    answers = {(place, peer): answer for peer in peers for place, answer in enumerate(peer.setup(*cases))}
    for (place, peer), answer in answers.items():
        if not answer.get("error", 0.0) <= tolerance:
            if peer.name not in approximate:
                raise ValueError(f"{peer.name} is wrong by {answer['error']:.2g} of the result on {cases[place]}.")
            answers[place, peer] = {"missing": f"its result is wrong by {answer['error']:.2g}"}
    samples: dict[tuple[int, Peer], list[float]] = {
        (place, peer): [] for place in range(len(cases)) for peer in peers if "missing" not in answers[place, peer]
    }
    for attempt in range(2):
        others = wait_for_quiet()
        for _ in range(rounds):
            for (place, peer), taken in samples.items():
                if len(taken) < 3 or max(taken) < _LONG_SECONDS:
                    taken.append(peer.sample(place))
        if attempt or all(_noise(values) < _NOISE for values in samples.values() if max(values) < _LONG_SECONDS):
            break
    for key, values in samples.items():
        answers[key] |= summary(values) | {"others": others}
    return [{peer.name: answers[place, peer] for peer in peers} for place in range(len(cases))]


def wait_for_quiet(limit: float = 10.0, busy: float = 0.1) -> float:
    """Waits until other programs use less than `busy` of the machine, at most `limit` seconds; returns what they use.

    Linux only; elsewhere it returns 0 at once.
    """
    statistics_file = Path("/proc/stat")
    if not statistics_file.exists():
        return 0.0
    end = time.monotonic() + limit
    while True:
        before = _ticks(statistics_file)
        time.sleep(0.25)
        after = _ticks(statistics_file)
        used = 1 - (after[0] - before[0]) / max(1, after[1] - before[1])
        if used < busy or time.monotonic() > end:
            return round(used, 3)


def _ticks(file: Path) -> tuple[int, int]:
    """Idle and all clock ticks of all cores since the start of the machine."""
    counts = [int(word) for word in file.read_text().splitlines()[0].split()[1:9]]
    return counts[3] + counts[4], sum(counts)


def _noise(samples: list[float]) -> float:
    middle = statistics.median(samples)
    return statistics.median(abs(one - middle) for one in samples) / middle


def summary(samples: list[float]) -> dict[str, Any]:
    """Median and spread of times, in seconds."""
    middle = statistics.median(samples)
    return {
        "seconds": middle,
        "mad": statistics.median(abs(one - middle) for one in samples),
        "p10": float(np.percentile(samples, 10)),
        "p90": float(np.percentile(samples, 90)),
        "samples": len(samples),
    }


def fma_peak(case: tuple[str, int]) -> Work:
    """Multiply-adds in registers, on all threads: 2 * `FMA_COUNT` operations a thread. The case: (dtype, threads).

    For int8, `vpdpbusd` or what takes its place.
    """
    dtype, threads = case
    isa = simd.host_isa()
    word = np.dtype(np.int32 if dtype == "int8" else dtype)
    outer = simd.fma_outer if dtype != "int8" else dots.dot_outer if isa.dot else dots.widened_outer
    one = (1,) if dtype != "int8" else ()
    lanes, rows, count = isa.lanes(word), 4, 2 if outer is dots.widened_outer else 3
    steps = FMA_COUNT // (lanes * rows * count) // (4 if dtype == "int8" else 1)

    def burn(values, out, workers):
        for worker in numba.prange(workers):
            tile = simd.zeros(values, lanes, rows, count)
            vectors = simd.load(values, worker, lanes, count)
            for step in range(steps):  # with the same weights in every step, products would be taken out of the loop
                tile = outer(tile, vectors, values, step & 7, *one)
            simd.store_transposed(tile, count, out, worker * rows * count * lanes, rows)

    numba.config.THREADING_LAYER = "threadsafe"
    compiled = numba.njit(parallel=True, nogil=True)(burn)
    values = np.zeros(threads + lanes * count + 16, word)
    out = np.zeros(threads * rows * count * lanes, word)
    compiled(values, out, threads)
    return Work(lambda: compiled(values, out, threads), 0.0)


FMA_COUNT = 2**29


def triad(case: tuple[str, int, int]) -> Work:
    """A = b + s * c in three arrays, as STREAM counts, and b = a + s * c, until `TRIAD_BYTES` are moved.

    The case: (name, threads, bytes of the arrays together).
    """
    _, threads, together = case
    size, passes = together // 24, TRIAD_BYTES // together

    def run(a, b, c, workers):
        for worker in numba.prange(workers):
            first, last = worker * len(a) // workers, (worker + 1) * len(a) // workers
            for turn in range(passes):
                if turn % 2 == 0:
                    for i in range(first, last):
                        a[i] = b[i] + 3.0 * c[i]
                else:
                    for i in range(first, last):
                        b[i] = a[i] - 3.0 * c[i]

    numba.config.THREADING_LAYER = "threadsafe"
    compiled = numba.njit(parallel=True, nogil=True)(run)
    arrays = [np.ones(size) for _ in range(3)]
    compiled(*arrays, threads)
    return Work(lambda: compiled(*arrays, threads), 0.0)


TRIAD_BYTES = 3 * 2**27
CACHED_BYTES = 3 * 2**21


def roofs(dtypes: Sequence[str], threads: int) -> dict[str, float]:
    """The machine's measured ceilings: operations/s by dtype, and "bandwidth" in bytes/s. The best of ten."""
    return {
        **{dtype: 2 * FMA_COUNT * threads / _fastest(fma_peak, dtype, threads) for dtype in dtypes},
        "bandwidth": bandwidth(TRIAD_BYTES, threads),
    }


def bandwidth(size: int, threads: int) -> float:
    """Bytes/s of a triad over so many bytes, of which `TRIAD_BYTES` is a multiple; `CACHED_BYTES` stay in a cache."""
    return TRIAD_BYTES / _fastest(triad, "bandwidth", threads, size)


def _fastest(prepare: Callable[[Any], Work], *case: Any) -> float:
    """Seconds of the fastest of ten samples, in a process of its own."""
    name, threads, *_ = case
    peer = Peer(name, prepare, threads)
    peer.setup(case)
    wait_for_quiet()
    best = min(peer.sample() for _ in range(10))
    peer.close()
    return best


def check_networks(given: Sequence[str], known: Iterable[str]) -> None:
    """Ends the program with a sentence if a network that was asked for isn't known."""
    for name in given:
        if name not in known:
            sys.exit(f"error: no network '{name}'{suggestion(name, known)}; there are {', '.join(known)}")


def machine() -> dict[str, Any]:
    """What has to be known of the machine and the software to read a time."""
    names = ("numpy", "scipy", "numba", "llvmlite", "keras", "jax", "tensorflow")
    names += ("sparse-dot-mkl", "mkl", "ai-edge-litert", "openvino")
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "llvm_cpu": simd.llvm.get_host_cpu_name(),
        "isa": simd.host_isa().name,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "commit": git.stdout.strip(),
        "arguments": [argument for argument in sys.argv[1:] if not argument.startswith("--output")],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Log:
    """Records of a run: JSON lines as they come, so that an interrupted run keeps what it has; then CSV.

    Args:
        folder: made if need be.
        name: of the files.
    """

    def __init__(self, folder: Path, name: str) -> None:
        lines = folder / f"{name}.jsonl"
        lines.unlink(missing_ok=True)
        self._lines = Records(lines)
        self._csv = folder / f"{name}.csv"
        self.records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        """Keeps a record, in memory and on disk."""
        self.records.append(record)
        self.header(record)

    def header(self, record: dict[str, Any]) -> None:
        """Writes a record that isn't a measurement: the machine, the roofs."""
        self._lines.add(record)

    def write_csv(self) -> None:
        """The measurements as a table."""
        names = list(dict.fromkeys(name for record in self.records for name in record))
        with replacing(self._csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.records)


def table(title: str, records: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> Table:
    """A printed table: a column is a name and what it shows of a record."""
    made = Table(title=title)
    for name in columns:
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(*(show(record) for show in columns.values()))
    return made


@dataclass(frozen=True)
class Suite:
    """Cases of one kind and who can run them.

    A case has a `name`, a `dtype`, `threads`, `operations` (effective ones) and `fields()`: what its records tell.

    Attributes:
        name: as in the records and the files.
        peers: what prepares a case for each.
        base: the peer that others are compared with.
        tolerances: by type, how wrong a result may be.
        environments: more variables with which peers start.
        approximate: peers whose wrong results are no reason to end: they aren't timed in that case.
    """

    name: str
    peers: dict[str, Callable[[Any], Work]]
    base: str
    tolerances: dict[str, float]
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    approximate: tuple[str, ...] = ()

    def measure(self, groups: Sequence[Sequence[Any]], names: Sequence[str], rounds: int, log: Log) -> None:
        """Times groups of cases on the named peers or on all; a record each.

        The cases of a group, of one type, are measured in turn. All cases have the same number of threads.
        """
        threads = groups[0][0].threads
        peers = [Peer(name, self.peers[name], threads, self.environments.get(name)) for name in names or self.peers]
        try:
            for cases in groups:
                found = compare(peers, cases, rounds, self.tolerances[cases[0].dtype], self.approximate)
                for case, results in zip(cases, found):
                    self._tell(case, results, log)
        finally:
            for peer in peers:
                peer.close()

    def _tell(self, case: Any, results: dict[str, Any], log: Log) -> None:
        for name, result in results.items():
            log.add(self._record(case, name, result, results))
        times = [f"{name} {one['seconds'] * 1e3:.3f} ms" for name, one in results.items() if "seconds" in one]
        what = ", ".join(f"{value}" for value in case.fields().values())
        _CONSOLE.print(f"{what}: {', '.join(times)}", highlight=False)

    def _record(self, case: Any, name: str, result: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
        made = {"op": self.name, "case": case.name, **case.fields(), "peer": name, "operations": case.operations}
        made |= result
        if "seconds" in result and not name.startswith("sort"):
            made["effective_gflops"] = case.operations / result["seconds"] / 1e9
            if "seconds" in results.get(self.base, {}):
                made[f"speedup_over_{self.base}"] = results[self.base]["seconds"] / result["seconds"]
        return made

    def show(self, log: Log, ceilings: dict[int, dict[str, float]]) -> None:
        """Prints the table."""

        def percent(one: dict[str, Any]) -> str:
            ceiling = ceilings.get(one["threads"], {}).get(one["dtype"])
            return f"{one['effective_gflops'] / ceiling * 1e11:.0f} %" if ceiling and "effective_gflops" in one else ""

        def number(name: str, digits: int) -> Callable[[dict[str, Any]], str]:
            return lambda one: f"{one[name]:.{digits}f}" if name in one else ""

        done = [one for one in log.records if "seconds" in one]
        told = ("case", "dtype", "block", "density", "batch", "threads", "peer")
        columns = {name: lambda one, name=name: str(one[name]) for name in told if done and name in done[0]}
        columns |= {
            "ms": lambda one: f"{one['seconds'] * 1e3:.3f}",
            "± %": lambda one: f"{one['mad'] / one['seconds'] * 100:.0f}",
            "eff. GFLOPS": number("effective_gflops", 2),
            "of FMA peak": percent,
            f"over {self.base}": number(f"speedup_over_{self.base}", 2),
        }
        _CONSOLE.print(table(f"{self.name}, medians", done, columns))
        for name, reason in {one["peer"]: one["missing"] for one in log.records if "missing" in one}.items():
            _CONSOLE.print(f"{name}: not measured in some case, {reason}")
