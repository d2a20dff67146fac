"""Several devices: two processes on JAX that are killed and go on, two replicas of MirroredStrategy, refusals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bstf import distribution
from tests.bstf.idx import write_idx

WORKERS = Path(__file__).parent / "workers"
ROOT = Path(__file__).parents[2]


def start(name, *arguments, backend):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"KERAS_BACKEND": backend, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "2"}
    settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # they take longer than what is computed here
    environment = os.environ | settings
    command = [sys.executable, str(WORKERS / name), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pair(folder, how):
    """Two processes that find each other at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [start("two_processes.py", address, i, folder, how, backend="jax") for i in range(2)]


def lines(path):
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_two_processes_stay_equal_and_survive_a_kill(tmp_path):
    write_idx(tmp_path / "idx", train=200)
    first = pair(tmp_path, "once")
    try:
        deadline = time.monotonic() + 600  # of a busy machine
        while len(lines(tmp_path / "killed-1.txt")) < 2 and time.monotonic() < deadline:
            assert all(one.poll() is None for one in first), first[0].communicate()[0][-3000:]
            time.sleep(0.05)
        time.sleep(0.4)  # into the third epoch
        first[1].send_signal(signal.SIGKILL)
        first[1].wait(10)
        try:  # alone the other one can't go on; it must not hang for ever, nor spoil the checkpoint
            first[0].wait(20)
        except subprocess.TimeoutExpired:
            first[0].kill()
    finally:
        for one in first:
            one.kill()
    assert first[0].returncode != 0
    done = [len(lines(tmp_path / f"killed-{i}.txt")) for i in range(2)]
    assert all(2 <= count < 5 for count in done)
    second = pair(tmp_path, "again")
    try:
        outputs = [one.communicate(timeout=600)[0] for one in second]
    finally:
        for one in second:
            one.kill()
    assert [one.returncode for one in second] == [0, 0], outputs[0][-3000:]
    whole, other = (lines(tmp_path / f"whole-{i}.txt") for i in range(2))
    assert whole == other and [line[0] for line in whole] == list("01234")  # Γ and all weights, every epoch
    assert len({line[1] for line in whole}) > 2 and int(whole[-1][3]) == 8 + 6  # Γ changed and got there
    for i in range(2):
        epochs = {line[0]: line[1:] for line in lines(tmp_path / f"killed-{i}.txt")}
        assert epochs == {line[0]: line[1:] for line in whole}  # as if nothing had happened, to the last bit
        resumed = lines(tmp_path / f"killed-{i}.txt")[done[i] :]
        assert 0 < len(resumed) < 5 and resumed[-1][0] == "4"


def test_two_replicas_stay_equal(tmp_path):
    worker = start("two_replicas.py", write_idx(tmp_path / "idx", train=400, size=(14, 14)), backend="tensorflow")
    try:
        output = worker.communicate(timeout=600)[0]
    finally:
        worker.kill()
    assert worker.returncode == 0, output[-3000:]
    found = json.loads(output.splitlines()[-1])
    assert "under MultiWorkerMirroredStrategy: on several machines train with Keras on JAX" in found["refused"]
    assert found["replicas"] == 2 and found["iterations"] == 22
    assert found["equal"] and found["sacred"]
    zeros = {name: sum(row.count(0) for row in gamma) for name, gamma in found["gammas"].items()}
    assert zeros == {"conv": 2, "dense": 12}  # half of 2 x 2 and of 8 x 3 blocks
    assert found["recovered"] < 1 and found["accuracy"] == found["alone"]


@pytest.mark.parametrize(
    "kind, arguments, sentence",
    [
        ("jax", {}, "'jax' needs Keras on jax, and it runs on tensorflow: start the program with KERAS_BACKEND=jax"),
        ("horovod", {}, "There is no distribution 'horovod': it is one of none, mirrored, jax"),
        ("mirrored", {"processes": 2}, "processes: only processes of the kind 'jax' find each other"),
    ],
)
def test_refusals(kind, arguments, sentence):
    with pytest.raises(ValueError, match=sentence), distribution.distributed(kind, **arguments):
        pass


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"coordinator": "a:1"}, "give all"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, r"process_id must be in \[0, 2\)"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "coordinator must be host:port, .* got 'a'"),
    ],
)
def test_processes_that_cannot_find_each_other(monkeypatch, arguments, sentence):
    monkeypatch.setattr(distribution.keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=sentence), distribution.distributed("jax", **arguments):
        pass


def test_one_device_is_one_shard():
    with distribution.distributed("none"):
        assert distribution.shard() == (0, 1) and distribution.is_chief() and distribution.replicas() == 1
    distribution.check_batch(7)
    distribution.check_equal(object(), "never")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), distribution.whole_file(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    with distribution.whole_file(tmp_path / "a.txt") as path:
        path.write_text("whole")
        assert not (tmp_path / "a.txt").exists()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]
