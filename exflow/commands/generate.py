"""`exflow generate`: runs a resolved job, in this process or as one of its ranks."""

from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

from exflow.commands.generate_job import ResolvedJob
from exflow.console import Work, note
from exflow.job.cluster import Cluster
from exflow.model.decoder import Decoder
from exflow.placement.plan.strategy import Strategy
from exflow.runtime.deploy import Deployment, deploy, load_model
from exflow.runtime.engine import Engine
from exflow.runtime.request import Generation
from exflow.runtime.trace_recorder import JobRecorder
from exflow.runtime.verify import RunRecord, RunRecorder, check_choices
from exflow.runtime.verify_counters import check_counters


def generate(job: ResolvedJob, cluster: Cluster | None) -> dict[str, Any] | None:
    """Run the job in this process, or as a rank of `cluster`. Returns the result; None on ranks but 0.

    Raises WrongResult if a requested check fails.
    """
    if cluster is None:
        with Work("loading the model"):
            engine = load_model(job.checkpoint, job.device_type, job.dtype, job.transport)
        return _run(job, engine)
    for line in job.notes if cluster.rank == 0 else []:
        note(line)
    deployment = job.deployment(cluster)
    with Work("loading the model", shown=cluster.rank == 0):
        engine = deploy(deployment, cluster)
    with closing(engine):
        return _run(job, engine, cluster, deployment)


def _run(
    job: ResolvedJob, engine: Engine, cluster: Cluster | None = None, deployment: Deployment | None = None
) -> dict[str, Any] | None:
    engine.decoder.replay = job.replayed(engine.device)
    recorder = JobRecorder(engine) if job.trace else None
    run_recorder = RunRecorder(engine, job.request) if job.verify else None
    observe = run_recorder.observe if run_recorder else None
    with Work("generating", "tokens", shown=cluster is None or cluster.rank == 0) as work:
        generation = engine.generate(job.request, observe, work.advance)
    trace = recorder.trace() if recorder else None
    recorded = run_recorder.gather() if run_recorder else None
    if cluster is not None and cluster.rank != 0:
        return None
    if trace is not None and job.trace is not None:
        trace.save(job.trace)
    result = _describe(job, generation, deployment)
    if recorded is not None:
        reference = job.checkpoint.decoder(engine.device, job.dtype)
        reference.replay = job.replayed(engine.device)
        if deployment is not None:
            by_relays = engine.capture is not None and engine.capture.transport == "relayed"
            _check_traffic(generation, recorded, job, deployment, reference, by_relays)
        result["verified"] = asdict(check_choices(recorded, generation, reference))
    return result


def _check_traffic(
    generation: Generation,
    recorded: RunRecord,
    job: ResolvedJob,
    deployment: Deployment,
    reference: Decoder,
    by_relays: bool,
) -> None:
    """Compare the counters with the routing; raises WrongResult. by_relays: captured steps used relays."""
    plan, strategy = replace(deployment.plan, topology=job.topology), deployment.strategy
    group = strategy.group_size(job.topology.num_ranks, job.topology.gpus_per_node)
    relays = deployment.hierarchical
    counted = 0 if strategy == Strategy.REPLICATED else group
    check_counters(generation, recorded.trace, plan, counted, reference, (relays, relays or by_relays))


def _describe(job: ResolvedJob, generation: Generation, deployment: Deployment | None) -> dict[str, Any]:
    """The result for printing, and for JSON."""
    ranks = 1 if deployment is None else job.topology.num_ranks
    return {
        "strategy": str(deployment.strategy) if deployment and ranks > 1 else "single-process",
        "dtype": str(job.dtype).removeprefix("torch."),
        "ranks": ranks,
        "text": job.checkpoint.tokenizer().decode_batch(generation.tokens),
        "tokens": generation.tokens,
        "decode_steps": generation.steps,
        "ttft_s": generation.prefill_s,
        "tpot_ms": 1000 * generation.decode_s / max(1, generation.steps),
        "tokens_per_s": generation.tokens_per_s,
        "prefill": asdict(generation.prefill),
        "decode": asdict(generation.decode),
    }
