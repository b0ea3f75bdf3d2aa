"""The report of a stream: a table of the arms, and how far each is from the full model over time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import charts
from .charts import Chart, Series
from .markup import Table, figure, render
from .tables import NOT_MEASURED, Drawn, listed, markdown_table

KIND = "stream"
_POINTS = 200  # of a line in a chart: what is longer is drawn by the means of pieces
_BELOW = "Below 1 is better than to predict the share of clicks for every row."

_COLUMNS = (
    ("NE", "normalised_entropy", 1.0, ".4f"),
    ("gap to full %", "gap", 100.0, "+.3f"),
    ("gap, last quarter %", "gap_at_the_end", 100.0, "+.3f"),
    ("log loss", "log_loss", 1.0, ".4f"),
    ("AUC", "auc", 1.0, ".4f"),
    ("calibration", "calibration", 1.0, ".3f"),
    ("weights kept %", "density", 100.0, ".1f"),
    ("hand-overs", "hand_overs", 1.0, ".0f"),
    ("learning s", "seconds", 1.0, ".1f"),
    ("J", "joules", 1.0, ".1f"),
)


def arms_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: every arm, over the whole stream."""
    rows = [
        [name, *(_cell(arm.get(key), scale, form) for _, key, scale, form in _COLUMNS)] for name, arm in _arms(results)
    ]
    return ["arm", *(heading for heading, *_ in _COLUMNS)], rows


def document(results: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [
        f"# {title(results)}: {len(results['windows'])} windows",
        f"`{results['command']}`",
        tables(results),
        "## Protocol",
        listed(results["protocol"]),
        listed({f"stream, {key}": value for key, value in results["stream"].items()}),
        "Charts: report.html",
    ]
    return "\n\n".join(parts) + "\n"


def tables(results: Mapping[str, Any], draw: Drawn | None = None) -> str:
    return (draw or markdown_table)(*arms_table(results))


def html(results: Mapping[str, Any]) -> str:
    """One page: the table, the gaps and the entropies over time."""
    heading, colours = title(results), {name: i % charts.SERIES for i, (name, _) in enumerate(_arms(results))}
    caption = (
        "Relative difference of the normalised entropy to the full model, in %, of every window before it is learnt."
    )
    gap = Chart("window", "NE gap to the full model, %", x_whole=True)
    entropy = Chart("window", "normalised entropy", x_whole=True)
    for name, _ in _arms(results):
        if name != "full":
            gap.series.append(Series(name, colours[name], list(_points(results, name, "full"))))
        entropy.series.append(Series(name, colours[name], list(_points(results, name))))
    gap.levels = [("full", colours["full"], 0.0)]
    return render(
        "stream.html",
        {
            "title": f"sparsekd: {heading}",
            "heading": heading,
            "command": results["command"],
            "data": "results.json",
            "arms": Table(*arms_table(results)),
            "figures": [
                figure("Gap over time", gap, caption),
                figure("Normalised entropy over time", entropy, _BELOW),
            ],
            "protocol": {**results["protocol"], **{f"stream, {key}": v for key, v in results["stream"].items()}},
        },
    )


def title(results: Mapping[str, Any]) -> str:
    stream = results["stream"]
    return f"Stream {stream['name'] if 'name' in stream else ', '.join(stream['files'])}"


def _arms(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from results["arms"].items()


def _points(
    results: Mapping[str, Any], arm: str, reference: str | None = None
) -> Iterator[tuple[float, float, None, str]]:
    """(last window, mean) of pieces of the stream; windows of one class are left out."""
    windows: Sequence[Mapping[str, Any]] = results["windows"]
    size = -(-len(windows) // _POINTS)
    for start in range(0, len(windows), size):
        values = []
        for line in itertools.islice(windows, start, start + size):
            value = line["arms"][arm]["normalised_entropy"]
            other = None if reference is None else line["arms"][reference]["normalised_entropy"]
            if value is not None and (reference is None or other):
                values.append(value if other is None else 100 * (value / other - 1))
        if values:
            mean = sum(values) / len(values)
            yield windows[min(start + size, len(windows)) - 1]["window"], mean, None, f"{arm}: {mean:.4g}"


def _cell(value: float | None, scale: float, form: str) -> str:
    return NOT_MEASURED if value is None else format(scale * value, form)
