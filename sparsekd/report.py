"""The report of a run: `results.json` first, then everything else from it alone (Markdown, HTML, terminal).

    results.json
      schema, command, task, protocol   what was run, on which data (sha256), how, on which machine
      baselines  [{name, mae, mse, setting}]                         predictors that a network has to beat
      rows       [{name, method, seed, target_density, metrics, epochs, ...}]    one for each trained network
      summary    [{name, method, target_density, seeds, selected, mean: {}, sd: {}}]
                 over seeds, sd is None for one; selected: this density of the method did best on the validation part

A metric that was not measured is null in the JSON and "not measured" in the tables, never 0.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint

SCHEMA = 1
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


def write(results: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write results.json (with a fresh summary), report.md and report.html; returns their paths."""
    results = {**results, "schema": SCHEMA, "summary": summarise(results["rows"])}
    path = Path(folder) / "results.json"
    checkpoint.write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
    return [path, *_render([results], Path(folder))]


def merge(sources: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """One report of several runs (folders or result files): merged.json, report.md and report.html in `folder`.

    Raises what `read` does.
    """
    runs = [read(source) for source in sources]
    runs = [{**run, "summary": summarise(run["rows"])} for run in runs]
    path = Path(folder) / "merged.json"
    checkpoint.write_atomically(path, (json.dumps({"schema": SCHEMA, "runs": runs}, indent=1) + "\n").encode())
    return [path, *_render(runs, Path(folder))]


def _render(runs: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    from . import page

    files = {"report.md": "\n".join(map(markdown, runs)), "report.html": page.html(runs)}
    for name, text in files.items():
        checkpoint.write_atomically(folder / name, text.encode())
    return [folder / name for name in files]


def read(folder: str | Path) -> dict[str, Any]:
    """The contents of results.json in `folder`.  Raises FileNotFoundError, ValueError where it is no such file."""
    path = Path(folder) / "results.json" if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise FileNotFoundError(f"sparsekd report: {path} does not exist; give the folder a finished run wrote (--out)")
    try:
        results = json.loads(path.read_text())
        schema = results["schema"]
        missing = [key for key in ("task", "protocol", "baselines", "rows") if key not in results]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"sparsekd report: {path} is not a result file of sparsekd ({error!r}); run again") from error
    if schema != SCHEMA or missing:
        raise ValueError(
            f"sparsekd report: {path} has schema {schema} (this sparsekd reads {SCHEMA}) and lacks "
            f"{', '.join(missing) or 'nothing'}; use the version that wrote it, or run again"
        )
    return results


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    task, protocol = results["task"], results["protocol"]
    summary = summarise(results["rows"])
    parts = [
        f"# {task['name']}: distilled, pruned, frozen",
        f"`{results['command']}`",
        tables({**results, "summary": summary}),
        "## Protocol",
        "\n".join(f"- {key.replace('_', ' ')}: {inline(value)}" for key, value in protocol.items()),
        "\n".join(f"- {key.replace('_', ' ')}: {inline(value)}" for key, value in task.items()),
        "Charts: report.html",
    ]
    return "\n\n".join(parts) + "\n"


def tables(results: Mapping[str, Any]) -> str:
    """The result tables as Markdown that is aligned, so that a terminal shows it well too."""
    summary = results.get("summary") or summarise(results["rows"])
    accuracy = _table(*accuracy_table(results, summary))
    parts = [
        _INTRODUCTION[metric_of(results)],
        accuracy,
    ]
    seeds = {len(entry["seeds"]) for entry in summary}
    if seeds - {1}:
        parts.append("Mean ± standard deviation over seeds.")
    parts += ["Inference, dense eager network against frozen one:", _table(*speed_table(summary))]
    parts += sorted({f"Energy: {row['energy_note']}." for row in results["rows"] if row.get("energy_note")})
    group = results["task"]["name"].removeprefix("movies-")
    if group in PAPER_TABLE_4:
        parts.append("The same task in the paper (arXiv 2401.10484, Table 4; LTH-SAD keeps 55 % of the weights):")
        rows = [[name, f"{mae:.4f}", f"{mse:.4f}"] for name, (mae, mse) in PAPER_TABLE_4[group].items()]
        parts.append(_table(["paper", "MAE", "MSE"], rows))
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


def label(entry: Mapping[str, Any]) -> str:
    density = entry["target_density"]
    return entry["name"] if density is None else f"{entry['name']} @ {density:g}"


def _cell(entry: Mapping[str, Any], metric: str, scale: float, form: str) -> str:
    mean, sd = entry["mean"].get(metric), entry["sd"].get(metric)
    if mean is None:
        return NOT_MEASURED
    text = format(mean * scale, form)
    return text if sd is None else f"{text} ± {format(sd * scale, form)}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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


def _by_name(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["name"], []).append(entry)
    return groups
