"""`python -m exflow.cli`, which is how ranks are started."""

from exflow.cli import main

main()
