"""The report command: makes a page, and drawings in separate files, from a trace and plans."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from exflow.commands.evaluate import serving_of
from exflow.commands.place import Where
from exflow.errors import InputError
from exflow.files import atomic_path
from exflow.placement.time.serving import Serving
from exflow.profiling.trace import RoutingTrace
from exflow.report.data import Report, gather
from exflow.report.page import page
from exflow.report.plans import Candidate, candidates
from exflow.report.sections import sections


@dataclass(frozen=True)
class ReportJob:
    """Arguments of the command; see `exflow report --help`."""

    trace: Path
    plans: list[Path]
    output: Path
    phase: str = "all"
    where: Where = field(default_factory=Where)  # empty means the GPUs of the plans
    figures: Path | None = None
    model: Path | None = None
    batch: int = 64
    context: int = 1024
    machine: Path | None = None

    @property
    def tells_where(self) -> bool:
        return self.where.gpus is not None or self.where.topology_file is not None


@dataclass(frozen=True)
class Written:
    """Size of the page that was written, number of drawings, and the data behind them."""

    page_bytes: int
    figures: int
    report: Report


def run_report(job: ReportJob, advance: Callable[[str, int, int], None]) -> Written:
    """Count, draw and write. Raises InputError if a file is missing, wrong, or of another model.

    advance: called with the name of the next step, the number of steps done, and of all steps.
    """
    _check(job)
    trace = RoutingTrace.load(job.trace).of_phase(job.phase)
    topology = job.where.topology() if job.tells_where else None
    chosen = candidates(trace, job.plans, topology)
    setting = None
    if job.model is not None:
        from exflow.cost.machines import load_setting  # loads torch, which only predictions need

        setting = load_setting(job.model, job.batch, job.context, job.machine, trace)
    steps, done = len(chosen) + 3, 0

    def tell(what: str) -> None:
        advance(what, done, steps)

    def counted() -> None:
        nonlocal done
        done += 1

    report = gather(trace, chosen, _servings(job, chosen, trace), setting, tell, counted)
    tell("drawing")
    made = sections(report)
    content = page(report, made).encode()
    with atomic_path(job.output) as temporary:
        temporary.write_bytes(content)
    drawn = [] if job.figures is None else [figure for section in made for figure in section.figures]
    for figure in drawn:
        assert job.figures is not None
        with atomic_path(job.figures / f"{figure.slug}.svg") as temporary:
            temporary.write_text(figure.file(), encoding="utf-8")
    return Written(len(content), len(drawn), report)


def _servings(job: ReportJob, chosen: list[Candidate], trace: RoutingTrace) -> list[Serving]:
    """The setting of each plan's time. A baseline has the setting of the first plan beside it."""
    machine, model = (None if given is None else str(given) for given in (job.machine, job.model))
    return [
        serving_of((chosen[index + 1] if each.baseline and job.plans else each).plan, trace, machine, model)
        for index, each in enumerate(chosen)
    ]


def _check(job: ReportJob) -> None:
    """Raise InputError for options that would have no effect."""
    if job.where.nodes > 1 and job.where.gpus is None:
        raise InputError(f"--nodes {job.where.nodes}: needs --gpus; give both")
    for name, given in (("--model", job.model), ("--machine", job.machine)):
        if given is not None and not (job.plans or job.tells_where):
            raise InputError(f"{name} {given}: needs a plan, or --gpus, to predict times for; give one")
