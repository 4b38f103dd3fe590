"""Messages and exit codes with which the command and each of its ranks end.

Exit codes: 0 success, 2 bad usage or bad input, 128 + N stopped by signal N (130: Ctrl-C), 1 anything else.
"""

import os
import sys
from collections.abc import Callable
from errno import EPIPE
from typing import NoReturn

from exflow.console import begin, say, say_error, verbosity
from exflow.errors import InputError, WrongResult, out_of_memory
from exflow.files import FULL
from exflow.job.launch import BAD_INPUT, LOST_CONTACT, LostContact, RankDied, end, torchrun_place
from exflow.job.signals import Stopped, answer_signals, leave_signals, unheard


def run_to_exit(work: Callable[[], object]) -> None:
    """Do `work`; if it fails, end the program with a message and an exit code."""
    # spinning torch threads stall each other where cores are few or busy
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is reported by exflow itself
    try:
        answer_signals()  # from here on a signal may come at any moment
        begin()
        try:
            _do(work)
        finally:
            _deliver()
    except Stopped as stop:
        say(str(stop))
        end(128 + stop.signal)
    finally:
        leave_signals()


def _do(work: Callable[[], object]) -> None:
    here = torchrun_place()
    verbosity.first_rank = here is None or here.rank == 0
    try:
        work()
    except InputError as error:
        if here is None or here.local_rank == 0:  # all ranks find the fault, one a node reports it
            say_error(error)
        end(BAD_INPUT)
    except (RankDied, WrongResult) as error:
        say(str(error))
        end(1)
    except LostContact as error:
        if not error.told:
            say(str(error))
        end(LOST_CONTACT)
    except Exception as error:
        if (stop := unheard()) is not None:
            raise stop from error
        if isinstance(error, OSError) and error.filename is None and error.errno in (*FULL, EPIPE):
            _undelivered(error)  # a file that cannot be written is an InputError instead
        if (shortage := out_of_memory(error)) is not None:
            say(shortage if here is None else f"rank {here.rank}: {shortage}")
        elif here is None:
            raise
        else:
            sys.excepthook(*sys.exc_info())
        end(1)


def _deliver() -> None:
    """Flush stdout now: if Python's own flush at exit failed, it would print a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _undelivered(error)


def _undelivered(error: OSError) -> NoReturn:
    """End the program, since stdout cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
    if isinstance(error, BrokenPipeError):  # the reader has gone, as after `| head`
        end(1)
    say(f"standard output cannot be written ({error.strerror}); make room, or redirect it elsewhere")
    end(BAD_INPUT)
