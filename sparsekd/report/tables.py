"""The tables of a run, as rows of text, as Markdown, and as columns for a terminal that is no wider than it is."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..goals import Metric, Ranking
from .summary import best_on_test, counts_macs, label, metrics_of, summarise
from .verdict import sentence

NOT_MEASURED = "not measured"

# (heading, metric, scale, format) of what every network costs.
_COST = (
    ("weights kept %", "weights_kept", 100.0, ".1f"),
    ("multiply-adds kept %", "macs_kept", 100.0, ".1f"),
    ("parameters", "parameters", 1.0, ".0f"),
    ("file kB", "file_bytes", 1e-3, ".1f"),
    ("training s", "train_seconds", 1.0, ".1f"),
    ("step ms, first epoch", "step_ms_first", 1.0, ".1f"),
    ("step ms, last epoch", "step_ms_last", 1.0, ".1f"),
)
_SPEED_NAMES = ("dense", "frozen")
_Rows = list[list[str]]
Drawn = Callable[[Sequence[str], Sequence[Sequence[str]]], str]  # heading and rows -> a table
_GAP, _FIRST, _HEADING = 2, 26, 9  # letters between columns, of a first column at most, that a heading is wrapped to


def document(results: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    task, protocol = results["task"], results["protocol"]
    summary = summarise(results["rows"], metrics_of(results)[0])
    parts = [
        f"# {title_of(task['name'], results)}",
        *filter(None, [sentence(results, summary)]),
        f"`{results['command']}`",
        result_tables({**results, "summary": summary}),
        "## Protocol",
        listed(protocol),
        listed(of_task(results)),
        "Charts: report.html",
    ]
    return "\n\n".join(parts) + "\n"


def of_task(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a protocol says of the task: of its goal the name and what judges."""
    goal = results["task"].get("goal")
    said = {"goal": f"{goal['name']}, judged by {metrics_of(results)[0].heading.removeprefix('test ')}"} if goal else {}
    return {**results["task"], **said}


def title_of(name: str, results: Mapping[str, Any]) -> str:
    ranks = results["task"].get("goal", {}).get("name") == Ranking.name
    return f"{name}: {'tables of recommenders, dense and sparse' if ranks else 'distilled, pruned, frozen'}"


def result_tables(results: Mapping[str, Any], draw: Drawn | None = None) -> str:
    """The result tables, as `draw` shows each: Markdown if nothing else is said."""
    draw = draw or markdown_table
    summary = results.get("summary") or summarise(results["rows"], metrics_of(results)[0])
    accuracy = draw(*accuracy_table(results, summary))
    parts = ["Networks on the test part:", accuracy]
    seeds = {len(entry["seeds"]) for entry in summary}
    if seeds - {1}:
        parts.append("Mean ± standard deviation over seeds.")
    parts += ["Inference, dense eager network against frozen one:", draw(*speed_table(summary))]
    parts += sorted({f"Energy: {row['energy_note']}." for row in results["rows"] if row.get("energy_note")})
    if "published" in results:
        parts += [results["published"]["heading"], draw(*_published_table(results, summary))]
    return "\n\n".join(parts)


def accuracy_table(results: Mapping[str, Any], summary: Sequence[Mapping[str, Any]]) -> tuple[list[str], _Rows]:
    """Every metric on the test part, what judges on the validation part where it is known, and what a network costs."""
    metrics = metrics_of(results)
    quality = [(metric.heading, metric.name, metric.scale, f".{metric.digits}f") for metric in metrics]
    judge = metrics[0]
    if any(entry["mean"].get(f"val_{judge.name}") is not None for entry in summary):
        quality.append((validation_heading(judge), f"val_{judge.name}", judge.scale, f".{judge.digits}f"))
    counted = any(counts_macs(entry["mean"]) for entry in summary)
    columns = (*quality, *(column for column in _COST if counted or column[1] != "macs_kept"))
    rows = []
    for score in results["baselines"]:
        name = f"{score['name']} ({score['setting']})" if score.get("setting") else score["name"]
        cells = [_number(score.get(metric.name), metric) for metric in metrics]
        rows.append([name, *cells] + [""] * (len(columns) - len(cells)))
    rows += [[label(entry), *(_cell(entry, *column[1:]) for column in columns)] for entry in summary]
    return ["model", *(heading for heading, *_ in columns)], rows


def validation_heading(metric: Metric) -> str:
    return f"validation {metric.heading.removeprefix('test ')}"


def _published_table(results: Mapping[str, Any], summary: Sequence[Mapping[str, Any]]) -> tuple[list[str], _Rows]:
    """Figures of others at the same task; a metric that they do not give has no column.

    Where theirs were "chosen_on_test", ours follow, chosen in the same way and marked as such.
    """
    published = results["published"]["rows"]
    metrics = [m for m in metrics_of(results) if any(m.name in values for values in published.values())]
    rows = [[name, *(_number(values.get(m.name), m) for m in metrics)] for name, values in published.items()]
    if results["published"].get("chosen_on_test"):
        for entry in best_on_test(summary, metrics_of(results)[0]):
            cells = (_cell(entry, m.name, m.scale, f".{m.digits}f") for m in metrics)
            rows.append([f"ours, density chosen on test: {label(entry)}", *cells])
    return ["published", *(metric.heading for metric in metrics)], rows


