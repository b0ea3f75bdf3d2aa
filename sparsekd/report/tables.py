"""The tables of a run, as rows of text and as Markdown that is aligned, so that a terminal shows it well too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .summary import label, metric_of, summarise

NOT_MEASURED = "not measured"

# Table 4 of arXiv 2401.10484 (MAE, MSE); its test films are 498 later than 2013, ours 503.
PAPER_TABLE_4 = {
    "categorical": {"DCNN": (0.8594, 1.22), "SAD": (0.8143, 1.183), "LTH-SAD": (0.8212, 1.151)},
    "numerical": {"DCNN": (0.7455, 0.98), "SAD": (0.7714, 1.041), "LTH-SAD": (0.8607, 1.255)},
    "social": {"DCNN": (2.086, 5.028), "SAD": (0.88, 1.229), "LTH-SAD": (0.81, 1.106)},
    "textual": {"DCNN": (1.375, 2.593), "SAD": (1.163, 1.942), "LTH-SAD": (0.871, 1.319)},
}

# (heading, metric, scale, format) of the two tables of networks.
_QUALITY = {
    "mse": (("MAE", "mae", 1.0, ".4f"), ("MSE", "mse", 1.0, ".4f")),
    "accuracy": (("test accuracy %", "accuracy", 100.0, ".2f"), ("validation %", "val_accuracy", 100.0, ".2f")),
}
_INTRODUCTION = {
    "mse": "Test errors (predictions clipped to the range of the target):",
    "accuracy": "Networks on the test part:",
}
_COST = (
    ("weights kept %", "weights_kept", 100.0, ".1f"),
    ("parameters", "parameters", 1.0, ".0f"),
    ("file kB", "file_bytes", 1e-3, ".1f"),
    ("training s", "train_seconds", 1.0, ".1f"),
    ("step ms, first epoch", "step_ms_first", 1.0, ".1f"),
    ("last", "step_ms_last", 1.0, ".1f"),
)
_SPEED_NAMES = ("dense", "frozen")
_Rows = list[list[str]]


def document(results: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    task, protocol = results["task"], results["protocol"]
    summary = summarise(results["rows"])
    parts = [
        f"# {task['name']}: distilled, pruned, frozen",
        f"`{results['command']}`",
        result_tables({**results, "summary": summary}),
        "## Protocol",
        "\n".join(f"- {key.replace('_', ' ')}: {inline(value)}" for key, value in protocol.items()),
        "\n".join(f"- {key.replace('_', ' ')}: {inline(value)}" for key, value in task.items()),
        "Charts: report.html",
    ]
    return "\n\n".join(parts) + "\n"


def result_tables(results: Mapping[str, Any]) -> str:
    """The result tables as Markdown that is aligned, so that a terminal shows it well too."""
    summary = results.get("summary") or summarise(results["rows"])
    accuracy = markdown_table(*accuracy_table(results, summary))
    parts = [
        _INTRODUCTION[metric_of(results)],
        accuracy,
    ]
    seeds = {len(entry["seeds"]) for entry in summary}
    if seeds - {1}:
        parts.append("Mean ± standard deviation over seeds.")
    parts += ["Inference, dense eager network against frozen one:", markdown_table(*speed_table(summary))]
    parts += sorted({f"Energy: {row['energy_note']}." for row in results["rows"] if row.get("energy_note")})
    group = results["task"]["name"].removeprefix("movies-")
    if group in PAPER_TABLE_4:
        parts.append("The same task in the paper (arXiv 2401.10484, Table 4; LTH-SAD keeps 55 % of the weights):")
        rows = [[name, f"{mae:.4f}", f"{mse:.4f}"] for name, (mae, mse) in PAPER_TABLE_4[group].items()]
        parts.append(markdown_table(["paper", "MAE", "MSE"], rows))
    return "\n\n".join(parts)


def accuracy_table(results: Mapping[str, Any], summary: Sequence[Mapping[str, Any]]) -> tuple[list[str], _Rows]:
    columns = (*_QUALITY[metric_of(results)], *_COST)
    rows = []
    for score in results["baselines"]:
        name = f"{score['name']} ({score['setting']})" if score.get("setting") else score["name"]
        rows.append([name, f"{score['mae']:.4f}", f"{score['mse']:.4f}"] + [""] * (len(columns) - 2))
    rows += [[label(entry), *(_cell(entry, *column[1:]) for column in columns)] for entry in summary]
    return ["model", *(heading for heading, *_ in columns)], rows


def speed_table(summary: Sequence[Mapping[str, Any]]) -> tuple[list[str], _Rows]:
    batches = sorted({int(m.split("_")[-1]) for entry in summary for m in entry["mean"] if m.startswith("throughput_")})
    heading = ["model", "latency ms, dense", "frozen", "frozen / dense"]
    for batch in batches:
        heading += [f"rows/s at batch {batch}, dense", "frozen"]
    heading += ["mJ a row, dense", "frozen"]
    rows = []
    for entry in summary:
        cells = [_cell(entry, f"latency_ms_{kind}", 1.0, ".3f") for kind in _SPEED_NAMES]
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


def inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {inline(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(inline, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
