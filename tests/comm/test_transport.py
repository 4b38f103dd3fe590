"""Choice of a job's transport, and the reasons given against the others."""

import pytest
import torch

from exflow.comm.transport import choose_transport, transport_named
from exflow.errors import InputError
from exflow.job.cluster import Cluster

GPUS = Cluster(0, 2, 2, torch.device("cuda"))  # which need not be there


@pytest.mark.parametrize("name", ["eager", "collective"])
def test_what_was_asked_for_by_name_is_done(name: str) -> None:
    assert transport_named(name, "cuda") == choose_transport(name, GPUS) == name


def test_auto_is_no_more_until_the_ranks_are_there() -> None:
    assert transport_named("auto", "cuda") == "auto"


@pytest.mark.parametrize(
    ("per_node", "options", "fault", "chosen", "said"),
    [
        (2, {}, "", "relayed", ""),
        (2, {}, "no NVLink", "collective", "decode steps are not relayed: no NVLink"),
        (1, {}, "", "collective", "decode steps are not relayed: there is one rank on each node"),
        (2, {"replicated": True}, "", "collective", ""),
        (4, {}, "", "one-sided", ""),
    ],
)
def test_what_auto_takes_on_nodes(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    per_node: int,
    options: dict[str, bool],
    fault: str,
    chosen: str,
    said: str,
) -> None:
    monkeypatch.setattr("exflow.comm.transport._fault_of_symmetric_memory", lambda cluster: fault)
    nodes = Cluster(0, 4, per_node, torch.device("cuda"))
    assert choose_transport("auto", nodes, **options) == chosen
    assert caplog.messages == ([said] if said else [])


@pytest.mark.parametrize(
    ("name", "per_node", "replicated", "message"),
    [
        ("one-sided", 2, False, "transport one-sided: the ranks are on 2 nodes"),
        ("relayed", 4, False, "transport relayed: the ranks are on one node"),
        ("relayed", 1, False, "transport relayed: there is one rank on each node"),
        ("relayed", 2, True, "transport relayed: strategy replicated has nothing to relay"),
    ],
)
def test_transports_that_do_not_work_on_such_nodes(
    name: str, per_node: int, replicated: bool, message: str
) -> None:
    nodes = Cluster(0, 4, per_node, torch.device("cuda"))
    with pytest.raises(InputError, match=message):
        choose_transport(name, nodes, replicated)
