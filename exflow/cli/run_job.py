"""Runs a job in this process, on ranks that it starts, or as one of the ranks that torchrun started.

A job is resolved once: its files are read and checked before ranks start, and each rank gets the result.
Under torchrun each process has only the command line, so each resolves the job itself.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from exflow.errors import InputError
from exflow.job.environment import Place
from exflow.job.launch import check_start, run_ranks, torchrun_place

if TYPE_CHECKING:
    from exflow.job.cluster import Cluster
    from exflow.placement.plan.topology import Topology


class Job(Protocol):
    """A resolved job, with the properties that join_cluster needs."""

    @property
    def device_type(self) -> str: ...

    @property
    def patience_s(self) -> float: ...


AnyJob = TypeVar("AnyJob", bound=Job)
AnyJob_co = TypeVar("AnyJob_co", bound=Job, covariant=True)
Run = Callable[[AnyJob, "Cluster | None"], dict[str, Any] | None]
Show = Callable[[dict[str, Any]], None]


class Options(Protocol[AnyJob_co]):
    """Options of a verb that can run as a job of several ranks."""

    @property
    def device(self) -> str | None: ...

    @property
    def patience_s(self) -> float: ...

    def resolve(self, topology: "Topology | None") -> AnyJob_co:
        """Read and check everything for ranks of `topology`; None means one process. Raises InputError."""


def run_job(options: Options[AnyJob], nproc: int | None, run: Run[AnyJob], show: Show) -> None:
    """Resolve the job, `run` it, and `show` its result. nproc: ranks to start; None: do not start any.

    Raises InputError, RankDied, and the errors of `run`.
    """
    check_start()
    place = torchrun_place()
    if place is not None:
        _run_under_torchrun(options, nproc, place, run, show)
    elif nproc is None:
        _show(run(options.resolve(None), None), show)
    else:
        from exflow.placement.plan.topology import Topology

        job = options.resolve(Topology(gpus_per_node=nproc))
        run_ranks(partial(_run_as_rank, job, run, show), nproc, options.patience_s)


def _run_as_rank(job: AnyJob, run: Run[AnyJob], show: Show) -> None:
    from exflow.job.cluster import join_cluster

    with join_cluster(job.device_type, job.patience_s) as cluster:
        result = run(job, cluster)
    _show(result, show)


def _run_under_torchrun(
    options: Options[AnyJob], nproc: int | None, place: Place, run: Run[AnyJob], show: Show
) -> None:
    from exflow.job.cluster import join_cluster, raise_on_all_ranks
    from exflow.model.device import choose_device
    from exflow.placement.plan.topology import Topology

    if nproc not in (None, place.num_ranks):
        raise InputError(
            f"--nproc {nproc}: the job has {place.num_ranks} ranks (WORLD_SIZE); leave --nproc out"
        )
    topology = Topology(num_nodes=place.num_ranks // place.ranks_per_node, gpus_per_node=place.ranks_per_node)
    with join_cluster(choose_device(options.device).type, options.patience_s) as cluster:
        job = raise_on_all_ranks(cluster, lambda: options.resolve(topology))
        result = run(job, cluster)
    _show(result, show)


def _show(result: dict[str, Any] | None, show: Show) -> None:
    if result is not None:  # on rank 0, or in a single process
        show(result)
