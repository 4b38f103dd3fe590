import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.placement.counts.owners import next_owner_table
from exflow.profiling.trace import RoutingTrace


def on_ranks(rank_of_expert: list[list[int]], num_ranks: int) -> np.ndarray:
    """[L, E, G]: the hosts where expert e of layer l is on rank `rank_of_expert[l][e]` alone."""
    return np.array(rank_of_expert)[..., None] == np.arange(num_ranks)


def slow_table(trace: RoutingTrace, hosts: np.ndarray) -> list[list[list[int]]]:
    """The definition, word by word."""
    num_ranks = hosts.shape[2]
    visits: dict[int, list[list[int]]] = {}
    for sequence, token in zip(trace.sequence.tolist(), trace.experts.tolist(), strict=True):
        visits.setdefault(sequence, []).extend(token)  # a sequence's layers in order, token after token
    table = np.zeros((trace.num_layers, trace.num_experts, num_ranks), dtype=int).tolist()
    for layer in range(trace.num_layers):
        next_layer = (layer + 1) % trace.num_layers
        for expert in range(trace.num_experts):
            hosted = [
                {rank for rank in range(num_ranks) for e in path[i + 1] if hosts[next_layer, e, rank]}
                for path in visits.values()
                for i in range(layer, len(path) - 1, trace.num_layers)
                if expert in path[i]
            ]
            for rank in range(num_ranks):
                if hosted:
                    share = sum(rank in ranks for ranks in hosted) * 1000 / len(hosted)
                    table[layer][expert][rank] = int(share + 0.5)
    return table


def test_one_token_in_sixteen_is_63_per_mille() -> None:
    experts = [[0, 0]] + [[0, 1]] * 15
    trace = RoutingTrace.from_arrays(experts, num_experts=2, sequence=np.arange(16))
    table = next_owner_table(trace, on_ranks([[0, 1], [0, 1]], 2))
    assert table.dtype == np.int16
    assert table[0].tolist() == [[63, 938], [0, 0]]  # 62.5 and 937.5, rounded half up; expert 1 never seen
    assert not table[1].any()  # no sequence has a next token


def test_the_last_layer_looks_to_the_next_token_of_its_own_sequence() -> None:
    experts = [[0], [1], [2], [2]]
    trace = RoutingTrace.from_arrays(experts, num_experts=4, sequence=[0, 1, 0, 1])
    table = next_owner_table(trace, on_ranks([[0, 0, 1, 1]], 2))
    assert table.tolist() == [[[0, 1000], [0, 1000], [0, 0], [0, 0]]]


def test_a_rank_that_hosts_two_of_the_next_experts_counts_once() -> None:
    trace = RoutingTrace.from_arrays([[[0, 2], [0, 1]], [[0, 2], [1, 3]]], num_experts=4, sequence=[0, 1])
    table = next_owner_table(trace, on_ranks([[0, 0, 1, 1]] * 2, 2))
    assert table[0].tolist() == [[1000, 500], [0, 0], [1000, 500], [0, 0]]


def test_every_rank_with_a_replica_of_a_next_expert_counts() -> None:
    trace = RoutingTrace.from_arrays([[0, 0], [0, 1]], num_experts=2, sequence=[0, 1])
    hosts = on_ranks([[0, 1], [0, 1]], 3)
    hosts[1, 1] = [False, True, True]
    assert next_owner_table(trace, hosts)[0].tolist() == [[500, 500, 500], [0, 0, 0]]
    hosts[1, 0, 2] = True
    assert next_owner_table(trace, hosts)[0].tolist() == [[500, 500, 1000], [0, 0, 0]]


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 15),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_the_table_is_its_definition(
    tokens: int, layers: int, top_k: int, experts: int, num_ranks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    trace = RoutingTrace.from_arrays(
        rng.integers(0, experts, (tokens, layers, top_k)),
        num_experts=experts,
        sequence=rng.integers(0, 3, tokens),
    )
    hosts = rng.random((layers, experts, num_ranks)) < rng.random()
    assert next_owner_table(trace, hosts).tolist() == slow_table(trace, hosts)
