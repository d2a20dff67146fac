"""What a training says while it goes on: a bar on a terminal, a line an epoch for whoever reads on."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class EpochLog(keras.callbacks.Callback):
    """Shows a bar of the epoch's batches on standard error if that is a terminal, and prints a line an epoch.

    Args:
        name: of what is trained.
        lines: whether to print the lines.
        bar: whether to show the bar.

    Example:
        >>> with EpochLog("dense") as log:
        ...     model.fit(x, y, epochs=5, verbose=0, callbacks=[log])
    """

    def __init__(self, name: str, lines: bool = True, bar: bool = True) -> None:
        super().__init__()
        self._name, self._lines, self._began = name, lines, 0.0
        terminal = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=terminal,
            transient=True,
            disable=not (bar and terminal.is_terminal),
            redirect_stdout=sys.stdout.isatty(),  # lines stay out of a bar beside them, and go where a pipe leads
        )
        self._task = self._progress.add_task(name)

    def __enter__(self) -> EpochLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Begins the bar anew."""
        self._began = time.monotonic()
        about = f"{self._name}, epoch {epoch + 1} of {self.params['epochs']}"
        self._progress.reset(self._task, total=self.params["steps"], description=about)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=batch + 1)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Prints the line: every metric, and the seconds that the epoch took."""
        if self._lines:
            metrics = "".join(f"  {name}: {float(value):.4f}" for name, value in (logs or {}).items())
            took = time.monotonic() - self._began
            print(f"Epoch {epoch + 1}/{self.params['epochs']}{metrics}  ({took:.1f} s)", flush=True)
