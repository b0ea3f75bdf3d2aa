"""The report of a run: `results.json` first, then everything else from it alone (terminal, Markdown, HTML).

summary.py takes means over seeds, verdict.py says in a sentence what they come to, tables.py has the tables as Markdown
and for a terminal, page.py with charts.py and templates/ makes HTML, compare.py sets several runs beside each other;
streams.py is the report of `sparsekd run stream`, sensitivity.py the page of a scan of layers.

    results.json
      schema, command, task, protocol   what was run, on which data (sha256), how, on which machine
                 (task.goal: the metrics, their headings and directions; the first one judges)
      baselines  [{name, setting, and a number for each metric}]     predictors that a network has to beat
      rows       [{name, method, seed, target_density, budget, metrics, epochs, ...}]    one for each trained network;
                 target_density is a share of what its budget counts, budget what was asked for, as in "macs=0.45"
      summary    [{name, method, target_density, seeds, selected, mean: {}, sd: {}}]
                 over seeds, sd is None for one; selected: this density of the method did best on the validation part
      published  {heading, chosen_on_test, rows: {name: {metric: value}}}     figures of others at the same task, where
                 there are; chosen_on_test: their density was, so that ours stand beside them chosen in the same way

A metric that was not measured is null in the JSON and "not measured" in the tables, never 0.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..goals import Classification, Regression
from . import compare, page, streams
from .sensitivity import sensitivity_page, write_sensitivity
from .summary import briefly, label, metrics_of, summarise
from .tables import NOT_MEASURED, Drawn, document, markdown_table, text_table
from .tables import result_tables as _tables_of_networks

__all__ = [
    "NOT_MEASURED",
    "SCHEMA",
    "comparison",
    "drawn_for_terminal",
    "for_terminal",
    "label",
    "markdown_table",
    "merge",
    "metrics_of",
    "read",
    "result_tables",
    "sensitivity_page",
    "summarise",
    "text_table",
    "with_goal",
    "write",
    "write_sensitivity",
]

SCHEMA = 1


def result_tables(results: Mapping[str, Any], draw: Drawn | None = None) -> str:
    """The result tables of a run, or of a stream, as Markdown or as `draw` shows them."""
    return streams.tables(results, draw) if results.get("kind") == streams.KIND else _tables_of_networks(results, draw)


def for_terminal(runs: Sequence[Mapping[str, Any]]) -> str:
    """What a command prints of one or several results: each under its name, no wider than the terminal."""
    draw = drawn_for_terminal()
    if runs[0].get("kind") == streams.KIND:
        names, shown = [streams.title(run) for run in runs], list(runs)
    else:
        names, shown = compare.names(runs), [briefly(run) for run in runs]
    parts = [draw(*compare.table([_summed(run) for run in shown])[:2])] if len(runs) > 1 else []
    for name, run, whole in zip(names, shown, runs, strict=True):
        parts += [f"== {name}", result_tables(run, draw)]
        if run is not whole and len(metrics_of(run)) < len(metrics_of(whole)):
            parts.append("Metrics at other cutoffs: report.md.")
    return "\n\n".join(parts)


def drawn_for_terminal() -> Drawn:
    """What draws tables as wide as the terminal is; 80 letters where there is none."""
    return partial(text_table, width=max(60, shutil.get_terminal_size().columns))


def comparison(runs: Sequence[Mapping[str, Any]]) -> str:
    """Several runs in one table, as Markdown."""
    heading, rows, _ = compare.table([_summed(run) for run in runs])
    return markdown_table(heading, rows)


def _summed(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**run, "summary": summarise(run["rows"], metrics_of(run)[0])}


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
    results = {**_summed(results), "schema": SCHEMA}
    checkpoint.write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
    return [path, *_render([results], Path(folder), path.name)]


def merge(sources: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """One report of several runs (folders or result files): merged.json, report.md and report.html in `folder`.

    Raises what `read` does.
    """
    runs = [read(source) for source in sources]
    if any(run.get("kind") == streams.KIND for run in runs):
        raise ValueError("sparsekd report: streams have a report each, they are not merged; give one folder")
    runs = [
        {**_summed(run), "source": Path(source).name or str(source)} for source, run in zip(sources, runs, strict=True)
    ]
    path = Path(folder) / "merged.json"
    checkpoint.write_atomically(path, (json.dumps({"schema": SCHEMA, "runs": runs}, indent=1) + "\n").encode())
    return [path, *_render(runs, Path(folder), path.name)]


def _render(runs: Sequence[Mapping[str, Any]], folder: Path, data: str) -> list[Path]:
    text = "\n".join(map(document, runs))
    if len(runs) > 1:
        text = f"# {len(runs)} runs compared\n\n{comparison(runs)}\n\n{text}"
    return _written({"report.md": text, "report.html": page.html(runs, data)}, folder)


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
