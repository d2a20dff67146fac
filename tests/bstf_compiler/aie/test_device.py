import pytest

from bstf_compiler.aie import device
from bstf_compiler.aie.device import DeviceSpec
from tests.bstf_compiler.aie.devices import entries


def test_meshes_of_the_package():
    assert [f"aie2_{n}x{n}" for n in range(1, 9)] == device.available()
    for n in range(1, 9):
        mesh = DeviceSpec.load(f"aie2_{n}x{n}")
        assert (mesh.columns, mesh.rows, mesh.memtiles) == (n, n, n)
        assert mesh.core.memory_bytes == 64 * 1024 and mesh.memtile.memory_bytes == 512 * 1024
        assert mesh.links.loadfm == 2**32 and mesh.clock_hz == 10**9


def test_a_device_by_path_and_as_it_is(tmp_path):
    text = (
        (device._FOLDER / "aie2_2x2.toml").read_text().replace('"aie2_2x2"', '"mine"').replace("rows = 2", "rows = 3")
    )
    (tmp_path / "mine.toml").write_text(text)
    mine = DeviceSpec.load(tmp_path / "mine.toml")
    assert (mine.name, mine.columns, mine.rows, mine.memtiles) == ("mine", 2, 3, 3)
    assert DeviceSpec.load(mine) is mine


def test_unknown_device_gets_a_hint():
    with pytest.raises(ValueError, match=r"unknown device 'aie2_4x5' \(did you mean 'aie2_"):
        DeviceSpec.load("aie2_4x5")


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
