"""The rows of a run over its seeds: means, deviations, and the density that the validation part chooses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..goals import Metric, headline


def summarise(rows: Sequence[Mapping[str, Any]], judge: Metric) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over seeds of every metric; None where a seed has none.

    `judge` says which density of a method did best on the validation part.
    """
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["target_density"]), []).append(row)
    summary = []
    for (name, density), group in groups.items():
        values = {metric: [row["metrics"].get(metric) for row in group] for metric in group[0]["metrics"]}
        known = {metric: None if None in of_seeds else of_seeds for metric, of_seeds in values.items()}
        summary.append(
            {
                "name": name,
                "method": group[0]["method"],
                "target_density": density,
                "budget": group[0].get("budget"),
                "seeds": [row["seed"] for row in group],
                "mean": {m: statistics.fmean(v) if v else None for m, v in known.items()},
                "sd": {m: statistics.stdev(v) if v and len(v) > 1 else None for m, v in known.items()},
            }
        )
    chosen = [_best(entries, judge, f"val_{judge.name}") for entries in _by_name(summary).values()]
    return [{**entry, "selected": any(entry is one for one in chosen)} for entry in summary]


def best_on_test(summary: Sequence[Mapping[str, Any]], judge: Metric) -> list[Mapping[str, Any]]:
    """Of every method that was pruned to several densities the one that did best on the test part.

    That is how arXiv 2401.10484 chooses. It flatters: such a figure belongs beside theirs, and nowhere else.
    """
    chosen = (_best(entries, judge, judge.name) for entries in _by_name(summary).values())
    return [entry for entry in chosen if entry is not None]


def _best(entries: Sequence[Mapping[str, Any]], judge: Metric, key: str) -> Mapping[str, Any] | None:
    """The density of a method with the best mean of the metric `key`; None where there is no choice."""
    if len(entries) < 2 or any(entry["mean"].get(key) is None for entry in entries):
        return None
    best = entries[0]
    for entry in entries[1:]:
        if judge.better(entry["mean"][key], best["mean"][key]):
            best = entry
    return best


def metrics_of(results: Mapping[str, Any]) -> tuple[Metric, ...]:
    """What the numbers of a run are, by its own account; the first metric judges."""
    return tuple(Metric(**metric) for metric in results["task"]["goal"]["metrics"])


def briefly(results: Mapping[str, Any]) -> dict[str, Any]:
    """The same run with no more metrics than a terminal has room for."""
    task = results["task"]
    metrics = [metric.describe() for metric in headline(metrics_of(results))]
    return {**results, "task": {**task, "goal": {**task["goal"], "metrics": metrics}}}


def label(entry: Mapping[str, Any]) -> str:
    """Of a row or of its summary: the name, and what it was pruned to, as in "SP-SAD @ macs=0.45". Runs from before
    budgets had units counted weights, and say a bare number."""
    if entry["target_density"] is None:
        return str(entry["name"])
    return f"{entry['name']} @ {entry.get('budget') or format(entry['target_density'], 'g')}"


def _by_name(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["name"], []).append(entry)
    return groups


def counts_macs(mean: Mapping[str, Any]) -> bool:
    """Whether a network has multiply-adds to save: recommenders have none, and earlier runs did not count them."""
    return mean.get("macs_kept") is not None and bool(mean.get("macs", 1))
