"""Memory for the activations of an inference, and the call of the compiled kernels that runs its steps."""

from __future__ import annotations

import numpy as np

from bstf_compiler.cpu import access, team
from bstf_compiler.cpu.kernels.conv import DEPTH
from bstf_compiler.cpu.kernels.network import executor
from bstf_compiler.cpu.layout import ALIGNMENT, Format
from bstf_compiler.cpu.plan import Plan, Weights
from bstf_compiler.cpu.simd import Isa
from bstf_compiler.cpu.tiles import empty

# Elements that a vector may be read beyond the last plane.
_SLACK = 4096


def memory_of(plan: Plan, format: Format) -> np.ndarray:
    """Room for all activations of a plan and for what vectors read beyond them."""
    elements = plan.elements + _SLACK + DEPTH * int(plan.steps["x_plane"].max())
    return empty(ALIGNMENT + elements, format.dtype)[ALIGNMENT:]  # tiles may begin left of an image


def run(
    plan: Plan,
    weights: Weights,
    images: np.ndarray,
    memory: np.ndarray,
    threads: int,
    format: Format,
    isa: Isa,
) -> np.ndarray:
    """Runs the steps of a plan; returns the nanoseconds that each took, (steps,).

    Args:
        plan: of a number of images.
        weights: of its operations.
        images: flat float32 (NHWC), those of one input after another's.
        memory: of the activations, as `memory_of` makes it.
        threads: that share out the tasks.
        format: of the activations.
        isa: what the kernels are compiled for.
    """
    ends = np.zeros(len(plan.steps), np.int64)
    start = access.nanoseconds()
    team.run(
        executor(isa, format), threads,
        plan.steps, images, memory, weights.values, plan.offsets, weights.starts, weights.biases,
        plan.masks, np.zeros((threads + 1) * len(plan.steps), np.int64), ends,
    )  # fmt: skip
    return np.diff(np.maximum.accumulate(np.concatenate([[start], ends])))  # steps without tasks end with those before
