"""The `exflow generate` command: text in, text out, in this process or as one rank of a job."""

import os
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exflow.comm.transport import choose_transport, transport_named
from exflow.console import Work, note
from exflow.cost.workload import Workload
from exflow.errors import InputError
from exflow.files import check_writable
from exflow.job.cluster import Cluster, join_cluster, raise_on_all_ranks
from exflow.job.launch import PATIENCE_S, torchrun_place
from exflow.model.checkpoint import default_dtype, load_decoder
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Decoder
from exflow.model.device import choose_device, dtype_named
from exflow.model.replay import ReplayedRouting
from exflow.model.sampling import Sampling
from exflow.model.tokenizer import end_tokens, load_tokenizer
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.deploy import Deployment, deploy, load_model, plan_for
from exflow.runtime.engine import Engine
from exflow.runtime.request import Generation, Request, check_request
from exflow.runtime.strategies import check_relays, group_size, strategy_named
from exflow.runtime.trace_recorder import JobRecorder
from exflow.runtime.verify import RunRecord, RunRecorder, check_choices
from exflow.runtime.verify_counters import check_counters
from exflow.texts import read_text


@dataclass(frozen=True)
class GenerateJob:
    """Arguments of the command; `check` finds contradictions between them."""

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

    def request(self) -> Request:
        """The prompts as tokens. Raises InputError if the model cannot serve them."""
        tokenizer = load_tokenizer(self.model)
        config = load_model_config(self.model)
        ends = () if self.ignore_end else end_tokens(self.model, tokenizer, config.vocab_size)
        prompts = [encoding.ids for encoding in tokenizer.encode_batch(self.prompts)]
        request = Request(prompts, self.max_new_tokens, self.sampling, ends)
        check_request(request, config)
        return request

    def deployment(self, topology: Topology) -> Deployment:
        """The deployment on ranks of `topology`. Raises InputError if it is impossible there."""
        strategy = strategy_named(self.strategy, topology.num_nodes)
        device = choose_device(self.device)
        relays = self.transport == "relayed"
        if relays:
            check_relays(topology, load_model_config(self.model).top_k, strategy, device.type)
        return Deployment(
            self.model,
            strategy,
            plan_for(self.model, self.plan, topology),
            self.precision(device),
            transport_named("eager" if relays and device.type == "cpu" else self.transport, device.type),
            relays,
        )

    def precision(self, device: torch.device) -> torch.dtype:
        """The dtype to compute in. Raises InputError where it is unknown, or no weights say it."""
        return default_dtype(self.model, device) if self.dtype == "auto" else dtype_named(self.dtype)

    def replayed(self, device: torch.device) -> ReplayedRouting | None:
        """The routing that --replay dictates, None without it. Raises InputError if it does not fit."""
        if self.replay is None:
            return None
        trace, config = RoutingTrace.load(self.replay), load_model_config(self.model)
        try:
            return ReplayedRouting.of(trace, config, device)
        except InputError as error:
            raise InputError(f"{self.replay}: {error}") from error

    def check(self, num_ranks: int) -> None:
        """Find faults before the ranks, all of one node, are started. Raises InputError."""
        self.deployment(Topology(gpus_per_node=num_ranks))
        self.request()
        self.replayed(torch.device("cpu"))
        choose_device(self.device)
        if self.trace is not None:
            check_writable(self.trace)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts given, then the lines of a file. Raises InputError if there is none."""
    lines = read_text(file).split("\n") if file is not None else []
    prompts = [*map(_as_utf8, given), *(line for line in lines if line)]
    if not prompts:
        raise InputError('no prompt was given; add --prompt "TEXT" or --prompt-file FILE')
    return prompts


def _as_utf8(prompt: str) -> str:
    """The prompt as it was typed, in UTF-8, where the locale kept Python from reading it so."""
    with suppress(UnicodeEncodeError):
        prompt.encode()
        return prompt
    try:
        return os.fsencode(prompt).decode()
    except UnicodeError as error:
        raise InputError(
            f"--prompt {prompt!r}: is not UTF-8; give it as UTF-8, or in a --prompt-file"
        ) from error


def generate(job: GenerateJob) -> dict[str, Any] | None:
    """Run the part of this process in the job. Returns the result on rank 0 or alone, else None."""
    device = choose_device(job.device)
    if torchrun_place() is None:
        transport = transport_named(job.transport, device.type)
        with Work("loading the model"):
            engine = load_model(job.model, device, job.precision(device), transport)
        engine.decoder.replay = job.replayed(device)
        return run(job, engine, job.request())
    with join_cluster(device.type, job.patience_s) as cluster:
        topology = Topology(num_nodes=cluster.num_nodes, gpus_per_node=cluster.ranks_per_node)
        deployment, request, replay = raise_on_all_ranks(
            cluster, lambda: (job.deployment(topology), job.request(), job.replayed(cluster.device))
        )
        if cluster.rank == 0 and deployment.plan.topology != topology:
            note(f"{job.plan}: the plan is for {deployment.plan.topology}, these are {topology}")
        if deployment.strategy == "auto":
            deployment = resolved(deployment, request, cluster)
            job = replace(job, strategy=deployment.strategy)
        with Work("loading the model", shown=cluster.rank == 0):
            engine = deploy(deployment, cluster)
        with closing(engine):
            engine.decoder.replay = replay
            return run(job, engine, request, cluster, deployment)


def resolved(deployment: Deployment, request: Request, cluster: Cluster) -> Deployment:
    """The deployment with the strategy that `auto` stands for. Collective; raises InputError if none fits."""
    if cluster.num_ranks == 1:  # where strategies are alike
        return replace(deployment, strategy="coherent")
    from exflow.cost.auto import choose_strategy

    assert isinstance(deployment.weights, Path)
    positions = max(map(len, request.prompts)) + request.max_new_tokens
    config = load_model_config(deployment.weights)
    load = Workload.of(
        config,
        deployment.plan,
        len(request.prompts),
        positions,
        deployment.dtype.itemsize,
    )
    transport = choose_transport(deployment.transport, cluster)
    strategy, why = choose_strategy(load, deployment.plan, cluster, transport)
    if cluster.rank == 0:
        note(why)
    if strategy == "replicated" and transport == "relayed":
        transport = "collective"
        if cluster.rank == 0:
            note("decode steps are not relayed: replicated has nothing to relay")
    relays = deployment.hierarchical and strategy != "replicated"
    return replace(deployment, strategy=strategy, transport=transport, hierarchical=relays)


def run(
    job: GenerateJob,
    engine: Engine,
    request: Request,
    cluster: Cluster | None = None,
    deployment: Deployment | None = None,
) -> dict[str, Any] | None:
    """Generate on this rank of a job, or alone. Raises WrongResult if a check is asked for and fails."""
    recorder = JobRecorder(engine) if job.trace else None
    run_recorder = RunRecorder(engine, request) if job.verify else None
    with Work("generating", "tokens", shown=cluster is None or cluster.rank == 0) as work:
        generation = engine.generate(request, run_recorder.observe if run_recorder else None, work.advance)
    trace = recorder.trace() if recorder else None
    recorded = run_recorder.gather() if run_recorder else None
    if cluster is not None and cluster.rank != 0:
        return None
    if trace is not None and job.trace is not None:
        trace.save(job.trace)
    ranks = 1 if cluster is None else cluster.num_ranks
    result = describe(job, generation, ranks, _dtype(engine))
    if recorded is not None:
        reference = load_decoder(job.model, engine.device, _dtype(engine))
        reference.replay = job.replayed(engine.device)
        if cluster is not None and deployment is not None:
            by_relays = engine.capture is not None and engine.capture.transport == "relayed"
            check_traffic(generation, recorded, deployment, cluster, reference, by_relays)
        result["verified"] = asdict(check_choices(recorded, generation, reference))
    return result


def check_traffic(
    generation: Generation,
    recorded: RunRecord,
    deployment: Deployment,
    cluster: Cluster,
    reference: Decoder,
    by_relays: bool,
) -> None:
    """Hold the counters against the routing; raises WrongResult. by_relays: captured steps have them."""
    here = Topology(num_nodes=cluster.num_nodes, gpus_per_node=cluster.ranks_per_node)
    plan = replace(deployment.plan, topology=here)
    group = 0 if deployment.strategy == "replicated" else group_size(deployment.strategy, cluster)
    relays = deployment.hierarchical
    check_counters(generation, recorded.trace, plan, group, reference, (relays, relays or by_relays))


def _dtype(engine: Engine) -> torch.dtype:
    return engine.decoder.embedding.weight.dtype


def describe(job: GenerateJob, generation: Generation, ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    """The result for printing, and for JSON."""
    tokenizer = load_tokenizer(job.model)
    return {
        "strategy": job.strategy if ranks > 1 else "single-process",
        "dtype": str(dtype).removeprefix("torch."),
        "ranks": ranks,
        "text": tokenizer.decode_batch(generation.tokens),
        "tokens": generation.tokens,
        "decode_steps": generation.steps,
        "ttft_s": generation.prefill_s,
        "tpot_ms": 1000 * generation.decode_s / max(1, generation.steps),
        "tokens_per_s": generation.tokens_per_s,
        "prefill": asdict(generation.prefill),
        "decode": asdict(generation.decode),
    }
