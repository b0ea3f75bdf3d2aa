"""The report as one self-contained HTML page, from the contents of results.json alone: no script, nothing fetched.

What a reader wants first comes first: the result in a sentence, then quality against latency and multiply-adds, then
the tables with the best row marked, how the networks got there, and how it was all done.
"""

from __future__ import annotations

import base64
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..blocks import BlockPattern
from . import charts, compare
from .charts import Chart, Series, pareto
from .markup import Figure, Table, figure, render
from .summary import counts_macs, label, metrics_of
from .tables import NOT_MEASURED, accuracy_table, of_task, speed_table, title_of, validation_heading
from .verdict import best, reference, sentence, shown

Row = Mapping[str, Any]


def html(runs: Sequence[Mapping[str, Any]], data: str = "results.json") -> str:
    """One page about one or several results (as `report.read` gives them, each with its summary); `data` is the file
    beside it that holds them."""
    names = compare.names(runs)
    heading = title_of(names[0], runs[0]) if len(runs) == 1 else f"{len(runs)} runs compared"
    return render(
        "runs.html",
        {
            "title": f"sparsekd: {', '.join(dict.fromkeys(names))}",
            "heading": heading,
            "data": data,
            "comparison": _comparison(runs) if len(runs) > 1 else None,
            "sections": [_section(run, name) for run, name in zip(runs, names, strict=True)],
        },
    )


def _comparison(runs: Sequence[Row]) -> dict[str, Any]:
    heading, rows, marked = compare.table(runs)
    drawn = compare.chart(runs)
    return {
        "table": Table(heading, rows, best=frozenset(marked)),
        "figure": None if drawn is None else figure(f"Quality against {drawn.x_label}", drawn),
    }


def _section(run: Row, name: str) -> dict[str, Any]:
    colours = {name: index % charts.SERIES for index, name in enumerate(_names(run["summary"]))}
    summary, protocol = run["summary"], run["protocol"]
    seeds = max((len(entry["seeds"]) for entry in summary), default=0)
    first = min((row["seed"] for row in run["rows"]), default=0)
    chosen = best(run, summary)
    curves = list(_curves(run, colours, first))
    maps, map_note = _maps(run, first)
    costs = [cost for cost in _COSTS if any(_has(entry["mean"], cost[0]) for entry in summary)]
    figures = [_against(run, colours, *cost) for cost in costs]
    return {
        "name": name,
        "result": sentence(run, summary),
        "command": run["command"],
        "machine": protocol.get("machine", "a machine that was not written down"),
        "seeds": f"{seeds} seed" if seeds == 1 else f"{seeds} seeds",
        "quick": protocol.get("quick", False),
        "notes": protocol.get("notes", ()),
        "figures": figures,
        "not_drawn": list(_not_drawn(run)),
        "explained": _explained(summary, chosen, metrics_of(run)[0]),
        **_tables(run, chosen),
        "energy": sorted({row["energy_note"] for row in run["rows"] if row.get("energy_note")}),
        "first_seed": first,
        "curves": curves,
        "curve_note": _curve_note(run, first),
        "maps": maps,
        "map_note": map_note,
        "protocol": {**of_task(run), **protocol},
    }


def _names(entries: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(entry["name"] for entry in entries))


def _tables(run: Row, chosen: Row | None) -> dict[str, Table | None]:
    accuracy, speed = accuracy_table(run, run["summary"]), speed_table(run["summary"])
    first = len(accuracy[1]) - len(run["summary"])  # baselines come before the networks
    shaded = [place for place, entry in enumerate(run["summary"]) if entry["selected"]]
    marked = [place for place, entry in enumerate(run["summary"]) if entry is chosen]

    def table(of: tuple[list[str], list[list[str]]], first: int) -> Table:
        return Table(*of, frozenset(first + place for place in shaded), frozenset(first + place for place in marked))

    timed = any(entry["mean"].get("latency_ms_frozen") is not None for entry in run["summary"])
    return {"accuracy": table(accuracy, first), "speed": table(speed, 0) if timed else None}


