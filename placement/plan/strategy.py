"""The names of the strategies: those a job can run with, and those a plan can be made for."""

from typing import Literal

# `auto` stands for one of the others, which auto.py chooses once the ranks have met
Name = Literal["dispatch-combine", "coherent", "node-coherent", "replicated", "auto"]
NAMES: tuple[Name, ...] = ("dispatch-combine", "coherent", "node-coherent", "replicated", "auto")


Strategy = Literal["coherent", "node-coherent", "dispatch-combine"]
STRATEGIES: tuple[Strategy, ...] = ("coherent", "node-coherent", "dispatch-combine")
