"""BlockSparsity: makes a model sparser while it trains, along a schedule."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from bstf.importance import Importance, check_data
from bstf.importance import check as check_importance
from bstf.in_place import take_blocks
from bstf.objective import Loss
from bstf.places import Place, masked_places
from bstf.schedules import Schedule
from bstf.selection import check_scope, kept_blocks

UNITS = ("epoch", "step")


class BlockSparsity(keras.callbacks.Callback):
    """Zeroes blocks of a masked model during training, until the schedule's ratio.

    A dead block stays dead. When it dies its stored weights become zero, and so does what the optimizer
    remembers of them: momentum would move them on, a moving average would bring them back. The layers' outputs never
    depend on it. Two optimizers write under dead blocks again within an epoch, and are cleared at its end: Muon in
    the averages of `use_ema`, Adafactor in its estimate of squared gradients, which it makes from means of rows and
    columns anew at each step.

    All state is in the model and its optimizer (Γ and `optimizer.iterations`), none in the callback: training
    that goes on from `keras.callbacks.BackupAndRestore`, or from a saved and loaded model with
    `initial_epoch`, takes the same course as training in one piece.

    Each epoch's logs get "block_ratio", the fraction of zero blocks in the masked layers: it is in the
    history. A callback that keeps the best model (`ModelCheckpoint`, `EarlyStopping`) may keep one from
    before the ratio was reached: keep by the end of the schedule instead.

    Args:
        schedule: of `bstf.schedules`; its times are `unit`s.
        importance: how blocks are compared: a name or a callable, as in `bstf.sparsify`.
        scope: which blocks compete with each other, as in `bstf.sparsify`.
        min_per_line: kept blocks that every row and column of Γ needs at least. Where the blocks that are
            left can't have both this and the ratio, the layer keeps more blocks.
        data: what criteria that need data look at, each time that blocks go, as in `bstf.sparsify`; it must be
            readable more than once.
        loss: what they derive, as in `bstf.sparsify`; None for the one the model is compiled with.
        seed: of the random vectors of "hessian".
        unit: "epoch": the ratio changes at the beginning of epochs, counted from 0 by `fit`; "step": before
            training steps, counted by `optimizer.iterations` (which counts updates of the weights).

    Raises:
        ValueError: an argument isn't one of those above.
        TypeError: `schedule` isn't a Schedule.

    Example:
        >>> sparse = bstf.sparsify(model, ratio=0)
        >>> sparse.compile("adam", "sparse_categorical_crossentropy")
        >>> sparse.fit(x, y, epochs=20, callbacks=[bstf.callbacks.BlockSparsity(Cubic(0.5, end=10))])

        In a loop of one's own, before each update:

        >>> sparsity = bstf.callbacks.BlockSparsity(Cubic(0.5, end=1000, every=100), unit="step")
        >>> for step, (x, y) in enumerate(batches):
        ...     sparsity.step(step, model, optimizer)
        ...     ...
    """

    def __init__(
        self,
        schedule: Schedule,
        importance: str | Importance = "l2",
        scope: str = "layer",
        min_per_line: int = 1,
        unit: str = "epoch",
        data: Any = None,
        loss: Loss = None,
        seed: int = 0,
    ):
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be one of bstf.schedules, such as OneShot(0.5); got {schedule!r}.")
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}; got {unit!r}.")
        kept_blocks(1, 1, schedule.ratio, min_per_line)  # checks min_per_line
        check_importance(importance)
        check_data(importance, data)
        if isinstance(data, Iterator):
            raise ValueError("data is an iterator, which can be read once only: give arrays or a dataset.")
        self.schedule = schedule
        self.importance = importance
        self.scope = check_scope(scope)
        self.min_per_line = min_per_line
        self.unit = unit
        self.data = data
        self.loss = loss
        self.seed = seed

    def step(self, time: int, model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None) -> None:
        """Brings a model to the schedule's ratio of a time; for loops without `fit`.

        Args:
            time: epochs or training steps since the beginning, as the schedule counts.
            model: with masked layers, from `bstf.sparsify` or `bstf.sparsify_layers`.
            optimizer: the one that trains it, where it has taken a step already.

        Raises:
            ValueError: the model has no masked layer, or a layer's scores aren't finite.
        """
        masked = masked_places(model)
        sizes = {path: math.prod(layer.gamma.shape) for path, layer in masked if layer.built}
        if self.scope == "global":
            ratio = self.schedule(time, sum(sizes.values()))
        else:
            ratio = {path: self.schedule(time, size) for path, size in sizes.items()}
        how = {"importance": self.importance, "scope": self.scope, "min_per_line": self.min_per_line}
        take_blocks(model, masked, ratio, optimizer, **how, data=self.data, loss=self.loss, seed=self.seed)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refuses a model without masked layers before it trains in vain."""
        masked_places(self.model)
        self._last_epoch: int | None = None
        self._due: int | None = None
        self._first = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Takes the schedule's step if it counts in epochs."""
        if self.unit == "epoch":
            self._due = epoch
            self._step_if_built()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Takes the schedule's step if it counts in training steps."""
        if self.unit == "step":
            self._due = self._updates()
        if self._due is not None:
            self._step_if_built()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Clears what an optimizer that was built in the first step begins with: Adagrad's sums are 0.1."""
        if self._first and keras.backend.backend() != "jax":  # which has the variables elsewhere between steps
            self._clear()
        self._first = False

    def _updates(self) -> int:
        # int() alone can't read a variable that has a copy on each of several devices.
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def _step_if_built(self) -> None:
        """A subclassed model may get its weights in its first step of training only; the next one is in time then."""
        model = self.model
        if all(layer.built for _, layer in masked_places(model)):
            self.step(self._due, model, model.optimizer)
            self._due = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Logs the ratio."""
        self._last_epoch = epoch
        masked = self._clear()
        if logs is not None:
            gammas = [ops.convert_to_numpy(layer.gamma).ravel() for _, layer in masked]
            logs["block_ratio"] = 1 - float(np.concatenate(gammas).mean())

    def _clear(self) -> list[Place]:
        """Zeroes what an optimizer has moved under Γ behind the layers' backs; returns the masked layers.

        Muon moves weights without gradients, and Keras averages weights (`use_ema`) before constraints act; Ftrl
        divides zero by zero, and compiled steps on JAX don't know Γ (`MaskedKernel._knows_gamma`).
        """
        model = self.model
        masked = [place for place in masked_places(model) if place.layer.built]
        for _, layer in masked:
            layer.set_gamma(ops.convert_to_numpy(layer.gamma), model.optimizer)
        return masked

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Warns of a schedule that is longer than the training."""
        masked = self._clear()  # Keras has just put the averages of `use_ema` in place of the weights
        if self._last_epoch is None:
            return  # resumed after the last epoch
        time = self._last_epoch if self.unit == "epoch" else self._updates() - 1
        blocks = max(math.prod(layer.gamma.shape) for _, layer in masked)
        reached = self.schedule(time, blocks)
        if reached < self.schedule.ratio:
            warnings.warn(
                f"The training ended after {self.unit} {time}, where the schedule is at ratio {reached:.3g} "
                f"of {self.schedule.ratio}: train longer, or shorten the schedule.",
                stacklevel=2,
            )
