"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from selective_ssm.training.signals import StopSignals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals like these")


def test_the_first_signal_is_kept_and_leaves_as_it_asks() -> None:
    with StopSignals() as signals:
        assert signals.received is None
        signals.leave()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGTERM
    with pytest.raises(SystemExit) as left:
        signals.leave()
    assert left.value.code == 143


def test_who_wants_to_know_is_told_at_once() -> None:
    told: list[bool] = []
    with StopSignals(lambda: told.append(True)) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert (told, signals.received) == ([True], signal.SIGINT)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signals.leave()


def test_handlers_stay_as_they_are_outside_the_main_thread() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
