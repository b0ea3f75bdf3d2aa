"""The report of a run: `results.json` first, then everything else from it alone (terminal, Markdown, HTML).

summary.py takes means over seeds, tables.py puts them into Markdown, page.py with charts.py into HTML; streams.py is
the report of `sparsekd run stream`, sensitivity.py the page of a scan of layers.

    results.json
      schema, command, task, protocol   what was run, on which data (sha256), how, on which machine
                 (task.goal: the metrics, their headings and directions; the first one judges)
      baselines  [{name, setting, and a number for each metric}]     predictors that a network has to beat
      rows       [{name, method, seed, target_density, budget, metrics, epochs, ...}]    one for each trained network;
                 target_density is a share of what its budget counts, budget what was asked for, as in "macs=0.45"
      summary    [{name, method, target_density, seeds, selected, mean: {}, sd: {}}]
                 over seeds, sd is None for one; selected: this density of the method did best on the validation part
      published  {heading, rows: {name: {metric: value}}}            figures of others at the same task, where there are

A metric that was not measured is null in the JSON and "not measured" in the tables, never 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..goals import Classification, Regression
from . import page, streams
from .sensitivity import sensitivity_page, write_sensitivity
from .summary import label, metrics_of, summarise
from .tables import NOT_MEASURED, document, markdown_table
from .tables import result_tables as _tables_of_networks

__all__ = [
    "NOT_MEASURED",
    "SCHEMA",
    "label",
    "markdown_table",
    "merge",
    "metrics_of",
    "read",
    "result_tables",
    "sensitivity_page",
    "summarise",
    "with_goal",
    "write",
    "write_sensitivity",
]

SCHEMA = 1


def result_tables(results: Mapping[str, Any]) -> str:
    """The result tables of a run, or of a stream, as Markdown."""
    return streams.tables(results) if results.get("kind") == streams.KIND else _tables_of_networks(results)


def write(results: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write results.json (with a fresh summary), report.md and report.html; returns their paths."""
    path = Path(folder) / "results.json"
    if results.get("kind") == streams.KIND:
        results = {**results, "schema": SCHEMA}
        checkpoint.write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
        return [
            path,
            *_written({"report.md": streams.document(results), "report.html": streams.html(results)}, Path(folder)),
        ]
    results = {**results, "schema": SCHEMA, "summary": summarise(results["rows"], metrics_of(results)[0])}
    checkpoint.write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
    return [path, *_render([results], Path(folder))]


def merge(sources: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """One report of several runs (folders or result files): merged.json, report.md and report.html in `folder`.

    Raises what `read` does.
    """
    runs = [read(source) for source in sources]
    if any(run.get("kind") == streams.KIND for run in runs):
        raise ValueError("sparsekd report: streams have a report each, they are not merged; give one folder")
    runs = [{**run, "summary": summarise(run["rows"], metrics_of(run)[0])} for run in runs]
    path = Path(folder) / "merged.json"
    checkpoint.write_atomically(path, (json.dumps({"schema": SCHEMA, "runs": runs}, indent=1) + "\n").encode())
    return [path, *_render(runs, Path(folder))]


def _render(runs: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    return _written({"report.md": "\n".join(map(document, runs)), "report.html": page.html(runs)}, folder)


def _written(files: Mapping[str, str], folder: Path) -> list[Path]:
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
        if results.get("kind") == streams.KIND and schema == SCHEMA and {"arms", "windows", "stream"} <= results.keys():
            return results
        missing = [key for key in ("task", "protocol", "baselines", "rows") if key not in results]
        missing += [] if "name" in results.get("task", ["name"]) else ["the name of its task"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"sparsekd report: {path} is not a result file of sparsekd ({error!r}); run again") from error
    if schema != SCHEMA or missing:
        raise ValueError(
            f"sparsekd report: {path} has schema {schema} (this sparsekd reads {SCHEMA}) and lacks "
            f"{', '.join(missing) or 'nothing'}; use the version that wrote it, or run again"
        )
    results = with_goal(results)
    try:
        metrics_of(results)[0]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"sparsekd report: {path} does not say what its numbers are: task.goal.metrics must list at least one "
            f"metric with name and heading ({error!r}); run again"
        ) from error
    return results


def with_goal(results: dict[str, Any]) -> dict[str, Any]:
    """Files from before there were goals say what they hold by a word."""
    task = results["task"]
    if "goal" in task:
        return results
    goal = Classification() if task.get("kind") == "images" else Regression()
    return {**results, "task": {**task, "goal": goal.describe()}}
