"""Pages from templates: what they are given is escaped, but for the charts, which escape what they draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import charts
from .charts import Chart
from .tables import inline

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["inline"] = inline


@dataclass(frozen=True)
class Table:
    """`shaded` rows are set off; `best` ones are marked with a word, too."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    shaded: frozenset[int] = frozenset()
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A chart under its title and legend."""

    title: str
    svg: Markup
    caption: str
    legend: Sequence[tuple[int, str]]  # colour and name


def figure(title: str, chart: Chart, caption: str = "") -> Figure:
    """The chart with the colours of its series as the legend; what lies beyond its axis is said below."""
    beyond = chart.beyond() if any(series.points for series in chart.series) else []
    if beyond:
        caption = f"{caption} Beyond the axis: {', '.join(beyond)}.".strip()
    return Figure(title, chart.svg(), caption, [(series.colour, series.name) for series in chart.series])


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page; the style of all reports is among what it can use."""
    return _TEMPLATES.get_template(template).render(chart_style=Markup(charts.STYLE), **values)
