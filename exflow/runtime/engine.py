"""Generation: admit prompts, prefill, then decode step by step until every sequence has ended.

One loop serves a single process and each rank of many; the strategy has the difference.
Shapes: T tokens at hand, N sequences of the request, V vocabulary.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import torch

from exflow.comm.collectives import Counters, total
from exflow.errors import InputError
from exflow.job.cluster import all_gather_object
from exflow.model.decoder import Decoder
from exflow.model.sampling import GREEDY, Sampling
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.listener import RoutingListener
from exflow.runtime.decoding import Choices, Decoding, EagerDecoding, GraphDecoding, collected, run_prompts
from exflow.runtime.request import Advance, Generation, Observer, Request, check_request
from exflow.runtime.strategies import RankStrategy

if TYPE_CHECKING:
    from exflow.runtime.graph_runner import Capture, CapturedDecode

_log = logging.getLogger(__name__)
MOST_CAPTURED = 16  # captured steps kept; they share a K/V cache, but not their buffers

Item = TypeVar("Item")


class Engine:
    """A decoder and a strategy. `generate` is collective: all ranks of the job call it with equal arguments.

    capture: settings of captured decode steps; None means that every step runs eagerly.
    """

    def __init__(self, decoder: Decoder, strategy: RankStrategy, capture: "Capture | None" = None) -> None:
        self.decoder = decoder
        self.strategy = strategy
        self.capture = capture
        self.captured: list[CapturedDecode] = []  # over one K/V cache; the step used last comes first
        self.device = decoder.embedding.weight.device
        self.first_sequence = 0  # id of the next request's first sequence

    @torch.inference_mode()
    def generate(
        self, request: Request, observe: Observer | None = None, advance: Advance | None = None
    ) -> Generation:
        """Run `request`; every rank returns an equal Generation.

        observe: called with the rows and logits [T, V] of every choice made on this rank.
        advance: called now and then with the number of new tokens of each sequence, and its maximum.
        Raises InputError for prompts that are empty or do not fit the model. Raises WrongResult for logits
        that are NaN or infinite, on the rank that chose from them.
        """
        check_request(request, self.decoder.config)
        choices = Choices(request, self.first_sequence, self.device, observe)
        decoding = self._decoding(choices)
        self.first_sequence += len(request.prompts)

        def prompts() -> None:
            decoding.begin(*run_prompts(self.decoder, self.strategy, decoding.cache, choices))

        def tokens() -> None:
            decoding.run(lambda done: advance(done, request.max_new_tokens) if advance else None)

        prefill, prefill_s = self._counted(prompts)
        decode, decode_s = self._counted(tokens)
        results = self.all_gather_object((choices.chosen, prefill, decode, decoding.steps))
        return Generation(
            collected(request, [chosen for chosen, *_ in results]),
            prefill_s,
            decode_s,
            max(steps for *_, steps in results),
            total([counters for _, counters, _, _ in results]),
            total([counters for _, _, counters, _ in results]),
        )

    def _decoding(self, choices: Choices) -> Decoding:
        if self.capture is None:
            return EagerDecoding(self.decoder, self.strategy, choices)
        return GraphDecoding(self.capture_for(choices.request), self.strategy, choices)

    def _counted(self, phase: Callable[[], None]) -> tuple[Counters, float]:
        exchange = self.strategy.exchange
        if exchange is not None:
            exchange.counters = Counters()
        self._synchronise()
        start = time.perf_counter()
        phase()
        self._synchronise()
        seconds = time.perf_counter() - start
        return Counters() if exchange is None else exchange.counters, seconds

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def prepare(
        self,
        batches: Iterable[int],
        positions: int,
        sampling: Sampling = GREEDY,
        end_tokens: tuple[int, ...] = (),
    ) -> None:
        """Capture decode steps before the first request. Does nothing if steps run eagerly. Collective.

        batches: numbers of sequences of the coming requests. positions: most positions of a prompt with its
        new tokens. sampling, end_tokens: as in the requests; the seed may differ. Raises InputError for more
        positions than the model has.
        """
        if positions > (most := self.decoder.config.max_positions):
            raise InputError(f"positions {positions}: the model has {most}; give so many or fewer")
        if self.capture is None:
            return
        more = self.capture.cluster.num_ranks - 1  # the first home may be any rank
        sizes = (size for batch in batches for size in (batch, batch + more))
        for size in sorted(sizes, reverse=True):  # the cache of the largest step has room for the others
            self._captured_step(size, positions, sampling, end_tokens)

    def capture_for(self, request: Request) -> "CapturedDecode":
        """The captured step for `request`: an existing one that fits, or a new one. Collective."""
        assert self.capture is not None
        positions = max(len(prompt) for prompt in request.prompts) + request.max_new_tokens
        sequences = self.first_sequence % self.capture.cluster.num_ranks + len(request.prompts)
        return self._captured_step(sequences, positions, request.sampling, request.end_tokens)

    def _captured_step(
        self, sequences: int, positions: int, sampling: Sampling, end_tokens: tuple[int, ...]
    ) -> "CapturedDecode":
        assert self.capture is not None
        wanted = (sequences, positions, sampling, end_tokens)
        found = next((each for each in self.captured if each.serves(*wanted)), None)
        if found is not None:
            self.captured.remove(found)
        else:
            if self.captured and not self.captured[0].has_room(sequences, positions):
                self.captured.clear()  # frees their memory first
            del self.captured[MOST_CAPTURED - 1 :]
            found = self.capture.make(*wanted, beside=self.captured[0] if self.captured else None)
            _log.warning(found.description)
        self.captured.insert(0, found)
        return found

    def close(self) -> None:
        """Free the captured steps: NCCL cannot destroy a group while a graph holds its collectives."""
        self.captured.clear()

    def all_gather_object(self, mine: Item) -> list[Item]:
        """Every rank's `mine`, by rank; collective, and not counted."""
        if self.strategy.exchange is None:
            return [mine]
        return all_gather_object(self.strategy.exchange.cluster, mine)

    def routing_layout(self) -> RoutingLayout:
        return self.decoder.routing_layout()

    def add_routing_listener(self, listener: RoutingListener) -> Callable[[], None]:
        return self.decoder.add_routing_listener(listener)
