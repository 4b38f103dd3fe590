"""Generated routing traces: popular and unpopular experts, affinity between layers, and topics.

A generator does not replace real traces. It is for shapes of which no trace is at hand, and for asking what a
placement does as one property of routing changes and the others do not.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from numba import njit

from exflow.errors import InputError
from exflow.profiling.trace import RoutingTrace

_GROUP = 8  # experts of a layer that are partners, about
_TOPICS = 0.3  # of a sequence: Dirichlet's concentration; less makes sequences more different
_DRIFT = 0.03  # of the tokens take up another topic of their sequence from one layer to the next
_CHUNK = 4096  # tokens at a time: their races, one for each expert, stay in the cache
_NEVER = 1e30  # an expert that cannot be chosen runs that many times slower than one of weight 1
_TINY = 1e-20  # no one arrives at time 0, whatever the rounding

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Topics = npt.NDArray[np.int32]
Ids = npt.NDArray[np.uint16]


def generate(
    *,
    tokens: int,
    layers: int,
    experts: int,
    top_k: int,
    skew: float,
    affinity: float,
    sequences: int,
    seed: int,
) -> RoutingTrace:
    """A trace of `tokens` tokens through `layers` MoE layers, each of which sends them to `top_k` experts.

    skew       how much more popular some experts are: in each layer the nth most popular has the weight
               n ** -skew, in an order of its own; 0 makes all equally popular, Zipf's law has 1
    affinity   from 0 to 1, how much of a token's choice is made by its topic. Each layer deals its experts
               into groups of about 8, at random; group c of a layer is the partner of group c of every other.
               A token has a topic c, which few change on their way. Its weight for expert e is e's popularity
               times (1 - affinity) + affinity * groups * [e in group c], which gives the group about the
               share `affinity` and spreads the rest over all: with 0 all layers choose independently, with
               1 a token stays among partners while its topic lasts
    sequences  how many sequences the tokens are dealt into, equally long, one after the other. Each has its
               own mixture of topics (Dirichlet), so that held-out sequences differ from those seen

    The choices are a draw without replacement by weight, the first choice first (Plackett and Luce): the same
    as the `top_k` largest of log weight plus Gumbel noise. The same arguments give the same trace.
    Raises InputError on arguments that make no sense.
    """
    _check(tokens, layers, experts, top_k, skew, affinity, sequences)
    groups = max(1, min(max(2, experts // _GROUP), experts // top_k))
    of_topics, *of_layers = np.random.SeedSequence(seed).spawn(layers + 1)
    sequence = np.arange(tokens) * sequences // tokens
    topic = _topics(layers, sequence, groups, np.random.default_rng(of_topics))
    chosen = np.empty((tokens, layers, top_k), dtype=np.uint8 if experts <= 256 else np.uint16)

    def fill(layer: int) -> None:
        rng = np.random.default_rng(of_layers[layer])
        slowness = _slowness(experts, groups, skew, affinity, rng)
        for start in range(0, tokens, _CHUNK):
            rows = slice(start, start + _CHUNK)
            chosen[rows, layer] = _race(slowness, topic[layer, rows], top_k, rng)

    with ThreadPoolExecutor() as pool:  # a generator of its own for each layer: threads change nothing
        list(pool.map(fill, range(layers)))
    return RoutingTrace.from_arrays(
        chosen, num_experts=experts, sequence=sequence, model=f"generated-{layers}x{experts}-top{top_k}"
    )


def _topics(layers: int, sequence: Integers, groups: int, rng: np.random.Generator) -> Topics:
    """[L, tokens] the topic of each token, drawn from its sequence's mixture, and now and then again."""
    mixture = rng.dirichlet(np.full(groups, _TOPICS), size=sequence[-1] + 1).cumsum(axis=1)
    ends = (mixture + np.arange(len(mixture))[:, None]).ravel()
    topic = np.empty((layers, len(sequence)), dtype=np.int32)
    for layer in range(layers):
        drawn = np.searchsorted(ends, rng.random(len(sequence)) + sequence) - sequence * groups
        anew = (rng.random(len(sequence)) < _DRIFT) | (layer == 0)
        topic[layer] = np.where(anew, np.clip(drawn, 0, groups - 1), topic[layer - 1])
    return topic


def _slowness(experts: int, groups: int, skew: float, affinity: float, rng: np.random.Generator) -> Floats:
    """[groups, E]: 1 / weight of each expert of one layer, for a token of each topic."""
    popularity = (1.0 + rng.permutation(experts)) ** -skew
    group = rng.permutation(experts) % groups
    preference = (1 - affinity) + affinity * groups * (group == np.arange(groups)[:, None])
    return np.asarray(1 / np.maximum(popularity * preference, 1 / _NEVER), dtype=np.float32)


def _race(slowness: Floats, topic: Topics, top_k: int, rng: np.random.Generator) -> Ids:
    """[tokens, K]: who arrive first, if times are exponential and `slowness` [groups, E] are their means."""
    times = rng.standard_exponential((len(topic), slowness.shape[1]), dtype=np.float32)
    times += _TINY
    return np.asarray(_first(times, slowness, topic, top_k))


@njit(nogil=True)
def _first(times: Floats, slowness: Floats, topic: Topics, top_k: int) -> Ids:
    """[tokens, K]: the ids of the least times * slowness, in order: few get in, so insertion is quick."""
    ids = np.empty((len(topic), top_k), dtype=np.uint16)
    least = np.empty(top_k, dtype=np.float32)
    for token in range(len(topic)):
        least[:] = np.inf
        for expert in range(times.shape[1]):
            time = times[token, expert] * slowness[topic[token], expert]
            if time < least[-1]:
                place = top_k - 1
                while place > 0 and least[place - 1] > time:
                    least[place], ids[token, place] = least[place - 1], ids[token, place - 1]
                    place -= 1
                least[place], ids[token, place] = time, expert
    return ids


def _check(
    tokens: int, layers: int, experts: int, top_k: int, skew: float, affinity: float, sequences: int
) -> None:
    ranges = {
        "tokens": (tokens, 1, np.inf),
        "layers": (layers, 1, np.inf),
        "experts": (experts, 1, 1 << 16),
        "top_k": (top_k, 1, experts),
        "skew": (skew, 0, 4),
        "affinity": (affinity, 0, 1),
        "sequences": (sequences, 1, tokens),
    }
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise InputError(f"{name} is {value}; give a number from {least} to {most}")