def _explained(summary: Sequence[Row], chosen: Row | None, judge: Any) -> str:
    """Of the table: only what can be seen in it."""
    parts = []
    if any(len(entry["seeds"]) > 1 for entry in summary):
        parts.append("Mean ± standard deviation over seeds.")
    if chosen is not None:
        known = chosen["mean"].get(f"val_{judge.name}") is not None
        parts.append(f"Best: the pruned network that did best on the {'validation' if known else 'test'} part.")
    if any(entry["selected"] and entry is not chosen for entry in summary):
        parts.append("Shaded: of each other method the density that did best on the validation part.")
    return " ".join(parts)


# What quality is drawn against, in this order: metric, title, axis, scale.
_COSTS = (
    ("latency_ms_frozen", "latency", "ms at batch 1, frozen", 1.0),
    ("macs_kept", "multiply-adds", "multiply-adds kept, %", 100.0),
    ("weights_kept", "density", "weights kept, %", 100.0),
    ("joules_frozen", "energy", "mJ an input, frozen", 1e3),
)


def _has(mean: Row, cost: str) -> bool:
    return counts_macs(mean) if cost == "macs_kept" else mean.get(cost) is not None


def _not_drawn(run: Row) -> Iterator[str]:
    """Costs that no network of the run has; those it was never asked for are left out."""
    means = [entry["mean"] for entry in run["summary"]]
    if means and all(mean.get("latency_ms_frozen") is None for mean in means):
        yield f"Quality against latency: {NOT_MEASURED}, the networks were not timed (--remeasure does)."
    elif means and all(mean.get("joules_frozen") is None for mean in means):
        yield f"Quality against energy: {NOT_MEASURED}, see below."


def _against(run: Row, colours: Mapping[str, int], cost: str, title: str, axis: str, cost_scale: float) -> Figure:
    judge, *_ = metrics_of(run)
    chart = Chart(axis, judge.heading, x_from_zero=True, only=True)
    known = [entry for entry in run["summary"] if entry["mean"].get(cost) is not None]

    def at(entry: Row) -> tuple[float, float]:
        return cost_scale * entry["mean"][cost], judge.scale * entry["mean"][judge.name]

    a_share = cost.endswith("_kept")
    for name in _names(known):
        entries = sorted((entry for entry in known if entry["name"] == name), key=lambda entry: entry["mean"][cost])
        points = [
            (*at(entry), _spread(entry, judge), f"{label(entry)}: {at(entry)[0]:.3g} {axis}, {shown(judge, entry)}")
            for entry in entries
        ]
        dense = entries[0]["target_density"] is None
        chart.series.append(Series(name, colours[name], points, line=a_share and not dense, hollow=dense))
    dense_one, chosen = reference(run["summary"]), best(run, run["summary"])
    if a_share:
        if dense_one is not None:
            name, value = dense_one["name"], judge.scale * dense_one["mean"][judge.name]
            chart.levels.append((f"{name} {shown(judge, dense_one)}", colours[name], value))
        scored = [score for score in run["baselines"] if score.get(judge.name) is not None]
        for score in scored:
            value = judge.scale * score[judge.name]
            chart.levels.append((f"{score['name']} {value:.{judge.digits}f}", 6, value))
    else:
        every = [point[:2] for series in chart.series for point in series.points]
        chart.front = pareto(every, judge.higher_is_better)
    if chosen is not None and any(entry is chosen for entry in known):
        chart.best = at(chosen)
    return figure(f"Quality against {title}", chart, _caption(chart))


def _spread(entry: Row, judge: Any) -> float | None:
    return None if entry["sd"].get(judge.name) is None else judge.scale * entry["sd"][judge.name]


def _caption(chart: Chart) -> str:
    """Of what is in the chart, and of nothing else."""
    said: list[tuple[Callable[[], bool], str]] = [
        (lambda: any(series.hollow for series in chart.series), "Rings: dense networks."),
        (lambda: chart.best is not None, "Circled: the best."),
        (
            lambda: any(p[2] for series in chart.series for p in series.points),
            "Bars: one standard deviation over seeds.",
        ),
        (lambda: len(chart.front) > 1, "Dashed: the Pareto front, what no other network beats in both."),
        (lambda: len(chart.beyond()) < len(chart.levels), "Dashed: for comparison, named on the right."),
    ]
    return " ".join(text for holds, text in said if holds())


