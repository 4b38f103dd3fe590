"""The transports of a job's decode steps, by name; exflow/comm/transport.py chooses among them."""

from typing import Literal

Transport = Literal["one-sided", "relayed", "collective", "eager"]
NAMES: tuple[Transport, ...] = ("one-sided", "relayed", "collective", "eager")
