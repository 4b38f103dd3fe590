"""Program of one rank: reads its work from stdin, where `run_ranks` put it, and does it.

It is started by the path of this file and loads the package around it. An import by name could find another
copy, in the current folder or installed.
"""

import pickle
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def load_this_package() -> None:
    spec = spec_from_file_location("exflow", Path(__file__).parents[1] / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = sys.modules["exflow"] = module_from_spec(spec)
    spec.loader.exec_module(package)


def do_work() -> None:
    handed, work = pickle.load(sys.stdin.buffer)  # written by the parent process, through a pipe of its own
    verbosity.quiet, verbosity.verbose = handed.quiet, handed.verbose
    work()


if __name__ == "__main__":
    load_this_package()
    from exflow.console import verbosity
    from exflow.job.outcome import run_to_exit

    run_to_exit(do_work)