def _number(value: float | None, metric: Metric) -> str:
    return "" if value is None else f"{metric.scale * value:.{metric.digits}f}"


def speed_table(summary: Sequence[Mapping[str, Any]]) -> tuple[list[str], _Rows]:
    batches = sorted({int(m.split("_")[-1]) for entry in summary for m in entry["mean"] if m.startswith("throughput_")})
    predicts = any(entry["mean"].get("predicted_us") is not None for entry in summary)
    heading = ["model", "latency ms, dense", "latency ms, frozen"]
    heading += [*(["latency ms, predicted"] if predicts else []), "frozen / dense"]
    for batch in batches:
        heading += [f"rows/s at batch {batch}, {kind}" for kind in _SPEED_NAMES]
    heading += [f"mJ a row, {kind}" for kind in _SPEED_NAMES]
    rows = []
    for entry in summary:
        cells = [_cell(entry, f"latency_ms_{kind}", 1.0, ".3f") for kind in _SPEED_NAMES]
        if predicts:
            cells.append(_cell(entry, "predicted_us", 1e-3, ".3f"))
        cells.append(_cell(entry, "latency_ratio", 1.0, ".2f"))
        cells += [_cell(entry, f"throughput_{kind}_{batch}", 1.0, ".0f") for batch in batches for kind in _SPEED_NAMES]
        cells += [_cell(entry, f"joules_{kind}", 1e3, ".4g") for kind in _SPEED_NAMES]
        rows.append([label(entry), *cells])
    return heading, rows


def _cell(entry: Mapping[str, Any], metric: str, scale: float, form: str) -> str:
    mean, sd = entry["mean"].get(metric), entry["sd"].get(metric)
    if mean is None:
        return NOT_MEASURED
    text = format(mean * scale, form)
    return text if sd is None else f"{text} ± {format(sd * scale, form)}"


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(heading), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if not column else "-" * (w + 1) + ":" for column, w in enumerate(widths)) + "|"
    return "\n".join([line(heading), rule, *map(line, rows)])


def text_table(heading: Sequence[str], rows: Sequence[Sequence[str]], width: int = 80) -> str:
    """Columns of at most `width` letters in all: those that do not fit beside the others follow below them, each time
    behind the first column. Long headings and names are wrapped; a column that was not measured at all is left out, and
    below the first columns a row that has nothing to say.
    """
    names = [textwrap.wrap(row[0], _FIRST, subsequent_indent="  ") or [""] for row in rows]
    columns = [
        _Column.of(heading[place], [row[place] for row in rows])
        for place in range(1, len(heading))
        if not rows or any(row[place] != NOT_MEASURED for row in rows)
    ]
    first = max(map(len, itertools.chain([heading[0]], *names)))
    blocks: list[list[_Column]] = [[]]
    for column in columns:
        if blocks[-1] and first + sum(one.width + _GAP for one in (*blocks[-1], column)) > width:
            blocks.append([])
        blocks[-1].append(column)
    return "\n\n".join(
        _block(heading[0], names, block, first, all_rows=number == 0) for number, block in enumerate(blocks)
    )


@dataclass(frozen=True)
class _Column:
    heading: list[str]  # lines
    cells: list[str]
    width: int

    @classmethod
    def of(cls, heading: str, cells: list[str]) -> _Column:
        wide = max(map(len, cells), default=0)
        lines = textwrap.wrap(heading, max(_HEADING, wide), break_long_words=False) or [""]
        return cls(lines, cells, max(wide, *map(len, lines)))


def _block(heading: str, names: _Rows, columns: Sequence[_Column], first: int, all_rows: bool) -> str:
    def lines(name: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
        """Of one row: all that is shorter stands beside the last line."""
        height = max(map(len, (name, *cells)))
        name = [*[""] * (height - len(name)), *name]
        others = [[*[""] * (height - len(cell)), *cell] for cell in cells]
        return [
            name[at].ljust(first)
            + "".join(" " * _GAP + cell[at].rjust(column.width) for column, cell in zip(columns, others, strict=True))
            for at in range(height)
        ]

    drawn = lines([heading], [column.heading for column in columns])
    drawn.append("-" * len(drawn[0]))
    for place, name in enumerate(names):
        cells = [[column.cells[place]] for column in columns]
        if all_rows or any(cell != [""] for cell in cells):
            drawn += lines(name, cells)
    return "\n".join(line.rstrip() for line in drawn)


def listed(entries: Mapping[str, Any]) -> str:
    """A Markdown list of a protocol."""
    return "\n".join(f"- {key.replace('_', ' ')}: {inline(value)}" for key, value in entries.items())


def inline(value: Any) -> str:
    """A value of a JSON file in one line; what several keys have alike is said once."""
    if isinstance(value, Mapping):
        keys_of: dict[str, list[str]] = {}
        for key, inner in value.items():
            keys_of.setdefault(inline(inner), []).append(str(key))
        said = "; ".join(f"{', '.join(keys)}{':' * (' ' in text)} {text}" for text, keys in keys_of.items())
        return said or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(inline, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