def _curves(run: Row, colours: Mapping[str, int], seed: int) -> Iterator[Figure]:
    """Validation through training, first seed: the dense networks together, then one chart for each pruned one."""
    judge, *_ = metrics_of(run)
    trained = _trained(run, seed)
    dense = [row for row in trained if row["target_density"] is None]
    charts_of = [("dense networks", dense)] if dense else []
    charts_of += [(_curve_title(row), [row]) for row in trained if row["target_density"] is not None]
    for title, rows in charts_of:
        chart = Chart("epoch", validation_heading(judge), x_whole=True, width=400, height=260)
        for row in rows:
            points = [(e["epoch"], judge.scale * e[f"val_{judge.name}"], None, "") for e in row["epochs"]]
            chart.series.append(Series(row["name"], colours[row["name"]], points))
        if rows[0]["target_density"] is not None:
            chart.events = list(_events(rows[0]["epochs"]))
        yield figure(title, chart)


def _trained(run: Row, seed: int) -> list[Row]:
    return [row for row in run["rows"] if row["seed"] == seed and row.get("epochs")]


def _curve_note(run: Row, seed: int) -> str:
    events = [word for row in _trained(run, seed) if row["target_density"] for _, word in _events(row["epochs"])]
    if not events:
        return ""
    note = "Dotted: pruned to this share of the weights after that epoch"
    return f"{note}; ↺: and set back to its early values." if any("↺" in word for word in events) else f"{note}."


def _curve_title(row: Row) -> str:
    densities = {round(epoch["density"], 2) for epoch in row["epochs"]}
    return label(row) if len(densities) < 3 else row["name"]


def _events(epochs: Sequence[Row]) -> Iterator[tuple[float, str]]:
    for epoch, following in itertools.pairwise(epochs):
        if epoch["pruned"]:
            share = f"{100 * following['density']:.0f} %"
            yield epoch["epoch"] + 0.5, f"{share} ↺" if epoch.get("rewound") else share


def _maps(run: Row, seed: int) -> tuple[list[dict[str, Any]], str]:
    """Which blocks each layer keeps, for the first seed: a table of little pictures for each method; what they show."""
    rows = [row for row in run["rows"] if row["seed"] == seed and row.get("blocks")]
    if not rows:
        return [], ""
    maps = []
    for name in _names(rows):
        students = [row for row in rows if row["name"] == name]
        maps.append(
            {
                "name": name,
                "kept": [f"{row['metrics']['weights_kept']:.0%}" for row in students],
                "layers": [
                    (layer, [_map(row["blocks"][layer]) for row in students]) for layer in students[0]["blocks"]
                ],
            }
        )
    pattern = BlockPattern.parse(rows[0].get("settings", {}).get("pattern", "16x1"))
    return maps, (
        f"A row is {pattern.bh} outputs of the layer, a column {pattern.bw} of its inputs; the darker, the more of the "
        "kernel's places are kept, and empty is gone."
    )


def _map(layer: Mapping[str, Any]) -> tuple[str, str]:
    """The share that is kept, and the picture."""
    shape = layer["shape"]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(layer["bits"]), np.uint8), count=int(np.prod(shape)))
    kept = bits.reshape(*shape[:2], -1).mean(2)
    return f"{kept.mean():.0%}", _png(kept)


def _png(shares: np.ndarray) -> str:
    """A picture of [rows, columns] in 0..1: one hue that both grounds bear, as opaque as the share."""
    rows, columns = shares.shape
    pixels = np.empty((rows, 1 + 4 * columns), np.uint8)
    pixels[:, 0] = 0  # no filter
    pixels[:, 1:].reshape(rows, columns, 4)[:] = (31, 119, 200, 0)
    pixels[:, 4::4] = np.rint(255 * shares)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels.tobytes(), 9)), (b"IEND", b""))
    )
    return base64.b64encode(data).decode()
