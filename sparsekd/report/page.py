"""The report as one self-contained HTML page, from the contents of results.json alone: no script, nothing fetched."""

from __future__ import annotations

import base64
import itertools
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ..blocks import BlockPattern
from . import charts
from .charts import Chart, Series, pareto
from .summary import label, metrics_of
from .tables import NOT_MEASURED, accuracy_table, inline, speed_table, validation_heading

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.35rem; margin: 2.6rem 0 .4rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
code, .small { font-size: .86em; } code { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: normal; }
tr.selected td { background: var(--soft); font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 1rem 1.6rem; }
.wide { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem 1.6rem; }
figure { margin: .4rem 0; } figcaption { font-size: .88rem; opacity: .85; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .88rem; margin: .3rem 0; }
.legend span::before { content: ""; display: inline-block; width: .8em; height: .8em; border-radius: 50%;
  background: var(--c); margin-right: .4em; }
details { margin: .6rem 0; } summary { cursor: pointer; }
.blocks img { image-rendering: pixelated; width: 168px; height: 22px; display: block; border: 1px solid var(--line); }
.blocks td, .blocks th { border: 0; padding: .12rem .35rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .88rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
"""
Row = Mapping[str, Any]


def html(runs: Sequence[Mapping[str, Any]]) -> str:
    """One page about one or several results (as `report.read` gives them, each with its summary)."""
    title = ", ".join(dict.fromkeys(run["task"]["name"] for run in runs))
    sections = "".join(_section(run) for run in runs)
    return document(f"sparsekd: {title}", f"<h1>Distilled, pruned, frozen</h1>{sections}")


def document(title: str, body: str) -> str:
    """A page with the style of all reports."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{charts.STYLE}</style></head><body>{body}</body></html>\n"
    )


def _section(run: Mapping[str, Any]) -> str:
    colours = {name: index % charts.SERIES for index, name in enumerate(_names(run["summary"]))}
    quick = " <strong>A quick run: not to be quoted.</strong>" if run["protocol"].get("quick") else ""
    seeds = max((len(entry["seeds"]) for entry in run["summary"]), default=0)
    parts = [
        f"<h2>{escape(run['task']['name'])}</h2>",
        f"<p><code>{escape(run['command'])}</code><br><span class=small>{escape(run['protocol'].get('machine', ''))}; "
        f"{_counted(seeds, 'seed')}.{quick}</span></p>",
        "".join(f"<p class=small>{escape(note)}.</p>" for note in run["protocol"].get("notes", ())),
        _tables(run),
        '<div class="wide">',
        _against_cost(run, colours, "latency_ms_frozen", "ms at batch 1, frozen", 1.0),
        _against_density(run, colours),
        _against_cost(run, colours, "joules_frozen", "mJ an input, frozen", 1e3),
        "</div>",
        _curves(run, colours),
        _maps(run),
        _protocol(run),
    ]
    return "".join(parts)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _names(entries: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(entry["name"] for entry in entries))


def _tables(run: Mapping[str, Any]) -> str:
    accuracy, speed = accuracy_table(run, run["summary"]), speed_table(run["summary"])
    first = len(accuracy[1]) - len(run["summary"])  # baselines come before the networks
    chosen = {first + index for index, entry in enumerate(run["summary"]) if entry["selected"]}
    note = " Shaded: the density of a method that did best on the validation part." if chosen else ""
    parts = [f"<p class=small>Mean ± standard deviation over seeds, test part.{note}</p>", table(*accuracy, chosen)]
    if any(entry["mean"].get("latency_ms_frozen") is not None for entry in run["summary"]):
        shaded = {index - first for index in chosen}
        parts += ["<h3>Inference: dense and eager against frozen</h3>", table(*speed, shaded)]
    else:
        parts.append("<p class=small>Inference times: not measured.</p>")
    energy = sorted({row["energy_note"] for row in run["rows"] if row.get("energy_note")})
    return "".join([*parts, *(f"<p class=small>Energy: {escape(note)}.</p>" for note in energy)])


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], shaded: set[int]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heading)
    body = ""
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f"<tr class=selected>{cells}</tr>" if index in shaded else f"<tr>{cells}</tr>"
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _against_density(run: Mapping[str, Any], colours: Mapping[str, int]) -> str:
    judge, *_ = metrics_of(run)
    metric, scale = judge.name, judge.scale
    chart = Chart("weights kept, %", judge.heading)
    for name in _names(run["summary"]):
        entries = [entry for entry in run["summary"] if entry["name"] == name]
        points = [
            (
                100 * entry["mean"]["weights_kept"],
                scale * entry["mean"][metric],
                None if entry["sd"][metric] is None else scale * entry["sd"][metric],
                f"{label(entry)}: {scale * entry['mean'][metric]:.4g}",
            )
            for entry in sorted(entries, key=lambda entry: entry["mean"]["weights_kept"])
        ]
        if entries[0]["target_density"] is None:
            chart.levels.append((points[0][3], colours[name], points[0][1]))
        chart.series.append(Series(name, colours[name], points, hollow=entries[0]["target_density"] is None))
    for score in run["baselines"]:
        if metric in score:
            chart.levels.append((f"{score['name']}: {scale * score[metric]:.4g}", 6, scale * score[metric]))
    caption = "Dense networks are rings with a dashed line; bars are one standard deviation over seeds."
    return figure("Quality against density", chart, caption, colours)


