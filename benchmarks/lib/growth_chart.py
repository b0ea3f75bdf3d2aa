"""The chart of `benchmarks.embedding --part growth`: bytes in training and steps a second over the rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.lib.equal_latency_chart import GROUND
from sparsekd.report.charts import STYLE, Chart, Series

PACKED, DENSE = 0, 1  # colours
WIDTH, HEIGHT = 460, 320  # of a panel
TOTAL = 386  # height of the picture
# A panel has no height of its own there: a browser gives it that of the picture, and puts it in the middle.
DOWN = 34 - (TOTAL - HEIGHT) / 2
Row = Mapping[str, Any]


def picture(rows: Sequence[Row], about: Row) -> str:
    """SVG. about: cpu and threads of the measurement."""
    grown = [row for row in rows if row["part"] == "growth"]
    if not grown:
        raise ValueError("benchmarks.embedding: the chart needs rows of the part growth, got none; add --part growth")
    dim, density, batch = (grown[0][key] for key in ("dim", "density", "batch"))
    resident = Chart("thousand rows", "MB in training", width=WIDTH, height=HEIGHT, x_log=True, y_log=True)
    resident.series = [
        _line("packed", PACKED, grown, lambda row: row["resident_bytes"] / 1e6, "MB"),
        _line("dense", DENSE, grown, lambda row: row["dense_adam_bytes"] / 1e6, "MB", hollow=True),
    ]
    steps = Chart(
        "thousand rows", f"steps of {batch} ids a second", width=WIDTH, height=HEIGHT, x_log=True, y_from_zero=True
    )
    steps.series = [_line("packed", PACKED, grown, lambda row: row["steps_a_second"], "steps a second")]
    panels = "".join(
        f'<g transform="translate({20 + 480 * place},{DOWN:g})">{chart.svg()}</g>'
        for place, chart in enumerate((resident, steps))
    )
    names = {
        PACKED: f"packed, {density:.0%} kept, resident with gradient and SparseAdam",
        DENSE: "dense with Adam, counted: table, gradient and two of state",
    }
    legend = "".join(
        f'<g class="s{colour}"><circle class="{"ring" if colour == DENSE else "dot"}" cx="{30 + 400 * place}" cy="16" '
        f'r="5"/><text x="{40 + 400 * place}" y="20">{name}</text></g>'
        for place, (colour, name) in enumerate(names.items())
    )
    foot = f"{dim} dimensions, ids by Zipf's law; {about['threads']} thread(s) of {about['cpu']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {TOTAL}" width="980"><style>{STYLE}{GROUND}</style>'
        f'{legend}{panels}<text class="note" x="20" y="{TOTAL - 6}">{foot}</text></svg>\n'
    )


def _line(
    name: str, colour: int, rows: Sequence[Row], value: Callable[[Row], float], unit: str, hollow: bool = False
) -> Series:
    points = [
        (row["rows"] / 1e3, value(row), None, f"{row['rows']:,} rows, {name}: {value(row):,.0f} {unit}") for row in rows
    ]
    return Series(name, colour, points, hollow=hollow)
