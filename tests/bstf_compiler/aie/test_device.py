import pytest

from bstf_compiler.aie import device
from bstf_compiler.aie.device import DeviceSpec
from tests.bstf_compiler.aie.devices import entries


def test_meshes_of_the_package():
    assert {f"aie2_{n}x{n}" for n in range(1, 9)} | {"npu1", "npu2", "ve2302", "ve2802"} <= set(device.available())
    for n in range(1, 9):
        mesh = DeviceSpec.load(f"aie2_{n}x{n}")
        assert (mesh.columns, mesh.rows, mesh.memtiles) == (n, n, n)
        assert mesh.core.memory_bytes == 64 * 1024 and mesh.memtile.memory_bytes == 512 * 1024
        assert mesh.links.loadfm == 2**32 and mesh.clock_hz == 10**9


def test_a_device_by_path_and_as_it_is(tmp_path):
    text = (
        (device._FOLDER / "aie2.toml")
        .read_text()
        .replace('"aie2"', '"mine"')
        .replace("columns = 8", "columns = 2")
        .replace("rows = 8", "rows = 3")
    )
    (tmp_path / "mine.toml").write_text(text)
    mine = DeviceSpec.load(tmp_path / "mine.toml")
    assert (mine.name, mine.columns, mine.rows, mine.memtiles) == ("mine", 2, 3, 3)
    assert DeviceSpec.load(mine) is mine


def test_unknown_device_gets_a_hint():
    with pytest.raises(ValueError, match=r"unknown device 'aie3_4x4' \(did you mean 'aie2_"):
        DeviceSpec.load("aie3_4x4")
    with pytest.raises(ValueError, match=r"there is no device file 'mine.toml'; give the path of one"):
        DeviceSpec.load("mine.toml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clock_hz": None}, "lacks clock_hz"),
        ({"colour": 1}, "unknown entries: colour"),
        ({"columns": 0}, "columns = 0 must be a positive integer"),
        ({"rows": 2.5}, "rows = 2.5 must be a positive integer"),
        ({"core": {"memory_bytes": 1}}, "section core, lacks"),
        ({"core": 5}, "section core, must be a table"),
        ({"columns": True}, "columns = True must be a positive integer"),
        ({"name": 5}, "name = 5 must be a string"),
    ],
)
def test_bad_entries_are_named(change, words):
    changed = {name: value for name, value in (entries() | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        DeviceSpec.from_dict(changed, "device file 'x.toml'")


def test_a_file_that_is_no_toml(tmp_path):
    for content in (b"columns = = 2", b"\xff\xfe"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ValueError, match="not valid TOML"):
            DeviceSpec.load(tmp_path / "bad.toml")


def test_regions_and_dedicated_tiles_by_name():
    wide = DeviceSpec.load("aie2_8x2")
    assert (wide.name, wide.columns, wide.rows, wide.memtiles) == ("aie2_8x2", 8, 2, 8)
    split = DeviceSpec.load("aie2_4x4_waaw")
    assert (split.activation_tiles, split.weight_tiles) == ((1, 2), (0, 3))
    assert [split.weight_tile(row) for row in range(4)] == [(0, 0), (3, 0), (0, 1), (3, 1)]
    assert split.rate("LOADFM") == split.links.loadfm / 2  # two columns share a tile's link
    part = DeviceSpec.load("ve2802_6x8")
    assert part.noc_columns == (0, 1, 4, 5) and part.memtiles == 12  # columns 2 to 7, two memory tiles a column
    assert part.rate("LOADW") == part.links.loadw * 4 / 8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("npu1_5x4", "npu1 has 4 x 4"),
        ("aie2_0x1", "at least one"),
        ("aie2_2x2_aa", "at least one 'a'"),
        ("ve2302_0x2", "at least one"),
    ],
)
def test_regions_that_cannot_be(name, words):
    with pytest.raises(ValueError, match=words):
        DeviceSpec.load(name)


@pytest.mark.parametrize("name", device.available())
def test_links_together_never_pass_what_they_share(name):
    spec = DeviceSpec.load(name)
    for kind in ("LOAD", "LOADW", "WRITE"):
        total = spec.rate(kind) * spec.units(kind)
        cap = spec.ddr.write_rate if kind == "WRITE" else spec.ddr.read_rate
        assert total <= (cap or total) * (1 + 1e-12)
        if spec.noc_columns:
            assert total <= len(spec.noc_columns) * getattr(spec.links, kind.lower()) * (1 + 1e-12)


def test_entries_that_contradict_each_other_are_named():
    limits = {
        "channels": 3, "locks": 9, "count": 16, "parities": 1, "dimensions": 3, "length_words": 9, "wraps": [3],
        "step_words": 9, "iterations": 9,
    }  # fmt: skip
    few = limits | {"wraps": [3, 3], "parities": 2, "count": 7}
    for change, words in (
        ({"noc_columns": [2]}, "noc_columns holds 2"),
        ({"noc_columns": [1, 1]}, "twice"),
        ({"noc_columns": [-1]}, "list of integers"),
        ({"memtile": {"memory_bytes": 9, "roles": "aax"}}, "roles = 'aax'"),
        ({"descriptors": {"core": limits, "memtile": limits, "shim": limits}}, "has 1 wraps; 3 dimensions have 2"),
        ({"descriptors": {"core": few, "memtile": few, "shim": few}}, "core has count = 7; 3 channels .* need 8 or"),
    ):
        with pytest.raises(ValueError, match=words):
            DeviceSpec.from_dict(entries() | change, "device file 'x.toml'")
