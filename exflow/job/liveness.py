"""Liveness monitor: ranks post their state in a store, so that a lost rank can be named.

The store lives in the process that starts the ranks of the first node (torchrun, or --nproc), or else in rank
0. It may be out of reach itself.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from exflow.job.environment import Place, has_agent
from exflow.job.launch import LostContact, without

Answer = TypeVar("Answer")

# gloo's words for a rank that is gone, and for one that is silent
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
_SILENT = ("Timed out waiting", "timed out connecting", "No route to host", "Network is unreachable")
_GRACE_S = 2.0  # for the other ranks to notice too, and to post that they live
_PATIENCE_WITH_STORE_S = 3.0


def tells_of_a_lost_rank(error: RuntimeError) -> bool:
    """True if `error` was caused by a rank that is gone, silent or out of reach."""
    known = isinstance(error, LostContact | dist.DistNetworkError | dist.DistStoreError)
    return known or any(sign in str(error) for sign in (*_GONE, *_SILENT))


@dataclass
class LivenessMonitor:
    """This rank's view of the job. joined: True once the process group has formed."""

    place: Place
    patience_s: float
    store: Store | None = None
    joined: bool = False

    def open(self) -> Store:
        """Connect to the store, and post that this rank has started."""
        patience = timedelta(seconds=self.patience_s)
        store: Store = next(rendezvous("env://", timeout=patience))[0]
        store.set_timeout(patience)
        self.store = store
        self._post("came")
        return store

    def lost(self, error: RuntimeError) -> LostContact:
        """The error to raise when `error` reports a lost rank. Takes seconds: other ranks may post late."""
        if self.store is None:
            return LostContact(
                f"rank {self.place.rank}: no answer from {_store_keeper()} within {self.patience_s:g} s"
                f"{_ALIKE}"
            )
        answer = _asked(lambda: self._answer(error), _GRACE_S + _PATIENCE_WITH_STORE_S)
        return answer or LostContact(
            f"rank {self.place.rank}: {self._what(error, 'another rank')}, and no answer from "
            f"{_store_keeper()}: this node may be cut off"
        )

    def is_told(self) -> bool:
        """True if another rank of this node has already reported why the job ends; marks it as reported."""
        return bool(_asked(self._others_have_told, _PATIENCE_WITH_STORE_S))

    def _others_have_told(self) -> bool:
        assert self.store is not None
        told: int = self.store.add(f"exflow/told/{self.place.rank // self.place.ranks_per_node}", 1)
        return told > 1

    def _answer(self, error: RuntimeError) -> LostContact:
        self._post("alive")
        time.sleep(_GRACE_S)
        told = self._others_have_told()
        return LostContact(self._who(error), told)

    def _who(self, error: RuntimeError) -> str:
        missing = self._without("came")
        if missing:
            return f"{self._named(missing)} did not come within {self.patience_s:g} s{_ALIKE}"
        if not self.joined:
            return (
                f"{self._named(self._without('alive'))} cannot be connected with; set GLOO_SOCKET_IFNAME to "
                "the network interface that the nodes share"
            )
        remedy = "; if it was only slow, give more --patience" if _is_silence(error) else ""
        return self._what(error, self._named(self._without("alive"))) + remedy

    def _what(self, error: RuntimeError, who: str) -> str:
        """Describe the event and where it happened, from the notes of the error, the innermost first."""
        notes = getattr(error, "__notes__", ())
        where = f" in {', '.join(notes)}" if notes else ""
        if isinstance(error, LostContact):
            return f"{error} ({who})"
        if _is_silence(error):
            return f"no sign of life from {who} for {self.patience_s:g} s{where}"
        return f"lost the connection to {who}{where}"

    def _post(self, word: str) -> None:
        assert self.store is not None
        self.store.set(f"exflow/{word}/{self.place.rank}", "")

    def _without(self, word: str) -> list[int]:
        assert self.store is not None
        return without(word, self.store, self.place.num_ranks)

    def _named(self, ranks: list[int]) -> str:
        if not ranks:
            return f"one of {self.place.num_ranks} ranks"
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {self.place.num_ranks}"


_ALIKE = "; start torchrun alike on every node, or give more --patience"


def _asked(ask: Callable[[], Answer], seconds: float) -> Answer | None:
    """The answer of `ask`; None if `ask` fails or takes longer, as it does when the store is out of reach."""
    answers: list[Answer] = []

    def run() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    asking = Thread(target=run, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None


def _store_keeper() -> str:
    who = "the first node's torchrun" if has_agent(os.environ) else "rank 0"
    return f"{who} ({os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']})"


def _is_silence(error: RuntimeError) -> bool:
    return not isinstance(error, LostContact) and not any(sign in str(error) for sign in _GONE)
