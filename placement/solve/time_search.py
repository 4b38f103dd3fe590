"""Search for the plan of least time, where every token comes home after each layer (dispatch-combine).

Layers are then independent. In each, swaps of two experts are annealed on the time that everybody waits for,
made smooth: the soft maximum over ranks (and over nodes) of the rows that they receive, and of the work of
their experts. A soft maximum is `noise * log(sum(exp(x / noise)))`. Its noise is the deviation of a drawn
batch, so an even plan is worth no more than chance leaves of it.

Shapes: T tokens, L MoE layers, K = top_k, E experts of the layer, G ranks.
"""

import math

import numpy as np

from exflow.placement.plan.topology import Topology
from exflow.placement.solve.layer_rounds import SUM, Tell, in_two_rounds, sampled
from exflow.placement.solve.time_swaps import LEVELS, Assignment, anneal
from exflow.placement.solve.time_weights import weights_of
from exflow.placement.time.serving import Serving
from exflow.profiling.trace import RoutingTrace

_TRIALS = 20  # of each expert at a temperature
_MOST_TOKENS = 30_000


def search_for_time(
    trace: RoutingTrace,
    topology: Topology,
    serving: Serving,
    starts: list[Assignment],
    *,
    keep_groups: int = 1,
    seed: int = 0,
    time_limit: float = math.inf,
    tell: Tell = lambda what: None,
) -> Assignment:
    """[L, E]: the rank of each expert, equally many on each, from the best of `starts` [L, E] in each layer.

    A short round over all layers comes first; it tells how long the second one may be within `time_limit`
    seconds. Ctrl-C ends the search: layers that were not reached keep what they had. All layers must have the
    same number of experts. keep_groups: routing groups, within which experts change places. tell: is called
    with each layer that is done.
    """
    experts = sampled(trace, _MOST_TOKENS)
    found = list(np.stack(starts, axis=1))  # [S, E] of each layer: what the next round begins from

    def anneal_layer(layer: int, share: float, round_seed: int) -> Assignment:
        chosen = np.ascontiguousarray(experts[:, layer])
        weights = weights_of(chosen, trace.num_experts, topology, serving)
        best = anneal(
            chosen,
            found[layer],
            topology.num_ranks,
            topology.gpus_per_node,
            weights.prices(),
            weights.tokens / len(chosen),
            weights.work(),
            trace.num_experts // keep_groups,
            max(1, int(share * _TRIALS * trace.num_experts)),
            round_seed * trace.num_layers + layer,
        )
        return best[None]

    tokens = 2 * experts[:, 0].size / trace.num_experts  # that a swap looks at: those of two experts
    swaps = trace.num_layers * LEVELS * _TRIALS * trace.num_experts
    work = swaps * (tokens + SUM * topology.num_ranks)
    in_two_rounds(anneal_layer, found, work, seed, time_limit, tell)
    return np.concatenate(found)
