"""The rows of a run over its seeds: means, deviations, and the density that the validation part chooses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over seeds of every metric; None where a seed has none."""
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["target_density"]), []).append(row)
    summary = []
    for (name, density), group in groups.items():
        values = {metric: [row["metrics"].get(metric) for row in group] for metric in group[0]["metrics"]}
        known = {metric: None if None in found else found for metric, found in values.items()}
        summary.append(
            {
                "name": name,
                "method": group[0]["method"],
                "target_density": density,
                "seeds": [row["seed"] for row in group],
                "mean": {m: statistics.fmean(v) if v else None for m, v in known.items()},
                "sd": {m: statistics.stdev(v) if v and len(v) > 1 else None for m, v in known.items()},
            }
        )
    chosen = [_best_on_validation(entries) for entries in _by_name(summary).values()]
    return [{**entry, "selected": any(entry is one for one in chosen)} for entry in summary]


def _best_on_validation(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The density of a method that did best on the validation part; None where there is no choice."""
    known = [entry for entry in entries if entry["mean"].get("val_accuracy") is not None]
    if len(entries) < 2 or len(known) < len(entries):
        return None
    return max(known, key=lambda entry: entry["mean"]["val_accuracy"])


def metric_of(results: Mapping[str, Any]) -> str:
    """What the networks are judged by: "accuracy" of images, "mse" of everything else."""
    return "accuracy" if results["task"].get("kind") == "images" else "mse"


def label(entry: Mapping[str, Any]) -> str:
    density = entry["target_density"]
    return entry["name"] if density is None else f"{entry['name']} @ {density:g}"


def _by_name(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["name"], []).append(entry)
    return groups
