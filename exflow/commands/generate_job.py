"""Resolves the options of `exflow generate` to a job, once for all ranks: files are read and checked."""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from exflow.comm.transport import choose_transport, transport_named
from exflow.console import note
from exflow.cost.workload import Workload
from exflow.errors import InputError
from exflow.files import check_writable
from exflow.job.cluster import Cluster
from exflow.job.launch import PATIENCE_S
from exflow.model.checkpoint import Checkpoint
from exflow.model.device import choose_device, dtype_named
from exflow.model.replay import ReplayedRouting, load_replay
from exflow.model.sampling import Sampling
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.runtime.deploy import Deployment, plan_for
from exflow.runtime.request import Request, check_request
from exflow.runtime.strategies import check_relays, strategy_named
from exflow.texts import read_text


@dataclass(frozen=True)
class ResolvedJob:
    """A resolved job, passed to each rank: all files are read and checked, except weights and traces.

    topology: the ranks that run it. strategy: None means `auto`, which needs measured ranks. replay: a trace
    folder, whose files each rank maps into memory. trace: the folder to record to.
    notes: lines for the user.
    """

    checkpoint: Checkpoint
    request: Request
    plan: Plan
    topology: Topology
    strategy: Strategy | None
    dtype: torch.dtype
    transport: str
    relays: bool
    device_type: str
    replay: Path | None
    trace: Path | None
    verify: bool
    patience_s: float
    notes: list[str]

    def replayed(self, device: torch.device) -> ReplayedRouting | None:
        """The routing that the trace to replay dictates. Raises InputError if it does not fit the model."""
        if self.replay is None:
            return None
        config = self.checkpoint.config
        return ReplayedRouting.of(load_replay(self.replay, config), config, device)

    def deployment(self, cluster: Cluster) -> Deployment:
        """The deployment on these ranks. Collective; raises InputError if no strategy fits into memory."""
        given = Deployment(
            self.checkpoint,
            self.strategy or Strategy.COHERENT,
            self.plan,
            self.dtype,
            self.transport,
            self.relays,
        )
        if self.strategy is not None or cluster.num_ranks == 1:  # all strategies are equal on a single rank
            return given
        return _with_fastest_strategy(given, self.request, cluster)


def _with_fastest_strategy(deployment: Deployment, request: Request, cluster: Cluster) -> Deployment:
    from exflow.cost.auto import choose_strategy

    assert isinstance(deployment.weights, Checkpoint)
    positions = max(map(len, request.prompts)) + request.max_new_tokens
    load = Workload.of(
        deployment.weights.config,
        deployment.plan,
        len(request.prompts),
        positions,
        deployment.dtype.itemsize,
    )
    transport = choose_transport(deployment.transport, cluster)
    strategy, why = choose_strategy(load, deployment.plan, cluster, transport)
    if cluster.rank == 0:
        note(why)
    if strategy == Strategy.REPLICATED and transport == "relayed":
        transport = "collective"
        if cluster.rank == 0:
            note("decode steps are not relayed: replicated has nothing to relay")
    relays = deployment.hierarchical and strategy != Strategy.REPLICATED
    return replace(deployment, strategy=strategy, transport=transport, hierarchical=relays)


@dataclass(frozen=True)
class GenerateOptions:
    """Options of the command; `resolve` finds contradictions between them."""

    model: Path
    prompts: list[str]
    max_new_tokens: int
    sampling: Sampling
    plan: Path | None
    strategy: str
    device: str | None
    dtype: str
    trace: Path | None
    ignore_end: bool
    replay: Path | None
    transport: str = "auto"
    verify: bool = False
    patience_s: float = PATIENCE_S

    def resolve(self, topology: Topology | None) -> ResolvedJob:
        """Read and check everything for a job on ranks of `topology`; None means one process.

        Raises InputError for options that cannot run there.
        """
        ranks = topology or Topology(gpus_per_node=1)
        checkpoint, device = Checkpoint.open(self.model), choose_device(self.device)
        strategy = strategy_named(self.strategy, ranks.num_nodes)
        relays = self.transport == "relayed"
        if relays:
            check_relays(ranks, checkpoint.config.top_k, strategy, device.type)
        transport = "eager" if relays and device.type == "cpu" else self.transport
        plan = plan_for(checkpoint.config, self.plan, ranks)
        moved = [f"{self.plan}: the plan is for {plan.topology}, these are {ranks}"]
        if self.replay is not None:
            load_replay(self.replay, checkpoint.config)
        if self.trace is not None:
            check_writable(self.trace)
        return ResolvedJob(
            checkpoint=checkpoint,
            request=self._request(checkpoint),
            plan=plan,
            topology=ranks,
            strategy=strategy,
            dtype=checkpoint.default_dtype(device) if self.dtype == "auto" else dtype_named(self.dtype),
            transport=transport_named(transport, device.type),
            relays=relays,
            device_type=device.type,
            replay=self.replay,
            trace=self.trace,
            verify=self.verify,
            patience_s=self.patience_s,
            notes=moved if plan.topology != ranks else [],
        )

    def _request(self, checkpoint: Checkpoint) -> Request:
        """The prompts as tokens. Raises InputError if the model cannot serve them."""
        tokenizer = checkpoint.tokenizer()
        ends = () if self.ignore_end else checkpoint.end_tokens(tokenizer)
        prompts = [encoding.ids for encoding in tokenizer.encode_batch(self.prompts)]
        request = Request(prompts, self.max_new_tokens, self.sampling, ends)
        check_request(request, checkpoint.config)
        return request


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then the lines of a file. Raises InputError if there are none."""
    lines = read_text(file).split("\n") if file is not None else []
    prompts = [*map(_as_utf8, given), *(line for line in lines if line)]
    if not prompts:
        raise InputError('no prompt was given; add --prompt "TEXT" or --prompt-file FILE')
    return prompts


def _as_utf8(prompt: str) -> str:
    """The prompt decoded as UTF-8, if the locale made Python decode the command line otherwise."""
    with suppress(UnicodeEncodeError):
        prompt.encode()
        return prompt
    try:
        return os.fsencode(prompt).decode()
    except UnicodeError as error:
        raise InputError(
            f"--prompt {prompt!r}: is not UTF-8; give it as UTF-8, or in a --prompt-file"
        ) from error
