"""What a run comes to, in a sentence: its best pruned network beside the dense one of the same kind, and beside what
does better without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.rankings import LEARNT
from ..goals import Metric
from .summary import counts_macs, label, metrics_of

Entry = Mapping[str, Any]  # of a summary


def best(results: Mapping[str, Any], summary: Sequence[Entry]) -> Entry | None:
    """The pruned network that did best on the validation part, on the test part in files that lack it; None of none,
    and of several that have learnt the validation part."""
    judge = metrics_of(results)[0]
    pruned = [entry for entry in summary if entry["target_density"] is not None]
    if results["task"].get("validation") == LEARNT and len(pruned) > 1:
        return None
    key = f"val_{judge.name}"
    if any(entry["mean"].get(key) is None for entry in pruned):
        key = judge.name
    chosen: Entry | None = None
    for entry in pruned:
        value = entry["mean"].get(key)
        if value is not None and (chosen is None or judge.better(value, chosen["mean"][key])):
            chosen = entry
    return chosen


def reference(summary: Sequence[Entry]) -> Entry | None:
    """The dense network that pruned ones are held against: the student, else the first dense one."""
    dense = [entry for entry in summary if entry["target_density"] is None]
    return next((entry for entry in dense if entry["name"] == "student"), dense[0] if dense else None)


def sentence(results: Mapping[str, Any], summary: Sequence[Entry]) -> str:
    """One sentence; "" where nothing was pruned."""
    judge, chosen, dense = metrics_of(results)[0], best(results, summary), reference(summary)
    if chosen is None:
        return ""
    name, unit = judge.heading.removesuffix(" %"), " %" if judge.heading.endswith(" %") else ""
    kept = f"{chosen['mean']['weights_kept']:.0%} of the weights"
    if counts_macs(chosen["mean"]):
        kept += f" and {chosen['mean']['macs_kept']:.0%} of the multiply-adds"
    text = f"{label(chosen)} keeps {kept} and has a {name} of {shown(judge, chosen)}{unit}"
    if dense is None:
        return f"{text}."
    text += f", where the dense {dense['name']} has {shown(judge, dense)}{unit}".replace("dense dense", "dense network")
    now, then = (entry["mean"].get("latency_ms_frozen") for entry in (chosen, dense))
    if now and then:
        ratio = f"{then / now:.1f} times as fast as" if then >= now else f"{now / then:.1f} times as slow as"
        text += f"; frozen, it answers in {now:.3g} ms at batch 1, {ratio} the dense one frozen"
    ahead = ahead_of(results, judge, chosen)
    if ahead is not None:
        text += f"; {ahead['name']}, which is no network, has {judge.scale * ahead[judge.name]:.{judge.digits}f}{unit}"
    return f"{text}."


def ahead_of(results: Mapping[str, Any], judge: Metric, chosen: Entry) -> Mapping[str, Any] | None:
    """The baseline that does best, where it does better than `chosen` on the test part."""
    best = None
    for score in results["baselines"]:
        value = score.get(judge.name)
        if value is not None and judge.better(value, chosen["mean"][judge.name] if best is None else best[judge.name]):
            best = score
    return best


def shown(metric: Metric, entry: Entry) -> str:
    """The mean of a metric as tables show it."""
    return f"{metric.scale * entry['mean'][metric.name]:.{metric.digits}f}"
