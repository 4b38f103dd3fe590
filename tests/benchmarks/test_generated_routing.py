import numpy as np
import pytest

from benchmarks.routing import generated
from exflow.errors import InputError
from exflow.profiling.trace import RoutingTrace

SMALL = {
    "tokens": 5000,
    "layers": 4,
    "experts": 16,
    "top_k": 2,
    "skew": 0.5,
    "affinity": 0.5,
    "sequences": 40,
    "seed": 0,
}


def generate(**changed: float) -> RoutingTrace:
    return generated.generate(**SMALL | changed)


def loads(trace: RoutingTrace) -> np.ndarray:
    """[L, E]"""
    return np.stack(
        [np.bincount(ids.ravel(), minlength=trace.num_experts) for ids in trace.experts.swapaxes(0, 1)]
    )


def information(trace: RoutingTrace, layer: int = 0) -> float:
    """Mutual information, in nats, of the first choices in a layer and the next."""
    here, after = trace.experts[:, layer, 0].astype(int), trace.experts[:, layer + 1, 0].astype(int)
    joint = np.bincount(here * trace.num_experts + after, minlength=trace.num_experts**2)
    pairs = joint.reshape(trace.num_experts, -1) / trace.num_tokens
    alone = pairs.sum(axis=1, keepdims=True) * pairs.sum(axis=0)
    there = pairs > 0
    return float((pairs[there] * np.log(pairs[there] / alone[there])).sum())


def independent(trace: RoutingTrace) -> float:
    """Bound on the `information` that independent choices reach by chance: its expectation and a margin."""
    return 1.3 * (trace.num_experts - 1) ** 2 / (2 * trace.num_tokens)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 1), (32, 4), (8, 8), (300, 6), (1, 1)])
@pytest.mark.parametrize("affinity", [0.0, 0.5, 1.0])
def test_a_token_has_distinct_experts_in_every_layer(experts: int, top_k: int, affinity: float) -> None:
    trace = generate(experts=experts, top_k=top_k, affinity=affinity, tokens=500)
    assert trace.experts.shape == (500, 4, top_k)
    assert trace.experts.dtype == (np.uint8 if experts <= 256 else np.uint16)
    ordered = np.sort(trace.experts, axis=2)
    assert (ordered[:, :, 1:] > ordered[:, :, :-1]).all()
    assert trace.experts.max() < experts


def test_sequences_follow_one_another_and_are_equally_long() -> None:
    trace = generate(tokens=10, sequences=4)
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1]


def test_the_same_arguments_give_the_same_trace_and_another_seed_another() -> None:
    digests = [generate(seed=seed).digest() for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


def test_more_skew_puts_more_load_on_the_most_popular() -> None:
    busiest = [
        (load.max(axis=1) / load.mean(axis=1)).min()
        for load in (loads(generate(skew=skew, affinity=0)) for skew in (0, 0.5, 1, 2))
    ]
    assert busiest[0] < 1.2
    assert busiest == sorted(busiest)
    assert busiest[3] > 4


def test_the_first_choice_is_the_popular_one() -> None:
    """Zipf's law: with one choice a token the frequencies are the weights themselves."""
    load = np.sort(loads(generate(skew=1, affinity=0, top_k=1, tokens=20_000)), axis=1)[:, ::-1]
    weight = 1 / np.arange(1, 17)
    np.testing.assert_allclose(load / 20_000, np.tile(weight / weight.sum(), (4, 1)), atol=0.02)


def test_every_layer_has_favourites_of_its_own() -> None:
    assert len({tuple(np.argsort(load)) for load in loads(generate(skew=1, affinity=0))}) == 4


def test_more_affinity_says_more_about_the_next_layer() -> None:
    said = [information(generate(affinity=affinity, skew=0, tokens=20_000)) for affinity in (0, 0.5, 0.8, 1)]
    assert said == sorted(said)
    assert said[1] > 2 * said[0]
    assert said[3] == pytest.approx(np.log(2), rel=0.2)  # which of the two groups, no more


@pytest.mark.parametrize("skew", [0, 1.5])
def test_without_affinity_layers_are_independent(skew: float) -> None:
    trace = generate(affinity=0, skew=skew, tokens=20_000)
    assert all(information(trace, layer) < independent(trace) for layer in range(3))


def test_with_full_affinity_a_token_stays_among_partners() -> None:
    """Choices of one token are of one group: the experts of a layer fall apart into groups of 8."""
    trace = generate(affinity=1, experts=32, top_k=2, layers=2)
    for layer in range(2):
        group = np.arange(32)  # the least expert that each is linked to
        for _ in range(32):
            for one, other in np.unique(trace.experts[:, layer], axis=0):
                group[[one, other]] = min(group[one], group[other])
        assert np.bincount(group).max() == 8
    for first in range(32):
        after = np.bincount(trace.experts[trace.experts[:, 0, 0] == first, 1].ravel(), minlength=32)
        assert np.sort(after)[-8:].sum() > 0.9 * after.sum()  # few change their topic in between


def test_topics_drift_so_that_far_layers_say_less() -> None:
    trace = generate(affinity=1, skew=0, experts=32, layers=30)
    ends = RoutingTrace.from_arrays(trace.experts[:, [0, -1]], num_experts=32)
    assert information(ends) < 0.9 * information(trace)


def test_sequences_differ_in_their_topics_but_not_without_affinity() -> None:
    def spread(affinity: float) -> float:
        trace = generate(affinity=affinity, skew=0, tokens=20_000)
        first = [np.bincount(trace.experts[trace.sequence == i, 0, 0], minlength=16) / 500 for i in range(40)]
        return float(np.stack(first).std(axis=0).mean())

    assert spread(0.8) > 2 * spread(0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"affinity": 1.5}, "affinity is 1.5; give a number from 0 to 1"),
        ({"top_k": 17}, "top_k is 17; give a number from 1 to 16"),
        ({"skew": -1}, "skew is -1; give a number from 0 to 4"),
        ({"sequences": 6000}, "sequences is 6000; give a number from 1 to 5000"),
    ],
)
def test_arguments_out_of_range_are_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as error:
        generate(**changed)
    assert str(error.value) == message
