"""Predicted time of a step: by hand for round numbers, and laws that hold on any machine."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exflow.cost.predict import Prediction, choose, predict
from exflow.cost.workload import BatchCounts, StepTraffic, Workload, imbalance_of_batch
from exflow.errors import InputError
from exflow.model.config import ModelConfig
from exflow.placement.time.machine import Link, Machine

# 2 nodes of 2 ranks; a message of 100 bytes, in a dispatch 120 with its 5 numbers
WORKLOAD = Workload(
    batch=8,
    context=10,
    ranks=4,
    ranks_per_node=2,
    layers=3,
    moe_layers=2,
    experts=4,
    slots_per_rank=1,
    top_k=1,
    hidden_bytes=100,
    kv_bytes=50,
    expert_bytes=1000,
    dense_bytes=6000,
)
MACHINE = Machine(Link(0.1, 1000.0), Link(1.0, 100.0), read_bytes_per_s=1000.0, memory_bytes=1e6)
# of the busiest rank: 4 ranks share 8 tokens, and by chance one has more than 2 (see imbalance_of_batch)
CHANCE = 0.7 * (2 * math.log(4) * 3 / 8) ** 0.5
# nothing moves but what a test says
STILL = StepTraffic(
    1, exchanges=0, dispatch=(0, 0), combine=(0, 0), kv=(0, 0), expert_imbalance=1.0, attention_imbalance=1.0
)


def test_exchanges_by_hand() -> None:
    """Every token goes to the other rank of its node, and back from both ranks of the other node.

    2 tokens a rank. Out: 2 rows of 120 bytes at 1000 a second, and no room to spare. Back:
    4 rows of 108 bytes at 100 a second. The busiest rank has half as much again, and what chance adds; 2
    layers, and 4 latencies.
    """
    traffic = replace(STILL, exchanges=4, dispatch=(1.0, 0.0), combine=(0.0, 2.0), expert_imbalance=1.5)
    expected = 4 * 1.0 + 2 * (1 + math.hypot(0.5, CHANCE)) * (240 / 1000 + 432 / 100)
    assert predict("coherent", WORKLOAD, traffic, MACHINE).exchange_s == pytest.approx(expected)
    shared = predict("coherent", WORKLOAD, traffic, replace(MACHINE, shared=True)).exchange_s
    assert shared == pytest.approx(4 * 1.0 + 2 * (240 / 1000 + 432 / 100))
    one_node = replace(WORKLOAD, ranks_per_node=4)
    inside = replace(STILL, exchanges=4)
    assert predict("coherent", one_node, inside, MACHINE).exchange_s == pytest.approx(0.4)


def test_room_is_paid_for() -> None:
    """A token in two leaves for the one other rank: of 8 tokens 4, and 3 times root 2, and chance."""
    pair = replace(WORKLOAD, ranks=2, ranks_per_node=2, batch=16)
    seconds = predict("coherent", pair, replace(STILL, exchanges=2, dispatch=(0.5, 0.0)), MACHINE).exchange_s
    busiest = 1 + 0.7 * (2 * math.log(2) / 16) ** 0.5
    assert seconds == pytest.approx(2 * 0.1 + 2 * 120 * busiest * min(8, 4 + 3 * 2**0.5) / 1000)


def test_captured_exchanges_by_hand() -> None:
    """One-sided, only what moves is sent; by a collective room for every row that a receiver may own."""
    traffic = replace(STILL, group_size=4, exchanges=4, dispatch=(1.0, 0.0), combine=(0.0, 2.0))
    busiest = 1 + CHANCE
    one_sided = replace(MACHINE, transport="one-sided")
    expected = 4 * 1.0 + 2 * busiest * (240 / 1000 + 432 / 100)
    assert predict("coherent", WORKLOAD, traffic, one_sided).exchange_s == pytest.approx(expected)
    collective = replace(MACHINE, transport="collective")
    rows = 2 * 4  # 2 tokens of each of 4 ranks; to one rank of the node, and to two on the other
    expected = 4 * 1.0 + 2 * (2 * rows * 120 / 100 + 2 * rows * 108 / 100)
    assert predict("coherent", WORKLOAD, traffic, collective).exchange_s == pytest.approx(expected)
    reduced = replace(STILL, all_reduces=2)
    served = predict("replicated", WORKLOAD, reduced, one_sided).exchange_s
    assert served == pytest.approx(2 * (1.0 + 3 * 8 * 0.25 * 100 / 100))
    everything = predict("replicated", WORKLOAD, reduced, collective).exchange_s
    assert everything == pytest.approx(2 * (1.0 + 3 * 8 * 100 / 100))


def test_exchanges_by_relays_by_hand() -> None:
    """Between nodes a chunk for the relay in the other one; inside what moves, with what came from there.

    2 tokens a rank, one message in four to the other node. Home: back from relays, 2 rows to the one other
    relay; where the whole node may own a token, to both ranks there.
    """
    relayed = replace(MACHINE, transport="relayed")
    traffic = replace(STILL, exchanges=4, dispatch=(0.75, 0.25), combine=(0.75, 0.25))
    latencies = 4 * (1.0 + 0.1)
    home = latencies + 2 * (2 * 120 / 100 + 2 * 108 / 100)
    assert predict("dispatch-combine", WORKLOAD, traffic, relayed).exchange_s == pytest.approx(home)
    of_nodes = latencies + 2 * (4 * 120 / 100 + 2 * 4 * 108 / 100)
    in_nodes = predict("node-coherent", WORKLOAD, replace(traffic, group_size=2), relayed)
    assert in_nodes.exchange_s == pytest.approx(of_nodes)
    inside = replace(relayed, between=Link(1.0, math.inf))
    near = latencies + 2 * (2 * 120 / 1000 + 2 * 108 / 1000)
    assert predict("dispatch-combine", WORKLOAD, traffic, inside).exchange_s == pytest.approx(near)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [64, 512])
def test_chance_makes_a_rank_the_busiest(ranks: int, tokens: int) -> None:
    draws = np.random.default_rng(0).multinomial(tokens, [1 / ranks] * ranks, 4000)
    busiest = draws.max(axis=1).mean() / (tokens / ranks)
    assert imbalance_of_batch(1.0, tokens, ranks) == pytest.approx(busiest, rel=0.08)


def test_compute_by_hand() -> None:
    """8 choices leave an expert of 4 out with a chance of (3/4)^8. A rank has one expert in each of 2 layers.

    Its 2 tokens, of the busiest rank 3 and some by chance, look at 10 positions of 50 bytes in 3 layers.
    """
    tokens = 2 * (1 + math.hypot(0.5, CHANCE))
    traffic, touched = replace(STILL, group_size=4, attention_imbalance=1.5), 1 - 0.75**8
    reading = (2 * touched * 1000 + 6000 + tokens * 3 * 10 * 50) / 1000
    assert predict("coherent", WORKLOAD, traffic, MACHINE).compute_s == pytest.approx(reading)
    eager = replace(MACHINE, layer_s=2.0, token_s=0.5)
    assert predict("coherent", WORKLOAD, traffic, eager).compute_s == pytest.approx(
        reading + 3 * (2 + tokens * 0.5)
    )


def test_every_rank_that_a_link_leads_to_costs_time() -> None:
    """3 others on one node; 2 on the other one. A rank that is alone waits for nobody."""
    links = {"inside": Link(0.1, math.inf, peer_s=0.01), "between": Link(1.0, math.inf, peer_s=0.2)}
    machine = replace(MACHINE, **links)  # type: ignore[arg-type]
    traffic = replace(STILL, exchanges=4)
    assert predict("coherent", WORKLOAD, traffic, machine).exchange_s == pytest.approx(4 * (1.0 + 2 * 0.2))
    one_node = replace(WORKLOAD, ranks_per_node=4)
    assert predict("coherent", one_node, traffic, machine).exchange_s == pytest.approx(4 * (0.1 + 3 * 0.01))
    reduced = replace(STILL, all_reduces=2)
    assert predict("replicated", WORKLOAD, reduced, machine).exchange_s == pytest.approx(2 * 2 * 1.4)
    alone = replace(WORKLOAD, ranks=1, ranks_per_node=1)
    for moves in (traffic, reduced):
        assert predict("coherent", alone, moves, machine).exchange_s == 0


def test_products_by_hand() -> None:
    """The busiest rank serves 3 of 2 choices, and some by chance, in 2 layers of experts of 500 numbers.

    Dense weights are 3000 numbers, multiplied eagerly with the 2 tokens that a rank owns, in a captured step
    with the 8 of its coherence group.
    """
    served = 2 * (1 + math.hypot(0.5, CHANCE)) * 2
    traffic = replace(STILL, expert_imbalance=1.5)
    fast = replace(MACHINE, read_bytes_per_s=math.inf, flops_per_s=10.0)
    compute = predict("dispatch-combine", WORKLOAD, traffic, fast).compute_s
    assert compute == pytest.approx((2 * served * 500 + 2 * 2 * 3000) / 10)
    coherent, captured = replace(traffic, group_size=4), replace(fast, transport="one-sided")
    compute = predict("coherent", WORKLOAD, coherent, captured).compute_s
    assert compute == pytest.approx((2 * served * 500 + 2 * 8 * 3000) / 10)


def test_drawn_batches_by_hand() -> None:
    """Their busiest rank reads a quarter of an expert and serves 3 times the mean, without a formula."""
    drawn = replace(STILL, drawn=BatchCounts(None, 3.0, 0.25))
    reading = predict("dispatch-combine", WORKLOAD, STILL, MACHINE).compute_s - 2 * (1 - 0.75**8)
    compute = predict("dispatch-combine", WORKLOAD, drawn, MACHINE).compute_s
    assert compute == pytest.approx(reading + 2 * 0.25)
    fast = replace(MACHINE, read_bytes_per_s=math.inf, flops_per_s=10.0)
    products = 2 * (2 * 3.0) * 2 * 500 + 2 * 2 * 3000
    assert predict("dispatch-combine", WORKLOAD, drawn, fast).compute_s == pytest.approx(products / 10)


@pytest.mark.parametrize(("link_rows", "busiest"), [(2.5, 2.5), (None, 3.0)])
def test_rows_of_the_busiest_link_by_hand(link_rows: float | None, busiest: float) -> None:
    """Counted rows give the busiest rank 2.5 a token, where the mean is 1; uncounted ones follow pairs, 3.

    2 tokens a rank in 2 layers. Between nodes the count does not hold.
    """
    one_sided = replace(MACHINE, transport="one-sided")
    traffic = replace(STILL, exchanges=4, dispatch=(0.5, 0.0), combine=(0.5, 0.0))
    traffic = replace(traffic, drawn=BatchCounts(link_rows, 3.0, 1.0))
    one_node = replace(WORKLOAD, ranks_per_node=4)
    moving = 2 * 2 * 0.5 * (120 + 108) / 1000
    found = predict("dispatch-combine", one_node, traffic, one_sided).exchange_s
    assert found == pytest.approx(4 * 0.1 + busiest * moving)
    found = predict("dispatch-combine", WORKLOAD, traffic, one_sided).exchange_s
    assert found == pytest.approx(4 * 1.0 + 3.0 * moving)
    shared = replace(one_sided, shared=True)
    assert predict("dispatch-combine", one_node, traffic, shared).exchange_s == pytest.approx(0.4 + moving)


def test_captured_steps_read_what_windows_leave(tiny_config: Callable[..., ModelConfig]) -> None:
    """2 of 10 positions are not seen: 2 tokens x 3 layers x 50 bytes of each."""
    assert tiny_config(windows=[None, 4, 20, 5]).positions_seen(10) == (10 + 4 + 10 + 5) / 4
    assert tiny_config().positions_seen(10) == 10
    windowed, captured = replace(WORKLOAD, seen=8.0), replace(MACHINE, transport="one-sided")
    whole, less = (
        predict("dispatch-combine", workload, STILL, captured).compute_s for workload in (WORKLOAD, windowed)
    )
    assert whole - less == pytest.approx(2 * 3 * 2 * 50 / MACHINE.read_bytes_per_s)
    eager = predict("dispatch-combine", WORKLOAD, STILL, MACHINE).compute_s
    assert predict("dispatch-combine", windowed, STILL, MACHINE).compute_s == eager


def test_only_what_computing_does_not_hide_of_the_background_counts() -> None:
    """2 tokens x 3 layers x 2 copies of 50 bytes between nodes: 6 seconds."""
    traffic = replace(STILL, group_size=4, kv=(1.0, 2.0))
    prediction = predict("coherent", WORKLOAD, traffic, MACHINE)
    assert prediction.background_s == 0
    fast = replace(MACHINE, read_bytes_per_s=1e9)
    prediction = predict("coherent", WORKLOAD, traffic, fast)
    assert prediction.background_s == pytest.approx(6 - prediction.compute_s)
    assert predict("coherent", WORKLOAD, traffic, replace(MACHINE, hides=0.0)).background_s == pytest.approx(
        6
    )


def test_replicated_by_hand() -> None:
    """Rings of 3/4 of 8 rows, twice, in 2 layers; every rank attends to all 8 tokens and holds them."""
    prediction = predict("replicated", WORKLOAD, replace(STILL, all_reduces=2), MACHINE)
    assert prediction.exchange_s == pytest.approx(2 * (2 * 1.0 + 2 * 0.75 * 800 / 100))
    assert prediction.memory_bytes == 6000 + 2 * 1000 + 8 * 10 * 3 * 50
    assert (
        predict("coherent", WORKLOAD, replace(STILL, group_size=4), MACHINE).memory_bytes
        == prediction.memory_bytes
    )
    assert predict("dispatch-combine", WORKLOAD, STILL, MACHINE).memory_bytes == 6000 + 2000 + 2 * 10 * 3 * 50


def test_figures_of_an_evaluation() -> None:
    """10 tokens in 2 layers: 6 of 8 dispatches stay in their node, both returns leave it."""
    figures = {
        "messages_per_token_layer": 0.5,
        "exchanges_per_step": 4,
        "kv_intra_node": 1.0,
        "kv_inter_node": 2.0,
        "imbalance": {"mean": 1.25},
        "owner_imbalance": {"mean": 1.5},
        "totals": {
            "messages": 10,
            "dispatch_intra": 6,
            "dispatch_inter": 2,
            "return_intra": 0,
            "return_inter": 2,
        },
    }
    traffic = StepTraffic.of(figures, group_size=4)
    assert traffic.dispatch == pytest.approx((0.3, 0.1))
    assert traffic.combine == pytest.approx((0.0, 0.1))
    assert (traffic.exchanges, traffic.kv, traffic.expert_imbalance, traffic.all_reduces) == (
        4,
        (1.0, 2.0),
        1.25,
        0,
    )
    assert traffic.attention_imbalance == 1.5
    assert StepTraffic.of(figures, group_size=1).attention_imbalance == 1
    replicated = StepTraffic.of(figures | {"all_reduces_per_step": 2}, group_size=1)
    assert (replicated.exchanges, replicated.all_reduces) == (0, 2)


def test_the_choice_says_why() -> None:
    slow = Prediction("dispatch-combine", 0.002, 0.001, 0.0001, memory_bytes=1e9)
    fast = Prediction("coherent", 0.001, 0.0008, 0.0, memory_bytes=2e9)
    large = Prediction("replicated", 0.0, 0.0001, 0.0, memory_bytes=90.1e9)
    assert choose([slow, fast, large], 80e9) == (
        "coherent",
        "auto: coherent, 1.8 ms predicted against 3.1 ms for dispatch-combine; replicated does not fit: "
        "90.1 GB of weights and keys and values, 80 GB of memory",
    )
    with pytest.raises(
        InputError, match=r"none fits; dispatch-combine does not fit: 1 GB of .*, 0.5 GB of memory"
    ):
        choose([slow, fast], 5e8)


shares = st.floats(0, 3)
positive = st.floats(1e-6, 1e3)
links = st.builds(Link, st.floats(0, 10), positive)
machines = st.builds(
    Machine,
    links,
    links,
    positive,
    positive,
    *[st.floats(0, 10)] * 2,
    st.sampled_from([64, 4096]),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["eager", "collective", "relayed", "one-sided"]),
)
moves = st.builds(
    StepTraffic,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([2, 4]),
    *[st.tuples(shares, shares)] * 3,
    st.floats(1, 4),
    st.floats(1, 4),
    st.sampled_from([0, 2]),
)


@given(moves, machines, st.floats(1, 100))
def test_faster_links_and_memory_never_cost_time(
    traffic: StepTraffic, machine: Machine, factor: float
) -> None:
    step = predict("coherent", WORKLOAD, traffic, machine).step_s
    faster = replace(
        machine,
        inside=Link(machine.inside.latency_s / factor, machine.inside.bytes_per_s * factor),
        between=Link(machine.between.latency_s / factor, machine.between.bytes_per_s * factor),
        read_bytes_per_s=machine.read_bytes_per_s * factor,
    )
    for changed in (
        replace(machine, inside=faster.inside),
        replace(machine, between=faster.between),
        replace(machine, read_bytes_per_s=faster.read_bytes_per_s),
        faster,
    ):
        assert predict("coherent", WORKLOAD, traffic, changed).step_s <= step * (1 + 1e-9)


@given(moves, machines, st.integers(1, 64), st.integers(0, 64))
def test_a_larger_batch_never_takes_less_time_or_memory(
    traffic: StepTraffic, machine: Machine, batch: int, more: int
) -> None:
    small, large = (
        predict("coherent", replace(WORKLOAD, batch=size), traffic, machine) for size in (batch, batch + more)
    )
    assert small.step_s <= large.step_s * (1 + 1e-9)
    assert small.memory_bytes <= large.memory_bytes


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 9))
def test_the_choice_is_the_fastest_of_those_that_fit(drawn: list[tuple[float, int]], memory: int) -> None:
    names = ("dispatch-combine", "coherent", "node-coherent", "replicated")
    predictions = [
        Prediction(name, seconds, 0.0, 0.0, size) for name, (seconds, size) in zip(names, drawn, strict=False)
    ]
    fit = [each for each in predictions if each.memory_bytes <= memory]
    if not fit:
        with pytest.raises(InputError, match="none fits"):
            choose(predictions, memory)
        return
    chosen, _ = choose(predictions, memory)
    (seconds,) = (each.step_s for each in predictions if each.strategy == chosen)
    assert seconds == min(each.step_s for each in fit)
