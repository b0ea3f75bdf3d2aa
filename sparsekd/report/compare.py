"""Several runs beside each other: one table and one chart over all of their networks.

Runs of one task share the axis of its metric. Those of different tasks are compared by how much better or worse each
network is than the dense one of its own run, in %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..goals import Metric
from . import charts
from .charts import Chart, Series
from .summary import label, metrics_of
from .tables import NOT_MEASURED
from .verdict import best, reference, shown

Run = Mapping[str, Any]
# What networks may be compared against, the first that all runs know: metric, axis, scale, share of the dense one's.
_COSTS = (
    ("latency_ms_frozen", "ms at batch 1, frozen", 1.0),
    ("macs_kept", "multiply-adds kept, %", 100.0),
    ("weights_kept", "weights kept, %", 100.0),
)


def names(runs: Sequence[Run]) -> list[str]:
    """What to call each run: by its task, with the folder or file it came from where two have the same one."""
    tasks = [run["task"]["name"] for run in runs]
    told = [
        task if tasks.count(task) == 1 else f"{task}, {run.get('source', f'run {place}')}"
        for place, (task, run) in enumerate(zip(tasks, runs, strict=True), 1)
    ]
    return [
        name if told.count(name) == 1 else f"{name} ({told[: place + 1].count(name)})"
        for place, name in enumerate(told)
    ]


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]], set[int]]:
    """Heading, rows, and which rows are the best of their run; what no run has measured has no column."""
    same = _shared_metric(runs)
    heading = ["model", "run", same.heading if same else "test score", "better than dense %"]
    heading += ["weights kept %", "multiply-adds kept %", "ms, frozen", "times as fast as dense"]
    rows: list[list[str]] = []
    marked: set[int] = set()
    for name, run in zip(names(runs), runs, strict=True):
        judge, dense = metrics_of(run)[0], reference(run["summary"])
        chosen = best(run, run["summary"])
        for entry in run["summary"]:
            if entry is chosen:
                marked.add(len(rows))
            score = shown(judge, entry) if same else f"{judge.heading.removeprefix('test ')} {shown(judge, entry)}"
            mean, faster = entry["mean"], _faster(entry, dense)
            rows.append(
                [
                    label(entry),
                    name,
                    score,
                    "" if dense is None else f"{_gain(judge, entry, dense) + 0.0:+.2f}",
                    f"{100 * mean['weights_kept']:.1f}",
                    NOT_MEASURED if mean.get("macs_kept") is None else f"{100 * mean['macs_kept']:.1f}",
                    NOT_MEASURED if mean.get("latency_ms_frozen") is None else f"{mean['latency_ms_frozen']:.3f}",
                    NOT_MEASURED if faster is None else f"{faster:.2f}",
                ]
            )
    known = [place for place in range(len(heading)) if any(row[place] != NOT_MEASURED for row in rows)] if rows else []
    return [heading[place] for place in known], [[row[place] for place in known] for row in rows], marked


def chart(runs: Sequence[Run]) -> Chart | None:
    """Quality against the first cost that every network of every run has; None where there is none."""
    entries = [entry for run in runs for entry in run["summary"]]
    same = _shared_metric(runs)
    found = [cost for cost in _COSTS if entries and all(entry["mean"].get(cost[0]) is not None for entry in entries)]
    if not found or (same is None and any(run["summary"] and reference(run["summary"]) is None for run in runs)):
        return None
    cost, axis, scale = found[0]
    drawn = Chart(axis, same.heading if same else "better than the run's dense network, %", x_from_zero=True)
    for place, (name, run) in enumerate(zip(names(runs), runs, strict=True)):
        judge, dense = metrics_of(run)[0], reference(run["summary"])
        points = []
        for entry in run["summary"]:
            absolute = judge.scale * entry["mean"][judge.name]
            height = absolute if same or dense is None else _gain(judge, entry, dense)
            at = scale * entry["mean"][cost]
            points.append((at, height, None, f"{name}, {label(entry)}: {at:.3g} {axis}, {height:.4g}"))
        drawn.series.append(Series(name, place % charts.SERIES, points, line=False))
    return drawn


def _shared_metric(runs: Sequence[Run]) -> Metric | None:
    """The metric that judges all runs, where all learn one task."""
    judges = {(run["task"]["name"], metrics_of(run)[0]) for run in runs}
    return judges.pop()[1] if len(judges) == 1 else None


def _gain(judge: Metric, entry: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """How much better than the dense network, in % of what that one has."""
    ours, theirs = entry["mean"][judge.name], dense["mean"][judge.name]
    if judge.ideal is not None:
        ours, theirs = abs(ours - judge.ideal), abs(theirs - judge.ideal)
    change = 100 * (ours - theirs) / abs(theirs) if theirs else 0.0
    return change if judge.higher_is_better and judge.ideal is None else -change


def _faster(entry: Mapping[str, Any], dense: Mapping[str, Any] | None) -> float | None:
    now, then = (each and each["mean"].get("latency_ms_frozen") for each in (entry, dense))
    return then / now if now and then else None
