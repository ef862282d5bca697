"""What a run shows of itself."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from selective_ssm.training.progress import Progress

FIGURES = {"loss": 1.25, "bits_per_byte": 1.8, "tokens_per_second": 12345.6}


def shown(*, terminal: bool) -> str:
    out = io.StringIO()
    progress = Progress(4, Console(file=out, force_terminal=terminal, width=120))
    progress.start(0.0)
    for step in (1, 2):
        progress.show(step, step / 4, FIGURES)
    progress.show(3, 0.75, {**FIGURES, "held_out_bits_per_byte": 2.5})
    progress.show(4, 1.0, FIGURES)
    progress.stop()
    return out.getvalue()


def test_a_file_gets_plain_lines_of_what_is_new() -> None:
    lines = shown(terminal=False).splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["step 1/4", "step 3/4", "step 4/4"]
    assert lines[0] == "step 1/4 · loss 1.250 · 1.80 bits/byte · 12,346 tokens/s · 0:00 left"
    assert "held out 2.500" in lines[1]
    assert lines[2].endswith("done")


def test_a_terminal_gets_a_moving_line() -> None:
    out = shown(terminal=True)
    assert "\x1b[" in out
    assert "step 4/4 · loss 1.250" in out


class Vanished(io.StringIO):
    """A stream that nobody reads any more; it counts the attempts to write to it."""

    def __init__(self, error: Exception, *, terminal: bool) -> None:
        super().__init__()
        self.error, self.terminal, self.attempts = error, terminal, 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.attempts += 1
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("closed")])
def test_a_stream_that_fails_is_left_alone(monkeypatch: pytest.MonkeyPatch, error: Exception, terminal: bool) -> None:
    stream = Vanished(error, terminal=terminal)
    monkeypatch.setattr("sys.stderr", stream)
    progress = Progress(4)
    progress.start(0.0)
    progress.show(1, 0.25, FIGURES)
    progress.show(4, 1.0, FIGURES)
    progress.stop()
    assert stream.attempts == 1


def test_a_process_without_standard_error_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    progress = Progress(4)
    progress.start(0.0)
    progress.show(4, 1.0, FIGURES)
    progress.stop()
