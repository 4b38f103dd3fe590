"""Handling of SIGINT, SIGTERM and SIGHUP: files being written are cleaned up, and no signal is lost."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Timer
from types import FrameType

from exflow.job.environment import has_agent
from exflow.job.launch import STARTED_BY

ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_S = 1.0  # a repeated signal within this time does not disturb the cleanup
_SOON_S = 0.05  # a signal that cannot be handled now is sent again after this time
_UNHEARD_S = 5.0  # also one that has not ended the program by then: some code drops exceptions
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl

_raised_at: dict[int, float] = {}
_timers: list[Timer] = []


class Stopped(BaseException):
    """A signal told the program to end. Not a KeyboardInterrupt, which typer would handle itself."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__("interrupted" if number == signal.SIGINT else f"stopped by {self.signal.name}")


def answer_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise Stopped in the main thread.

    A rank ends at once and silently: its parent prints the message. It also ends when its parent is killed,
    which then cannot end anybody.
    """
    is_rank = has_agent(os.environ)
    for number in ANSWERED:
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored, as under nohup
            signal.signal(number, signal.SIG_DFL if is_rank else _stop)
    if is_rank:
        _end_with_parent()
    else:
        sys.unraisablehook = _not_heard


def unheard() -> Stopped | None:
    """The latest signal, if any: an error after it is its Stopped exception, converted by C code."""
    return Stopped(max(_raised_at, key=_raised_at.__getitem__)) if _raised_at else None


def leave_signals() -> None:
    """Restore the default handlers, which end the program at once: nothing is left to clean up."""
    for number in ANSWERED:
        if signal.getsignal(number) == _stop:
            signal.signal(number, signal.SIG_DFL)
    _cancel()


@contextmanager
def ctrl_c_ends_the_search() -> Iterator[Event]:
    """Make Ctrl-C raise KeyboardInterrupt inside, on which a search returns its best result so far.

    The event is set by Ctrl-C: then no further search should begin.
    """
    before, interrupted = signal.getsignal(signal.SIGINT), Event()
    if before == signal.SIG_IGN:
        yield interrupted
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    except KeyboardInterrupt:  # outside a search: no result to return
        raise Stopped(signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _is_importing(frame):  # an exception there makes torch abort
        _send_again(number, _SOON_S)
    elif now - _raised_at.get(number, -_AGAIN_S) >= _AGAIN_S:
        _raised_at[number] = now
        _send_again(number, _UNHEARD_S)
        raise Stopped(number)


def _not_heard(dropped: "sys.UnraisableHookArgs") -> None:
    """Send the signal again if Python dropped its exception, as in a callback from C or in __del__."""
    if isinstance(dropped.exc_value, Stopped | KeyboardInterrupt):
        _raised_at.clear()
        _send_again(getattr(dropped.exc_value, "signal", signal.SIGINT), _SOON_S)
    else:
        sys.__unraisablehook__(dropped)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    parent = str(os.getppid())
    if os.environ.get(STARTED_BY, parent) != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def _send_again(number: int, seconds: float) -> None:
    _cancel()
    timer = Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
    _timers.append(timer)


def _cancel() -> None:
    while _timers:
        _timers.pop().cancel()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
