"""Predicted times of a decode step as bars, with their assumptions."""

from typing import TYPE_CHECKING

from exflow.report.data import Report
from exflow.report.draw.figure import Figure, Table, number
from exflow.report.draw.svg import WIDTH, drawing, key, line, rect, short, text, ticks

if TYPE_CHECKING:
    from exflow.cost.machines import StepTime

_LEFT, _ROW, _HEAD = 190.0, 20.0, 30.0


def step_figure(report: Report) -> Figure | None:
    """Draw a bar for each plan and strategy. None without a setting."""
    times = [time for each in report.plans for time in each.times]
    if not times:
        return None
    most = max(time.prediction.step_s for time in times) * 1e3
    scale = (WIDTH - _LEFT - 150) / most
    legend = [("compute", "compute"), ("exchange", "exchanges"), ("background", "K/V not hidden")]
    y, bars = _HEAD, []
    for each in report.plans:
        bars.append(text(_LEFT - 170, y + 14, short(each.name, 60), kind="strong"))
        bars += [_bar(time, y + row * _ROW, scale) for row, time in enumerate(each.times, start=1)]
        y += (1 + len(each.times)) * _ROW + 8
    body = [key(_LEFT, 12, legend)]
    for value in ticks(0, most, 6):
        x = _LEFT + value * scale
        body += [line(x, _HEAD, x, y, "grid"), text(x, y + 14, f"{value:g}", anchor="middle", kind="small")]
    body += [*bars, text(_LEFT, y + 32, "milliseconds, predicted", kind="small")]
    return Figure(
        "step-time",
        "Predicted time of a decode step",
        drawing(y + 42, "Bars of predicted step times, one for each plan and strategy", body),
        Table(
            ["plan", "strategy", "step ms", "compute", "exchanges", "K/V not hidden", "memory GB", "fits"],
            [
                (each.name, time.prediction.strategy, *_milliseconds(time), "yes" if time.fits else "no")
                for each in report.plans
                for time in each.times
            ],
            "Predicted time of a decode step",
            texts=2,
        ),
    )


def assumptions(report: Report) -> list[str]:
    """Assumptions of the predictions, one sentence each."""
    setting = report.setting
    assert setting is not None
    machines = {id(time.machine): time.machine for each in report.plans for time in each.times}
    model = setting.model
    said = [
        f"The model is {model.name}: {model.num_hidden_layers} layers, {model.hidden_size} wide, "
        f"{model.expert_weights / 1e6:.3g} million weights an expert, K/V of {model.kv_width} numbers a "
        "layer; bfloat16.",
        f"{setting.batch} sequences in the whole job, each at position {setting.context}.",
    ]
    for machine in machines.values():
        between = (
            f", between nodes {1e6 * machine.between.latency_s:.3g} µs, "
            f"{1e6 * machine.between.peer_s:.3g} µs for each GPU there, and "
            f"{machine.between.bytes_per_s / 1e9:.3g} GB/s"
            if machine.between.bytes_per_s != float("inf")
            else ""
        )
        said.append(
            f"The machine: {machine.transport} exchanges, {1e6 * machine.inside.latency_s:.3g} µs and "
            f"{machine.inside.bytes_per_s / 1e9:.3g} GB/s from each GPU inside a node{between}; "
            f"{machine.read_bytes_per_s / 1e12:.3g} TB/s of memory, {machine.memory_bytes / 1e9:.3g} GB of "
            f"it; {1e6 * machine.layer_s:.3g} µs of launches a layer."
        )
    return said


def _bar(time: "StepTime", y: float, scale: float) -> str:
    prediction, x, parts = time.prediction, _LEFT, []
    for kind, seconds in (
        ("compute", prediction.compute_s),
        ("exchange", prediction.exchange_s),
        ("background", prediction.background_s),
    ):
        wide = 1e3 * seconds * scale
        parts.append(rect(x, y + 3, wide, _ROW - 6, kind, f"{kind}: {1e3 * seconds:.3g} ms"))
        x += wide
    total = f"{number(1e3 * prediction.step_s)} ms" + ("" if time.fits else ", does not fit")
    parts += [text(_LEFT - 8, y + 14, prediction.strategy, anchor="end"), text(x + 6, y + 14, total)]
    return "".join(parts)


def _milliseconds(time: "StepTime") -> tuple[float, ...]:
    each = time.prediction
    seconds = (each.step_s, each.compute_s, each.exchange_s, each.background_s)
    return *(1e3 * value for value in seconds), each.memory_bytes / 1e9
