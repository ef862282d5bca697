"""Asking for an end: SIGTERM and Ctrl-C are noted, and acted on between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopSignals:
    """While active, keeps the first SIGTERM or SIGINT in ``received`` in place of what it would have done.

    A second Ctrl-C interrupts at once, for a person who does not want to wait for the step to end. Outside the main
    thread, where Python allows no handlers, nothing is caught.

    Args:
        tell: what to call when one comes.
    """

    def __init__(self, tell: Callable[[], object] = lambda: None) -> None:
        self._tell = tell
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def leave(self) -> None:
        """End the process as the received signal asks for.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM, with the customary code 143.
        """
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
        self._tell()
