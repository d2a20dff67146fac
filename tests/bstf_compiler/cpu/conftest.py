"""What several tests of the CPU back end share."""

import pytest

from bstf_compiler.cpu import calibration
from bstf_compiler.cpu.kernels.winograd import Costs

COSTS = Costs(weight=1e-10, product=1.2e-10, tiled_weight=1e-10, tiled_product=2.2e-10, transform=4.5e-9)


@pytest.fixture(scope="module")
def known_machine(tmp_path_factory):
    """A machine of known costs: how an engine convolves doesn't follow from who else uses this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(calibration, "_known", {})
        patch.setattr(calibration, "measure", lambda isa, threads: COSTS)
        yield
