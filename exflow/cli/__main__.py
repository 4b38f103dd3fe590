"""Entry point of `python -m exflow.cli`."""

from exflow.cli import main

main()
