"""Ctrl-C and its like: whoever writes a file can tidy up, and no signal is lost."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from types import FrameType

from exflow.job.environment import has_agent
from exflow.job.launch import STARTED_BY

ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_S = 1.0  # a signal that comes again so soon does not disturb the tidying up
_SOON_S = 0.05  # a signal that cannot be heard now is sent again
_UNHEARD_S = 5.0  # and so is one that has not ended the program: some code drops any exception
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl

_raised_at: dict[int, float] = {}
_timers: list[Timer] = []


class Stopped(BaseException):
    """A signal told the program to end. No KeyboardInterrupt: typer would answer that one itself."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__("interrupted" if number == signal.SIGINT else f"stopped by {self.signal.name}")


def answer_signals() -> None:
    """Let Ctrl-C and its like raise Stopped in the main thread.

    A rank ends at once and without a word: the process that started it says one. It ends with that process,
    too, which may be killed and then cannot end anybody.
    """
    is_rank = has_agent(os.environ)
    for number in ANSWERED:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.SIG_DFL if is_rank else _stop)
    if is_rank:
        _end_with_parent()
    else:
        sys.unraisablehook = _not_heard


def unheard() -> Stopped | None:
    """The signal answered last, if any: an error after it is what C code has made of its exception."""
    return Stopped(max(_raised_at, key=_raised_at.__getitem__)) if _raised_at else None


def leave_signals() -> None:
    """Let them end the program at once: nothing is left to tidy up."""
    for number in ANSWERED:
        if signal.getsignal(number) == _stop:
            signal.signal(number, signal.SIG_DFL)
    _cancel()


@contextmanager
def ctrl_c_ends_the_search() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, by which a search ends and gives the best so far."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:  # outside a search: nothing to give
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
    """Hear of an exception that came up where Python drops it: in a callback from C, in __del__."""
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
