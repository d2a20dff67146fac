"""Checkpoints of a training that may be killed at any time."""

import math
import os
import re
from pathlib import Path
from typing import Any

import keras

from bstf import distribution
from bstf.files import make_folder

_ROOM = 2**12  # bytes that HDF5 needs beside the values of an array, at most
_NAME = re.compile(r"epoch-(\d+)\.weights\.h5")


def save_weights(model: keras.Model, path: Path) -> None:
    """Writes the weights of a model, and of its optimizer if it has one, to a file that appears when it is complete.

    HDF5 ends the process when a disk is full; so the room is taken before.

    Args:
        model: a built model.
        path: of the file, which must end in `.weights.h5`. Several processes write one file.

    Raises:
        OSError: it can't be written.

    Example:
        >>> save_weights(model, Path("run/last.weights.h5"))
    """
    optimizer = getattr(model, "optimizer", None)  # none before it is compiled
    variables = [*model.variables, *(optimizer.variables if optimizer else ())]
    needed = sum(_ROOM + 8 * math.prod(one.shape) for one in variables)  # of any type
    with distribution.whole_file(path) as partial:
        if hasattr(os, "posix_fallocate"):
            with partial.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, needed + _ROOM)
        model.save_weights(partial)


class Checkpoint(keras.callbacks.Callback):
    """Saves what a training needs to go on, after each epoch: weights, Γ, batch statistics, optimizer.

    There is one file, named after the epochs that are done; it appears when it is complete, then the one before
    goes. So a kill at any time leaves a usable state, which `keras.callbacks.BackupAndRestore`, with its two
    files that belong together, doesn't promise. Several processes share the folder.

    Args:
        folder: of this training alone; it is made with the first file.

    Example:
        >>> checkpoint = Checkpoint("run/checkpoint")
        >>> first = checkpoint.restore(model)  # compiled; 0 at the first start
        >>> model.fit(x, y, epochs=20, initial_epoch=first, callbacks=[checkpoint])
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__()
        self.folder = Path(folder)

    def done(self) -> int:
        """How many epochs the last file is after; 0 if there is none."""
        return max(self._files(), default=0)

    def restore(self, model: keras.Model) -> int:
        """Brings a compiled model to the state of the last file.

        Args:
            model: built and compiled as the one that was saved.

        Returns:
            The number of epochs done, for `initial_epoch`; 0 and an unchanged model if there is no file.

        Raises:
            ValueError: the file is of another model, or the processes see different files.
        """
        done = self.done()
        distribution.check_equal(
            done, f"The processes see different checkpoints in '{self.folder}': it must be a folder that all share."
        )
        if done:
            model.optimizer.build(model.trainable_variables)
            try:
                model.load_weights(self._files()[done])
            except (KeyError, ValueError, OSError) as error:
                raise ValueError(
                    f"The checkpoint '{self._files()[done]}' isn't one of '{model.name}' and its optimizer: remove it, "
                    "and the training starts from the beginning."
                ) from error
        return done

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Gives what is random in layers (dropout) numbers of this epoch: files of weights don't hold its state."""
        states = [v for v in self.model.non_trainable_variables if v.path.endswith("/seed_generator_state")]
        for index, state in enumerate(states):
            state.assign([index, epoch << 16])

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the file of this epoch, and removes earlier ones."""
        make_folder(self.folder)
        complete = self.folder / f"epoch-{epoch + 1:04}.weights.h5"
        save_weights(self.model, complete)
        if distribution.is_chief():
            for path in self._files().values():
                if path != complete:
                    path.unlink()

    def _files(self) -> dict[int, Path]:
        """The files by the number of epochs they are after."""
        found = {path: _NAME.fullmatch(path.name) for path in self.folder.glob("*.weights.h5")}
        return {int(match[1]): path for path, match in found.items() if match}
