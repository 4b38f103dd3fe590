"""The command line: one thin function for each verb, in a file for each stage.

profile.py      model, or another engine's recording -> trace   profile, import
place.py        traces -> plan, and its figures                 place
balance.py      counts of tokens -> plan                        balance
evaluate.py     plan and trace -> figures and time              evaluate
look.py         trace and plans -> predictions                  report, simulate
export.py       plans <-> other engines                         export, import-plan
run.py          model and plan -> tokens                        generate, bench decode
first_steps.py  first steps                                     train, doctor, demo

options.py has the options that verbs share. The tables print results on stdout; progress and errors go to
stderr. exflow/job/outcome.py has messages and exit codes.

Torch and the solvers are imported inside the verbs that need them, so that `exflow --help` answers at once.
"""

import typer

from exflow.cli import balance, evaluate, export, first_steps, look, place, profile, run
from exflow.cli.options import Verbs, general
from exflow.job.outcome import run_to_exit

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
for verbs in (
    profile.verbs,
    place.verbs,
    balance.verbs,
    evaluate.verbs,
    look.verbs,
    export.verbs,
    run.verbs,
    first_steps.verbs,
    run.bench,
):
    app.add_typer(verbs)


def main() -> None:
    """Entry point of the `exflow` command."""
    run_to_exit(app)
