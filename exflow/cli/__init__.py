"""The command line: one thin function a verb, in a file for each stage.

profile.py      model, or another engine's recording -> trace   profile, import
place.py        traces -> plan, and what it comes to            place, balance, evaluate
look.py         trace and plans -> what to expect               report, simulate
export.py       plans <-> other engines                         export, import-plan
run.py          model and plan -> tokens                        generate, bench decode
first_steps.py  where to begin                                  train, doctor, demo

options.py has what verbs share, show.py prints their results: on stdout; progress and errors go to stderr.
Exit codes: 0 success, 2 bad usage or bad input, 128 + N stopped by signal N (130: Ctrl-C), 1 anything else.
Torch and the solvers are imported inside the verbs that need them, so that `exflow --help` answers at once.
"""

import os
import sys
from typing import NoReturn

import typer

from exflow.cli import export, first_steps, look, place, profile, run
from exflow.cli.options import Verbs, general
from exflow.console import begin, manners, say, say_error
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
    help="Decide on which GPU each expert of a Mixture-of-Experts model lives, and decode with one "
    "all-to-all a layer.",
    epilog="Results go to stdout; progress, notes and errors to stderr. NO_COLOR is heeded. Exit codes: 0 "
    "success, 2 bad usage or bad input, 128 + N stopped by signal N, 1 anything else.",
)
for verbs in (profile.verbs, place.verbs, look.verbs, export.verbs, run.verbs, first_steps.verbs, run.bench):
    app.add_typer(verbs)


def main() -> None:
    """Entry point of the `exflow` command."""
    # torch's threads shall not spin while they wait: where cores are few or busy they stall each other
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of its warnings when a rank is lost: we say it
    try:
        answer_signals()  # from here on one may come at any moment
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
    """Write what stdout still holds now, since Python would end with a traceback where that cannot be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        undelivered(error)


def undelivered(error: OSError) -> NoReturn:
    """End the program, since stdout cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python, which will try again
    if isinstance(error, BrokenPipeError):  # nobody reads on, as after `| head`
        end(1)
    say(f"standard output cannot be written ({error.strerror}); make room there, or choose another place")
    end(BAD_INPUT)


def carry_out() -> None:
    """Do what the command line says, and say what came in the way."""
    here = torchrun_place()
    manners.first_rank = here is None or here.rank == 0
    try:
        app()
    except InputError as error:
        if here is None or here.local_rank == 0:  # all ranks find the same fault: once a node is enough
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
            undelivered(error)  # of files that are written it would be an InputError
        if (shortage := out_of_memory(error)) is not None:
            say(shortage if here is None else f"rank {here.rank}: {shortage}")
        elif here is None:
            raise
        else:
            sys.excepthook(*sys.exc_info())
        end(1)
