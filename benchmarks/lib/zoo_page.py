"""The rows of `python -m benchmarks.zoo` as the tables of docs/zoo.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin: written by python -m benchmarks.zoo --page -->\n", "<!-- end -->\n"
NOISE = 1.05  # frozen / eager up to here is no loss
QUIET = 0.1  # share of the processors that other processes may take
Row = Mapping[str, Any]


def table(rows: Mapping[tuple[str, str], Row]) -> str:
    """Markdown. rows: by network and kind, of which a network has one or both."""
    rows = {key: row for key, row in rows.items() if not disturbed(row)}
    networks = list(dict.fromkeys(name for name, _ in rows))
    merged = {name: _merged(rows.get((name, "check"), {}), rows.get((name, "time"), {})) for name in networks}
    lines = [
        "| network | layers | traced by | norms folded | dense / eager | .3 / eager | .3 / OpenVINO |",
        "|---" * 7 + "|",
        *(_line(name, row) for name, row in merged.items()),
    ]
    return "\n".join([*_summary(merged), "", *lines, ""])


def disturbed(row: Row) -> bool:
    """Whether other processes took so much of the machine that its times say nothing."""
    return any(share > QUIET for name, share in row.items() if name.startswith("elsewhere@"))


def write(path: Path, text: str) -> None:
    """Puts the tables between the marks of the page."""
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}")


def between_marks(page: str) -> str:
    return page.partition(BEGIN)[2].partition(END)[0]


def _merged(checked: Row, timed: Row) -> Row:
    return {**checked, **timed, "failed": checked.get("failed") or timed.get("failed")}


def _line(name: str, row: Row) -> str:
    if row["failed"]:
        return f"| {name} | {row.get('converted', '-')} | {' '.join(row['failed'][:160].split())} | | | | |"
    norms = f"{_folded(row)} of {row['norms']}" if "norms" in row else "-"
    shown = " | ".join(_ratio(row, f"frozen/eager@{density}", f"eager_kept@{density}") for density in ("1", "0.3"))
    against = f"{row['frozen_us@0.3'] / row['openvino_us']:.2f}" if row.get("openvino_us") else "-"
    return f"| {name} | {row.get('converted', '-')} | {row.get('traced@0.3', '-')} | {norms} | {shown} | {against} |"


def _folded(row: Row) -> int:
    """Batch norms: a layer scale that a layer takes in, or that is a pass of its own, looks like one to the plan."""
    return min(row.get("folded@0.3", 0), row.get("norms", 0))


def _ratio(row: Row, ratio: str, kept: str) -> str:
    return "-" if row.get(ratio) is None else f"{row[ratio]:.2f}" + (" (own forward)" if row.get(kept) else "")


def _summary(merged: Mapping[str, Row]) -> list[str]:
    good = {name: row for name, row in merged.items() if not row["failed"]}
    lines = [f"- {len(good)} of {len(merged)} networks pass every stage."]
    norms, folded = sum(row.get("norms", 0) for row in good.values()), sum(map(_folded, good.values()))
    if norms:
        lines.append(f"- {folded} of {norms} batch norms are folded into a layer, or one pass of their own.")
    by = [row["traced@0.3"] for row in good.values() if "traced@0.3" in row]
    counts = ", ".join(f"{by.count(one)} {_TRACED[one]}" for one in _TRACED if by.count(one))
    if by:
        lines.append(f"- {counts}.")
    for density, words in (("1", "dense"), ("0.3", "at density .3")):
        timed = {name: row[f"frozen/eager@{density}"] for name, row in good.items() if f"frozen/eager@{density}" in row}
        if timed:
            lines.append(
                f"- Frozen / eager, {words}: median {statistics.median(timed.values()):.2f} of {len(timed)} networks."
            )
            slow = [f"{name} ({ratio:.2f})" for name, ratio in timed.items() if ratio > NOISE]
            lines.append(f"  Slower than eager by more than 5 %: {', '.join(slow) or 'none'}.")
    theirs = [row["frozen_us@0.3"] / row["openvino_us"] for row in good.values() if row.get("openvino_us")]
    if theirs:
        lines.append(
            f"- Frozen at density .3 / dense OpenVINO: median {statistics.median(theirs):.2f} of {len(theirs)}."
        )
    machines = [row["machine"] for row in good.values() if "machine" in row]
    if machines:
        one = machines[-1]
        lines.append(f"- {one['cpu']}, {one['isa']}, {one['threads']} threads, torch {one['torch']}; batch 1, float32.")
    return lines


_TRACED = {
    "torch.fx": "traced by torch.fx",
    "torch.export": "by torch.export",
    "torch.export of one size": "by torch.export with the example's sizes",
    "no": "not at all",
}
