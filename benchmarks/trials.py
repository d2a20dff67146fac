"""The trials of the accuracy studies: which networks are made sparse in which ways."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# How the name of a trial says who teaches.
_TEACHERS = {"none": [], "start": ["distilled"], "trained": ["distilled from trained"]}


@dataclass(frozen=True)
class Trial:
    """One way to make a network sparse.

    Attributes:
        block: the block's shape, (input channels, output channels).
        ratio: of zero blocks; 0 is the dense network.
        importance: how blocks are compared.
        scope: which blocks compete.
        schedule: "one-shot" before the training; "cubic" over its first half; "steps" as in the paper.
        recovery: before the training: "none", "batch_norm", "obs", or "obs+batch_norm".
        teacher: "none"; "start": the dense network that all trials begin with; "trained": what its own trial of as many
            epochs made of it.
        permute: whether channels are put in another order first.
        epochs: of the training, which may be 0.
        seed: of the order of the images and of their augmentation.
    """

    block: tuple[int, int] = (8, 8)
    ratio: float = 0.5
    importance: str = "l2"
    scope: str = "layer"
    schedule: str = "one-shot"
    recovery: str = "none"
    teacher: str = "none"
    permute: bool = False
    epochs: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """What tells it from others, its seed aside."""
        if not self.ratio:
            return f"dense, {self.epochs} epochs"
        words = [f"{self.block[0]}x{self.block[1]}", f"{self.ratio:.0%}", self.importance]
        words += [self.scope] * (self.scope != "layer") + [self.schedule] * (self.schedule != "one-shot")
        words += [self.recovery] * (self.recovery != "none") + _TEACHERS[self.teacher]
        words += ["permuted"] * self.permute
        return " ".join(words) + f", {self.epochs} epochs"

    @property
    def dense(self) -> Trial:
        """What it is compared with."""
        return Trial(ratio=0, epochs=self.epochs, seed=self.seed)


def file_name(trial: str, seed: int) -> str:
    """The name of what a trial leaves, from those fields of its record that tell it from all others."""
    return re.sub(r"\W+", "-", f"{trial} {seed}")


# The paper's schedule takes 5 % of the blocks every two epochs: so many make half of them.
_STEPS_EPOCHS = 19


def _best(block: tuple[int, int], ratio: float, epochs: int) -> Trial:
    """What the studies below found to lose least.

    Single weights are the same in any order of channels, and `obs` makes more of those that l2 keeps over all layers.
    They lose so little that a teacher who hasn't trained as long as the network they are compared with holds them back.
    """
    if block == (1, 1):
        return Trial(block, ratio, "l2", "global", recovery="obs", teacher="trained", epochs=epochs)
    return Trial(block, ratio, "fisher", recovery="obs", teacher="start", permute=True, epochs=epochs)


def _headline(epochs: int) -> list[Trial]:
    return [Trial(ratio=0, epochs=epochs), _best((8, 8), 0.5, epochs)]


def _unstructured(epochs: int) -> list[Trial]:
    return [Trial(ratio=0, epochs=epochs), _best((1, 1), 0.5, epochs)]


def _blocks(epochs: int) -> list[Trial]:
    shapes, ratios = ((8, 8), (1, 1), (16, 4), (4, 16)), (0.25, 0.5, 0.75)
    return [Trial(ratio=0, epochs=epochs)] + [_best(block, ratio, epochs) for block in shapes for ratio in ratios]


def _importance(epochs: int) -> list[Trial]:
    names = ("l1", "l2", "variance", "tensor_variance", "wanda", "taylor", "fisher", "hessian")
    return [Trial(importance=name, epochs=epochs, recovery="obs") for name in names]


def _scopes(epochs: int) -> list[Trial]:
    scopes = ("layer", "column", "row", "global")
    return [Trial(importance="fisher", scope=scope, epochs=epochs, recovery="obs", teacher="start") for scope in scopes]


def _schedules(epochs: int) -> list[Trial]:
    names = ("one-shot", "cubic", "steps") if epochs >= _STEPS_EPOCHS else ("one-shot", "cubic")
    return [Trial(schedule=name, epochs=epochs) for name in names]


def _recovery(epochs: int) -> list[Trial]:
    return [
        Trial(ratio=0, epochs=epochs),
        *(Trial(recovery=name, epochs=epochs) for name in ("none", "batch_norm", "obs")),
        Trial(teacher="start", epochs=epochs),
        Trial(permute=True, epochs=epochs),
        Trial(recovery="obs", teacher="start", epochs=epochs),
    ]


def _teachers(epochs: int) -> list[Trial]:
    single = _best((1, 1), 0.5, epochs)
    return [single.dense, *(replace(single, teacher=name) for name in _TEACHERS)]


def _calibration(epochs: int) -> list[Trial]:
    ways = ("none", "batch_norm", "obs", "obs+batch_norm")
    ratios = (0.25, 0.5, 0.75)
    return [
        Trial(ratio=0),
        *(Trial(ratio=ratio, recovery=way) for ratio in ratios for way in ways),
        *(Trial(ratio=ratio, recovery="obs", permute=True) for ratio in ratios),
    ]


# Each gives its trials from --epochs.
STUDIES = {
    "headline": _headline,  # dense, and 8x8 at 50 %
    "unstructured": _unstructured,  # dense, and 1x1 at 50 %
    "blocks": _blocks,  # shapes and ratios
    "importance": _importance,
    "scopes": _scopes,
    "schedules": _schedules,
    "recovery": _recovery,
    "teachers": _teachers,  # of 1x1 at 50 %
    "calibration": _calibration,  # no training at all: images without labels
}
