import numpy as np
import pytest

import bstf_compiler
from bstf_compiler.graph import Window
from tests.bstf_compiler.networks import Builder


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (lambda build, x: build.conv(x, 8, Window((1, 1)), groups=2), "a convolution in 2 groups"),
        (lambda build, x: build.conv(x, 8, Window((2, 2), dilation=(1, 2))), "a dilated convolution"),
        (lambda build, x: build.concat(x, x, position=4), "operation 'concat'"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_what_the_array_lacks_is_refused_by_name(add, words, last):
    build = Builder(np.random.default_rng(0))
    before = build.conv(build.input(4, 4, 8), 8, Window((1, 1)))
    name = add(build, before)
    graph = build.finish(name if last else build.requantize(name))
    with pytest.raises(ValueError, match=f"layer '{name}': {words} can't run on the array; end the network before it"):
        bstf_compiler.compile(graph, "aie2_2x2")
