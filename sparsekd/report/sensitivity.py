"""The page of a sensitivity scan: which layer a network can spare, as a chart and as a table."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint
from ..pruning import Sensitivity
from .charts import SERIES, Chart, Series
from .markup import Table, figure, render

__all__ = ["sensitivity_page", "write_sensitivity"]


def write_sensitivity(scan: Sensitivity, path: str | Path, score: str = "score") -> Path:
    """Write the page of a scan; ``score`` says what was measured, as in "validation accuracy".

    >>> write_sensitivity(sensitivity(model, accuracy), "scan.html", "accuracy")                # doctest: +SKIP
    """
    checkpoint.write_atomically(path, sensitivity_page(scan, score).encode())
    return Path(path)


def sensitivity_page(scan: Sensitivity, score: str = "score") -> str:
    """HTML: the score with one layer pruned, layer by layer from the input on, a line for each density."""
    chart = Chart("layer, from the input on", score, x_whole=True)
    chart.levels.append((f"whole {scan.whole:.4g}", 6, scan.whole))
    for place, density in enumerate(scan.densities):
        points = [
            (float(number), scores[place], None, f"{name} at density {density:g}: {scores[place]:.4g}")
            for number, (name, scores) in enumerate(scan.layers.items(), 1)
        ]
        chart.series.append(Series(f"density {density:g}", place % SERIES, points))
    heading = ["layer", *(f"at {density:g}" for density in scan.densities), "worth of a squared weight"]
    worth = scan.worth()
    rows = [
        [f"{number}  {name}", *(f"{each:.4g}" for each in scores), f"{worth[name]:.3g}"]
        for number, (name, scores) in enumerate(scan.layers.items(), 1)
    ]
    return render(
        "sensitivity.html",
        {
            "title": "sparsekd: sensitivity",
            "heading": f"Sensitivity of {len(rows)} layers",
            "chart": figure(f"{score} with one layer pruned", chart, "Dashed: the whole network."),
            "whole": f"{score} of the whole network: {scan.whole:.4g}.",
            "layers": Table(heading, rows),
        },
    )
