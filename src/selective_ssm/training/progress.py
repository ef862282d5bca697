"""How a run is going: one moving line in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0


class Unfailing:
    """A text stream that is left alone from its first failure on, as when nobody reads it any more.

    Args:
        stream: the stream; None, as the standard error of a process may be, is one that has failed.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or io.StringIO()
        self._failed = stream is None

    def write(self, text: str) -> int:
        if not self._failed:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # the latter where it is closed
                self._failed = True
        return len(text)

    def flush(self) -> None:
        if not self._failed:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Progress:
    """Shows step, loss, bits per byte, tokens a second and the time left, on the standard error while it lasts.

    Args:
        max_steps: how many steps the run has, where it is known.
        console: where to write.
    """

    def __init__(self, max_steps: int | None, console: Console | None = None) -> None:
        self._console = console or Console(file=cast(TextIO, Unfailing(sys.stderr)), soft_wrap=True)
        self._of = f"/{max_steps}" if max_steps else ""
        self._bar: Bar | None = None
        self._began = self._shown = time.monotonic()
        self._at_start = 0.0

    def start(self, progress: float) -> None:
        """Begin to show a run of which a share is behind already."""
        self._began = time.monotonic()
        self._shown = float("-inf")
        self._at_start = progress
        if self._console.is_terminal:
            self._bar = Bar(BarColumn(20), TextColumn("{task.description}"), console=self._console)
            self._bar.add_task("", total=1.0)
            self._bar.start()

    def show(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        """Show the figures of a step; a plain line only now and then, or when there is a new held-out figure."""
        line = f"step {step}{self._of} · {describe(figures)} · {self._left(progress)}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=progress, description=line)
            return
        due = time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES
        if due or progress >= 1 or "held_out_bits_per_byte" in figures:
            self._shown = time.monotonic()
            self._console.print(line, highlight=False, markup=False)

    def stop(self) -> None:
        """Leave the last line where it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, progress: float) -> str:
        done = progress - self._at_start
        if progress >= 1 or done <= 0:
            return "done" if progress >= 1 else "time left unknown"
        seconds = round((time.monotonic() - self._began) * (1 - progress) / done)
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}:{minutes:02d}:{seconds % 60:02d} left" if hours else f"{minutes}:{seconds % 60:02d} left"


def describe(figures: Mapping[str, float]) -> str:
    """The figures of a step in a few words.

    Example:
        >>> describe({"loss": 1.25, "bits_per_byte": 1.81, "tokens_per_second": 31234.5})
        'loss 1.250 · 1.81 bits/byte · 31,234 tokens/s'
    """
    parts = [
        f"loss {figures['loss']:.3f}",
        f"{figures['bits_per_byte']:.2f} bits/byte",
        f"{figures['tokens_per_second']:,.0f} tokens/s",
    ]
    if "held_out_bits_per_byte" in figures:
        parts.insert(2, f"held out {figures['held_out_bits_per_byte']:.3f}")
    return " · ".join(parts)
