"""Full disks, places where nobody may write, killed writers: a sentence, and the old output or the new, whole."""

import dataclasses
import errno
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import bstf
import bstf_compiler
from benchmarks.records import Records
from bstf import distribution, files
from bstf.checkpoints import save_weights
from bstf.files import CantWriteError, is_leftover, make_folder, replacing
from bstf_compiler.graph import Window
from tests.bstf_compiler.networks import Builder


def graph():
    build = Builder(np.random.default_rng(0))
    return build.finish(build.conv(build.input(6, 6, 8), 64, Window((3, 3))))


def model():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((8, 8, 8)), keras.layers.Conv2D(64, 3), keras.layers.Flatten()])


def writers():
    """What writes, by name: the size of a disk in KiB on which it fails, and a function of the place."""
    program, engine = bstf_compiler.compile(graph(), "aie2_1x1"), bstf_compiler.Engine(graph())
    report = bstf.report(model())
    long = dataclasses.replace(report, layers=report.layers * 200)
    return {
        "Program.write": (32, program.write),
        "Engine.save": (4, engine.save),
        "export": (32, lambda place: bstf.export(model(), place)),
        "to_csv": (8, long.to_csv),
        "save_weights": (16, lambda place: save_weights(model(), place.with_suffix(".weights.h5"))),
        "save": (16, _save),
    }


def _save(place):
    with distribution.whole_file(place.with_suffix(".keras")) as partial:
        model().save(partial)


NAMES = ("Program.write", "Engine.save", "export", "to_csv", "save_weights", "save")


@pytest.fixture(scope="module")
def known():
    return writers()


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(name, known, disk):
    kib, write = known[name]
    place = disk(kib)
    with pytest.raises(OSError, match="Can't write .*: no space left on device; make room there") as caught:
        write(place / "output")
    assert type(caught.value).__name__ == "CantWriteError" and caught.value.errno == errno.ENOSPC
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_to_read_only_is_a_sentence(name, known, disk):
    with pytest.raises(OSError, match="Can't write .*: read-only file system; name another place"):
        known[name][1](disk(1024, "ro") / "output")


@pytest.fixture
def closed():
    """A folder and a file in it that may be read only, in a folder where all may write; the user isn't a superuser."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o777)
        (place := Path(made) / "folder").mkdir()
        (place / "file").write_text("old")
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        else:
            (place / "file").chmod(0o444)
            place.chmod(0o555)
        try:
            yield place
        finally:
            os.seteuid(user)
            place.chmod(0o755)


@pytest.mark.parametrize("name", ["folder", "folder/file", "folder/new"])
def test_what_may_not_be_written_to_is_a_sentence_and_stays(name, closed):
    with (
        pytest.raises(CantWriteError, match=f"Can't write .*{name}: permission denied; name another place."),
        replacing(closed.parent / name) as temporary,
    ):
        temporary.write_text("new")
    assert [path.name for path in closed.parent.rglob("*")] == ["folder", "file"]
    assert (closed / "file").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_a_sentence(closed):
    make_folder(closed)
    for name, reason in (
        ("new/inner", "permission denied"),
        ("file/inner", "not a directory"),
        ("file", "file exists"),
    ):
        with pytest.raises(CantWriteError, match=f"Can't write .*{name}: {reason}; name another place."):
            make_folder(closed / name)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside(tmp_path):
    place = tmp_path / "file"
    place.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(place) as temporary:
        temporary.write_text("new")
        1 / 0  # noqa: B018
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and place.read_text() == "old"
    with replacing(place) as temporary:
        temporary.write_text("new")
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and place.read_text() == "new"


def test_a_device_is_written_to_as_it_is():
    with replacing("/dev/null") as temporary:
        temporary.write_text("gone")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, swaps):
    if not swaps:  # a system without an exchange of names
        monkeypatch.setattr("bstf.files._exchange", lambda *_: False)
    for name in ("one", "two"):
        with replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [one.name for one in tmp_path.rglob("*")] == ["folder", "two"]


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    dead = tmp_path / ".file.abc.partial"
    dead.mkdir()
    with replacing(tmp_path / "file") as one:
        assert not dead.exists() and is_leftover(one.parent)
        with replacing(tmp_path / "file") as other:
            other.write_text("other")
        assert one.parent.exists()
        one.write_text("one")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "one"


WRITER = """
import itertools, runpy, sys
from pathlib import Path
replacing = runpy.run_path(sys.argv[2])["replacing"]  # alone it starts at once
place = Path(sys.argv[1])
for version in itertools.count():
    with replacing(place / "folder") as temporary:
        temporary.mkdir()
        for name in range(8):
            (temporary / str(name)).write_text(str(version) * 1000)
    with replacing(place / "file") as temporary:
        temporary.write_text(str(version) * 100_000)
    print(version, flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_files(tmp_path):
    rng = random.Random(0)
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), files.__file__], stdout=subprocess.PIPE)
        for _ in range(rng.randrange(1, 4)):
            writer.stdout.readline()
        time.sleep(rng.random() * 0.02)
        writer.kill()
        writer.wait()
        writer.stdout.close()
        texts = {path.read_text() for path in (tmp_path / "folder").iterdir()}
        assert len(texts) == 1 and len(list((tmp_path / "folder").iterdir())) == 8
        assert len(texts.pop()) % 1000 == 0 and len((tmp_path / "file").read_text()) % 100_000 == 0
        assert sum(map(is_leftover, tmp_path.iterdir())) <= 2  # one of each; the next writer removes them


def test_records_lose_a_line_that_was_cut_short_and_no_other(tmp_path):
    path = tmp_path / "runs" / "records.jsonl"
    records = Records(path)
    records.add({"sizes": (1, 2)})
    records.add({"inner": {"a": {}}})
    whole = path.read_bytes()
    for size in range(len(whole) - 2, len(whole)):  # what is left may end as a line does
        path.write_bytes(whole[:size])
        assert Records(path) == [{"sizes": [1, 2]}] == records[:1]
        assert path.read_bytes() == whole[: whole.index(b"\n") + 1]
