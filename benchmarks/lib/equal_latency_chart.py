"""The chart of `benchmarks.equal_latency`: a panel for each method, accuracy against measured microseconds, a line for
each way to prune, the dense network frozen and in OpenVINO."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.lib.equal_latency_data import DATASETS
from sparsekd.report.charts import STYLE, Chart, Series

DENSE = {"dense, frozen": "student", "dense, OpenVINO": "openvino"}  # what the chart calls it -> its rows
SAID = {"uniform": "every layer alike", "random": "at random"}
GROUND = "svg { color: #1f2328; } @media (prefers-color-scheme: dark) { svg { color: #e6edf3; } }"  # of the text
Row = dict[str, Any]


def picture(rows: Sequence[Row], about: Row, methods: Sequence[str], ways: Sequence[str]) -> str:
    """SVG. about: machine, batch and threads of the times."""
    panels = [
        f'<g transform="translate({20 + 430 * place},34)">{_panel(rows, method, ways)}</g>'
        for place, method in enumerate(methods)
    ]
    legend = "".join(
        f'<g class="s{colour}"><circle class="dot" cx="{30 + 130 * colour}" cy="16" r="5"/>'
        f'<text x="{40 + 130 * colour}" y="20">{name}</text></g>'
        for colour, name in enumerate((*(SAID.get(way, f"by {way}") for way in ways), *DENSE))
    )
    dataset = DATASETS[about["protocol"]["dataset"]].title
    seeds = len({row["seed"] for row in rows})
    foot = (
        f"{dataset}, ResNet-18 of 16 to 128 channels, batch {about['batch']}, {about['threads']} thread(s) of "
        f"{about['cpu']}, {seeds} seed(s); bars: standard deviation over seeds; times of the first seed's, exported"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1320 416" width="1320"><style>{STYLE}{GROUND}</style>'
        f'{legend}{"".join(panels)}<text class="note" x="20" y="408">{foot}</text></svg>\n'
    )


def _panel(rows: Sequence[Row], method: str, ways: Sequence[str]) -> str:
    drawn = Chart("us a call, frozen", f"{method.upper()}: test accuracy, %", width=420, height=320, x_from_zero=True)
    for colour, way in enumerate(ways):
        drawn.series.append(Series(way, colour, _points([r for r in rows if (r["method"], r["way"]) == (method, way)])))
    for colour, (name, kind) in enumerate(DENSE.items(), len(ways)):
        there = [row for row in rows if row["method"] == kind]
        if all(row["measured_us"] is None for row in there):
            continue  # OpenVINO is not installed
        drawn.series.append(Series(name, colour, _points(there), hollow=True))
    return drawn.svg()


def _points(rows: Sequence[Row]) -> list[tuple[float, float, float | None, str]]:
    points: list[tuple[float, float, float | None, str]] = []
    for point in sorted({row["point"] for row in rows}):
        here = [row for row in rows if row["point"] == point]
        accuracies = [100 * row["accuracy"] for row in here]
        us = statistics.fmean(row["measured_us"] for row in here if row["measured_us"] is not None)
        mean = statistics.fmean(accuracies)
        spread = statistics.stdev(accuracies) if len(here) > 1 else None
        points.append((us, mean, spread, f"{point:g} of the dense time: {mean:.2f} % in {us:.0f} us"))
    return points
