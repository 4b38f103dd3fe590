"""The command line: one thin function a verb, in a file for each stage.

profile.py      model, or another engine's recording -> trace   profile, import
place.py        traces -> plan, and what it comes to            place, balance, evaluate
look.py         trace and plans -> what to expect               report, simulate
export.py       plans <-> other engines                         export, import-plan
run.py          model and plan -> tokens                        generate, bench decode
first_steps.py  where to begin                                  train, doctor, demo

options.py has the options that verbs share. The tables print results on stdout; progress and errors go to
stderr.
Exit codes: 0 success, 2 bad usage or bad input, 128 + N stopped by signal N (130: Ctrl-C), 1 anything else.
Torch and the solvers are imported inside the verbs that need them, so that `exflow --help` answers at once.
"""

import os
import sys
from typing import NoReturn

import typer

from exflow.cli import export, first_steps, look, place, profile, run
from exflow.cli.options import Verbs, general
from exflow.console import begin, say, say_error, verbosity
from exflow.errors import InputError, WrongResult, out_of_memory
from exflow.files import FULL
from exflow.job.launch import BAD_INPUT, LOST_CONTACT, LostContact, RankDied, end, torchrun_place
from exflow.job.signals import Stopped, answer_signals, leave_signals, unheard

app = typer.Typer(
    name="exflow",
    cls=Verbs,
    callback=general,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Place the experts of a Mixture-of-Experts model on GPUs so that fewer tokens cross between them. "
    "Export the plan to a serving engine, or run it with ExFlow's own runtime.",
    epilog="Results go to stdout; progress, notes and errors go to stderr. Set NO_COLOR to turn colours off. "
    "Exit codes: 0 success, 2 bad usage or bad input, 128 + N stopped by signal N, 1 any other failure.",
)
for verbs in (profile.verbs, place.verbs, look.verbs, export.verbs, run.verbs, first_steps.verbs, run.bench):
    app.add_typer(verbs)


def main() -> None:
    """Entry point of the `exflow` command."""
    # threads of torch that spin while they wait stall each other where cores are few or busy
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is reported by exflow itself
    try:
        answer_signals()  # from here on a signal may come at any moment
        begin()
        try:
            carry_out()
        finally:
            deliver()
    except Stopped as stop:
        say(str(stop))
        end(128 + stop.signal)
    finally:
        leave_signals()


def deliver() -> None:
    """Flush stdout now: where that fails, Python would end with a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        undelivered(error)


def undelivered(error: OSError) -> NoReturn:
    """End the program, since stdout cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python, which will try again
    if isinstance(error, BrokenPipeError):  # the reader has gone, as after `| head`
        end(1)
    say(f"standard output cannot be written ({error.strerror}); make room, or redirect it elsewhere")
    end(BAD_INPUT)


def carry_out() -> None:
    """Run the verb of the command line; end with a message and an exit code where it fails."""
    here = torchrun_place()
    verbosity.first_rank = here is None or here.rank == 0
    try:
        app()
    except InputError as error:
        if here is None or here.local_rank == 0:  # all ranks find the same fault: one a node reports it
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
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:
            undelivered(error)  # a file that cannot be written is an InputError instead
        if (shortage := out_of_memory(error)) is not None:
            say(shortage if here is None else f"rank {here.rank}: {shortage}")
        elif here is None:
            raise
        else:
            sys.excepthook(*sys.exc_info())
        end(1)