def _against_cost(run: Mapping[str, Any], colours: Mapping[str, int], cost: str, axis: str, cost_scale: float) -> str:
    judge, *_ = metrics_of(run)
    metric, scale = judge.name, judge.scale
    chart = Chart(axis, judge.heading, x_from_zero=True)
    known = [entry for entry in run["summary"] if entry["mean"].get(cost) is not None]
    for name in _names(known):
        entries = [entry for entry in known if entry["name"] == name]
        points = [
            (
                cost_scale * entry["mean"][cost],
                scale * entry["mean"][metric],
                None,
                f"{label(entry)}: {cost_scale * entry['mean'][cost]:.3g} {axis}, {scale * entry['mean'][metric]:.4g}",
            )
            for entry in entries
        ]
        chart.series.append(
            Series(name, colours[name], points, line=False, hollow=entries[0]["target_density"] is None)
        )
    every = [point[:2] for series in chart.series for point in series.points]
    chart.front = pareto(every, judge.higher_is_better)
    title = f"Quality against {'latency' if cost.startswith('latency') else 'energy'}"
    if not known:
        return f"<figure><h3>{title}</h3><p>{NOT_MEASURED}: {escape(_why_not(run))}</p></figure>"
    return figure(title, chart, "Dashed: the Pareto front, what no other network beats in both.", colours)


def _why_not(run: Mapping[str, Any]) -> str:
    notes = [row["energy_note"] for row in run["rows"] if row.get("energy_note")]
    return notes[0].removeprefix("not measured: ") if notes else "the networks were not timed (--remeasure does)"


def figure(title: str, chart: Chart, caption: str, colours: Mapping[str, int]) -> str:
    legend = "".join(f'<span class="s{colours[series.name]}">{escape(series.name)}</span>' for series in chart.series)
    return (
        f"<figure><h3>{escape(title)}</h3><div class=legend>{legend}</div>{chart.svg()}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _curves(run: Mapping[str, Any], colours: Mapping[str, int]) -> str:
    """Validation through training, first seed: the dense networks together, then one chart for each pruned one."""
    judge, *_ = metrics_of(run)
    metric, scale = judge.name, judge.scale
    seed = min((row["seed"] for row in run["rows"]), default=0)
    trained = [row for row in run["rows"] if row["seed"] == seed and row.get("epochs")]
    dense = [row for row in trained if row["target_density"] is None]
    charts_of = [("dense networks", dense)] if dense else []
    charts_of += [(_curve_title(row), [row]) for row in trained if row["target_density"] is not None]
    figures = []
    for title, rows in charts_of:
        chart = Chart("epoch", validation_heading(judge), x_whole=True, width=400, height=250)
        for row in rows:
            points = [(e["epoch"], scale * e[f"val_{metric}"], None, "") for e in row["epochs"]]
            chart.series.append(Series(row["name"], colours[row["name"]], points))
        if rows[0]["target_density"] is not None:
            chart.events = list(_events(rows[0]["epochs"]))
        legend = "".join(f'<span class="s{colours[r["name"]]}">{escape(r["name"])}</span>' for r in rows)
        figures.append(f"<figure><h4>{escape(title)}</h4><div class=legend>{legend}</div>{chart.svg()}</figure>")
    if not figures:
        return ""
    note = "Dotted: pruned to this share of the weights after that epoch; ↺: and set back to its early values."
    return f"<h3>Training (seed {seed})</h3><p class=small>{note}</p><div class=grid>{''.join(figures)}</div>"


def _curve_title(row: Row) -> str:
    densities = {round(epoch["density"], 2) for epoch in row["epochs"]}
    return label(row) if len(densities) < 3 else row["name"]


def _events(epochs: Sequence[Row]) -> Iterator[tuple[float, str]]:
    for epoch, following in itertools.pairwise(epochs):
        if epoch["pruned"]:
            share = f"{100 * following['density']:.0f} %"
            yield epoch["epoch"] + 0.5, f"{share} ↺" if epoch.get("rewound") else share


def _maps(run: Mapping[str, Any]) -> str:
    """Which blocks each layer keeps, for the first seed: a table of little pictures for each method."""
    parts = []
    seed = min((row["seed"] for row in run["rows"]), default=0)
    rows = [row for row in run["rows"] if row["seed"] == seed and row.get("blocks")]
    for index, name in enumerate(_names(rows)):
        students = [row for row in rows if row["name"] == name]
        head = "".join(f"<th>keeps {row['metrics']['weights_kept']:.0%}</th>" for row in students)
        body = "".join(
            f"<tr><td>{escape(layer)}</td>"
            + "".join(f"<td>{_map(row['blocks'][layer])}</td>" for row in students)
            + "</tr>"
            for layer in students[0]["blocks"]
        )
        details = "<details open>" if index == 0 else "<details>"
        parts.append(
            f"{details}<summary>{escape(name)}</summary><div class=scroll><table class=blocks>"
            f"<tr><th></th>{head}</tr>{body}</table></div></details>"
        )
    if not parts:
        return ""
    pattern = BlockPattern.parse(rows[0].get("settings", {}).get("pattern", "16x1"))
    note = (
        f"A row is {pattern.bh} outputs of the layer, a column {pattern.bw} of its inputs; the darker, the more of the "
        "kernel's places are kept, and empty is gone."
    )
    return f"<h3>Kept blocks (seed {seed})</h3><p class=small>{note}</p>{''.join(parts)}"


def _map(layer: Mapping[str, Any]) -> str:
    shape = layer["shape"]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(layer["bits"]), np.uint8), count=int(np.prod(shape)))
    kept = bits.reshape(*shape[:2], -1).mean(2)
    return f'<img alt="{kept.mean():.0%} kept" title="{kept.mean():.0%} kept" src="data:image/png;base64,{_png(kept)}">'


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


def _protocol(run: Mapping[str, Any]) -> str:
    entries = {**run["task"], **run["protocol"]}
    items = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(inline(value))}</dd>" for key, value in entries.items()
    )
    return f"<details><summary>Protocol: data, settings, machine, versions</summary><dl>{items}</dl></details>"
