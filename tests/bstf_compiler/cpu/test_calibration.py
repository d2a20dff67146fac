"""Costs of convolutions: measured once, kept, read again, and fitted to times."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bstf_compiler.cpu import calibration
from bstf_compiler.cpu.kernels import winograd
from bstf_compiler.cpu.kernels.winograd import Costs
from bstf_compiler.cpu.simd import host_isa

COSTS = Costs(0.0, 1.0, 2.0, 0.5, 40.0)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine nobody has measured: the results of the measurements to come, and those that were made."""
    made, isa = [], host_isa()

    def measure(isa, threads):
        made.append(replace(COSTS, transform=40.0 + len(made)))
        return made[-1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "measure", measure)

    def costs(new_process=False, **arguments):
        if new_process:
            calibration._known.clear()
        return calibration.costs(isa, **arguments)

    return costs, made


def test_a_machine_is_measured_once_and_again_if_asked(machine):
    costs, made = machine
    assert costs() == costs() == costs(new_process=True) == COSTS and len(made) == 1
    (name,) = json.loads(calibration.cache_file().read_text())
    assert host_isa().name in name.split("/")
    assert costs(recalibrate=True) == made[1] != COSTS
    assert costs() == costs(new_process=True) == made[1] and len(made) == 2
    assert [path.name for path in calibration.cache_file().parent.iterdir()] == ["convolutions.json"]


def test_other_machines_and_versions_keep_theirs(machine, monkeypatch):
    costs, made = machine
    costs()
    monkeypatch.setattr(calibration, "_version", lambda: "other")
    assert costs(new_process=True) == made[1]
    assert len(json.loads(calibration.cache_file().read_text())) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-9],
        lambda text: "[1]",
        lambda text: "{}",
        lambda text: text.replace("product", "produce"),
        lambda text: text.replace("0.5", "-0.5"),
        lambda text: text.replace("40.0", "NaN"),
        lambda text: text.replace("40.0", "0.0"),
        lambda text: text.replace("40.0", '"many"'),
        lambda text: text.replace("40.0", "null"),
    ],
)
def test_damaged_measurements_are_made_again(machine, change):
    costs, made = machine
    costs()
    path = calibration.cache_file()
    path.write_text(change(path.read_text()))
    assert costs(new_process=True) == made[1]
    assert costs(new_process=True) == made[1] and len(made) == 2


def test_a_machine_without_a_place_to_keep_them_is_measured_by_every_process(machine, tmp_path, monkeypatch):
    costs, made = machine
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert costs() == costs() == made[0]
    assert costs(new_process=True) == made[1]


def test_costs_are_those_behind_the_times():
    known = np.array([3e-9, 2e-10, 5e-9])
    work = [
        winograd.work(kept, 2 * side, (side, side), host_isa())[1] for kept, side in ((100, 9), (4000, 20), (9, 50))
    ]
    np.testing.assert_allclose(calibration._fit([(one, np.dot(one, known)) for one in work]), known, rtol=1e-6)
    slower = calibration._fit([(one[:2], 1.0) for one in work])  # no costs fit: none is negative
    assert min(slower) >= 0


def test_cheap_transforms_make_winograd_pay():
    class Weights:
        macs, shape = 9 * 64 * 64, (3, 3, 64, 64)

    assert replace(COSTS, transform=1.0).pays(Weights, (28, 28), host_isa())
    assert not replace(COSTS, transform=1e4).pays(Weights, (28, 28), host_isa())
    assert not replace(COSTS, tiled_product=10.0).pays(Weights, (28, 28), host_isa())
