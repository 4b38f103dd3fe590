"""`python -m exflow.cli`. Ranks are started by the path of this file, and run the package that it lies in.

By name they could be given another one, of the current folder or installed.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def load_this_package() -> None:
    spec = spec_from_file_location("exflow", Path(__file__).parents[1] / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = sys.modules["exflow"] = module_from_spec(spec)
    spec.loader.exec_module(package)


if not __package__:
    load_this_package()

from exflow.cli import main  # noqa: E402

main()
