"""The original ExFlow's solution file: CSV `Expert,Node`, where Expert is layer * E + e and Node is a GPU.

Written by its solve_affinity.py, with CRLF line ends.
"""

from pathlib import Path

from exflow.errors import InputError
from exflow.placement.formats.exporters.common import Usage, check_equal_experts, redundant_experts
from exflow.placement.plan.plan import Plan


def write_exflow(plan: Plan) -> bytes:
    """The bytes of the CSV file. It does not hold the order of a rank's slots; `exflow place` sorts them by
    expert anyway.

    Raises InputError if there are replicas, or layers have different numbers of experts.
    """
    check_equal_experts(plan, "the CSV of the original ExFlow")
    redundant = redundant_experts(plan)
    if redundant:
        raise InputError(
            f"the plan has {redundant} slots a layer for replicas, the CSV of the original ExFlow knows one "
            "place for each expert; place again without redundant experts"
        )
    ranks = plan.rank_of_expert.ravel().tolist()
    return "".join(["Expert,Node\r\n", *(f"{item},{rank}\r\n" for item, rank in enumerate(ranks))]).encode()


def exflow_usage(plan: Plan, path: Path) -> Usage:
    return Usage(
        options=(f"# {path} has the form of the files in the original ExFlow's solutions/",),
        traps=(f"Its layers are the MoE layers, with {plan.num_experts} experts each; it does not say so.",),
    )
