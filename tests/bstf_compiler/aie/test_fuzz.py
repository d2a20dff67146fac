"""Random networks on random devices: compiled, proved and simulated bit for bit, or refused in a sentence.

    python -m tests.bstf_compiler.aie.test_fuzz FIRST LAST

runs other seeds and counts how they ended.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler import integer
from bstf_compiler.aie.device import DeviceSpec
from tests.bstf_compiler.aie.devices import LINKS, entries
from tests.bstf_compiler.networks import network_of_everything, random_images, random_network

COUNT, BATCH = 200, 20


def random_device(rng: np.random.Generator) -> DeviceSpec:
    """A mesh up to 5 x 5 with memories from tiny to real ones, dedicated tiles or not, links of any rates."""
    columns, rows = (int(rng.integers(1, 6)) for _ in range(2))
    core, memtile = int(rng.choice([2048, 4096, 9000, 65536])), int(rng.choice([1024, 2048, 6000, 20000, 524288]))
    spec = entries(columns, rows, core, memtile)
    spec["links"] = {name: int(rng.integers(10**8, 10**10)) for name in LINKS}
    if rng.random() < 0.3:
        tiles = max(columns, rows) + 1
        spec["memtile"]["roles"] = "aw" + "".join(rng.choice(["a", "w"], tiles - 2)) if tiles > 2 else "aw"
    elif rng.random() < 0.3:
        spec["memtile"]["rows"] = int(rng.integers(1, 3))
    if rng.random() < 0.3:
        spec["noc_columns"] = sorted(map(int, rng.choice(columns, int(rng.integers(1, columns + 1)), replace=False)))
    if rng.random() < 0.3:
        spec["ddr"] |= {"read_rate": 10**9, "write_rate": 10**9}
    return DeviceSpec.from_dict(spec, "random device")


def outcome(seed: int) -> str:
    """How a seed's network and device end: "exact", "refused", or what is wrong."""
    rng = np.random.default_rng(seed)
    graph = (random_network, network_of_everything)[seed % 2](seed)
    try:
        program = bstf_compiler.compile(graph, random_device(rng))
    except ValueError as refusal:
        sentence = str(refusal)
        return "refused" if "layer '" in sentence and "use" in sentence else f"no sentence: {sentence}"
    if violations := program.verify():
        return violations[0]
    images = random_images(seed, graph)
    pairs = [program.simulate(images, seed), integer.run(graph, images)]
    one, two = (value if isinstance(value, list) else [value] for value in pairs)
    if not all(np.array_equal(a, b) for a, b in zip(one, two, strict=True)):
        return "differs from the integer reference"
    times = program.estimate()
    return "exact" if times.lower_bound_seconds <= times.total_seconds * (1 + 1e-9) else "faster than its bound"


@pytest.mark.parametrize("first", range(0, COUNT, BATCH))
def test_random_networks_on_random_devices(first):
    found = {seed: outcome(seed) for seed in range(first, first + BATCH)}
    assert set(found.values()) <= {"exact", "refused"}, found
    assert list(found.values()).count("exact") >= BATCH // 4


if __name__ == "__main__":
    counts = Counter()
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            how = outcome(number)
        except Exception as error:
            how = f"{type(error).__name__}: {error}"
        counts[how if how in ("exact", "refused") else "wrong"] += 1
        if how not in ("exact", "refused"):
            print(number, how)
    print(dict(counts))
