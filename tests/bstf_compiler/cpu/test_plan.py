import numpy as np
import pytest

from bstf_compiler.cpu.kernels.step import FROM_TILES, TO_TILES
from bstf_compiler.cpu.kernels.winograd import UNIT
from bstf_compiler.cpu.layout import FLOATS, round_up
from bstf_compiler.cpu.operations import operations
from bstf_compiler.cpu.plan import Weights, make_plan
from bstf_compiler.cpu.simd import ISAS, host_isa
from bstf_compiler.graph import MaxPool, Product, Window
from tests.bstf_compiler.cpu.network import Network


@pytest.mark.parametrize("width", range(1, 40))
def test_images_that_start_anywhere_have_room_for_whole_vectors(width):
    network = Network((3, width, 8))
    pixel = network.add(MaxPool(Window((3, width))), ["x"], lambda x: x.max((1, 2), keepdims=True))
    network.add(Product(), ["x", pixel], lambda a, b: a * b, name="y")
    made, shapes = (
        operations(network.graph, host_isa(), lambda *_: False),
        {"x": (3, width, 8), pixel: (1, 1, 8), "y": (3, width, 8)},
    )
    plan = make_plan(made, shapes, ["y"], Weights.of(made, FLOATS), 3, 1, FLOATS, host_isa())
    (step,) = plan.steps[plan.steps["other_image"] > 0]
    first, lanes = 2 * step["y_rows"] * step["y_pitch"], FLOATS.lanes(host_isa())
    assert step["lead"] + first + round_up(step["length"] - first, lanes) <= step["y_plane"]


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
@pytest.mark.parametrize("width", range(1, 40))
def test_images_of_tiles_have_room_for_whole_vectors(width, isa):
    network = Network((6, width + 2, 8))
    network.conv("x", np.ones((3, 3, 8, 8), np.float32), np.zeros(8, np.float32))
    made = operations(network.graph, isa, lambda *_: True)
    shapes = {name: tensor.shape[1:] for name, tensor in network.graph.tensors.items() if len(tensor.shape) == 4}
    steps = make_plan(made, shapes, ["n0"], Weights.of(made, FLOATS), 3, 1, FLOATS, isa).steps
    lanes = FLOATS.lanes(isa)
    for kind, first in ((TO_TILES, lambda columns: round_up(columns, UNIT) - UNIT), (FROM_TILES, lambda columns: 0)):
        (step,) = steps[steps["kind"] == kind]
        row = step["lead"] + (2 * step["y_rows"] + step["y_height"] - 1) * step["y_pitch"]
        begins = first(step["y_width"])
        assert row + begins + round_up(step["y_width"] - begins, lanes) <= step["y_plane"]
        assert kind == FROM_TILES or step["y_pitch"] == step["y_width"]
