"""Small charts as inline SVG: lines, points with deviations, a Pareto front, event marks. No script, nothing fetched.

Colours are the CSS classes `s0` .. `s9` of `STYLE`, which has them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup

# Okabe & Ito's palette, which colour-blind readers can tell apart, darkened or lightened to stand out on either ground.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b05c91", "#8a6d00", "#00868b", "#555555", "#a8323e", "#7a3fb0", "#5f7d1c")
_DARK = ("#58b4f0", "#ff9a52", "#3fd0a4", "#e79ccb", "#e6c33a", "#8fe3e0", "#b5b5b5", "#ff8590", "#c39bff", "#b7d36b")
SERIES = len(_LIGHT)


def _palette(colours: Sequence[str]) -> str:
    return " ".join(f"--s{index}: {colour};" for index, colour in enumerate(colours))


STYLE = (
    f":root {{ {_palette(_LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_palette(_DARK)} }} }}\n"
    + "\n".join(f".s{i} {{ --c: var(--s{i}); }}" for i in range(SERIES))
    + """
svg { max-width: 100%; height: auto; display: block; }
svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
svg .tick { font-size: 11px; opacity: .75; }
svg .grid { stroke: currentColor; opacity: .13; }
svg .axis { stroke: currentColor; opacity: .5; }
svg .line { stroke: var(--c); fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .spread { stroke: var(--c); stroke-width: 1.2; opacity: .6; }
svg .dot { fill: var(--c); stroke: none; }
svg .ring { fill: none; stroke: var(--c); stroke-width: 1.8; }
svg .event { stroke: currentColor; opacity: .35; stroke-dasharray: 2 3; }
svg .front { stroke: currentColor; fill: none; stroke-dasharray: 5 4; opacity: .6; }
svg .level { stroke: var(--c, currentColor); stroke-dasharray: 6 4; opacity: .7; }
svg .best { fill: none; stroke: currentColor; stroke-width: 1.4; }
svg .note { font-size: 11px; opacity: .8; }
svg .name { font-size: 11px; fill: var(--c, currentColor); }
/* A large chart is drawn smaller on a narrow page, its words are not. */
@media (max-width: 520px) {
  svg.large text { font-size: 17px; } svg.large .tick, svg.large .note, svg.large .name { font-size: 16px; }
}
"""
)
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 50  # pixels around the axes
_LARGE = 450  # pixels from which on a chart is wider than a telephone shows it
_NAMES = 150  # more of them on the right where lines have names
_ROW = 17  # between two of these, as their letters are on a narrow page
_LONGEST = 15  # letters of a name with its figure
_LETTER = 9  # pixels of a letter in the word of an event, on a narrow page


@dataclass
class Series:
    """Points (x, y, spread or None, what a tooltip says) of one colour; `line` joins them, `hollow` draws rings."""

    name: str
    colour: int
    points: Sequence[tuple[float, float, float | None, str]]
    line: bool = True
    hollow: bool = False


@dataclass
class Chart:
    """One pair of axes. `levels` are horizontal lines that are named at their right end, as in "ridge 2.56",
    `events` vertical ones with a word, `front` a polyline, `best` a point that is marked by a ring around it.

    `only` keeps the vertical axis for the points of the series: levels far above or below them are not drawn, and
    `beyond` names these.
    """

    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    levels: list[tuple[str, int, float]] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    front: Sequence[tuple[float, float]] = ()
    best: tuple[float, float] | None = None
    only: bool = False
    x_from_zero: bool = False
    y_from_zero: bool = False
    x_whole: bool = False  # ticks at whole numbers
    x_log: bool = False  # powers of ten are as far from each other
    y_log: bool = False
    width: int = 540
    height: int = 330

    def beyond(self) -> list[str]:
        """Names of the levels that would squeeze the points into a line, and are left out."""
        return [name for name, _, y in self.levels if not self._is_near(y)]

    def _is_near(self, level: float) -> bool:
        low, high = _ends(self._heights())
        return not self.only or low - (high - low) <= level <= high + (high - low)

    def _heights(self) -> list[float]:
        return [p[1] + sign * (p[2] or 0.0) for series in self.series for p in series.points for sign in (-1, 1)]

    def svg(self) -> Markup:
        """The chart; "" without a single point."""
        points = [point for series in self.series for point in series.points]
        if not points:
            return Markup("")
        levels = [level for level in self.levels if self._is_near(level[2])]
        self._right = self.width - (_NAMES if levels else _RIGHT)
        x_values = [p[0] for p in points]
        if self.x_from_zero:
            x_values.append(0.0)
        y_values = self._heights() + [y for _, _, y in levels]
        if self.y_from_zero:
            y_values.append(0.0)
        across, up = (_LEFT, self._right), (self.height - _BOTTOM, _TOP)
        self._x = _LogScale(x_values, *across) if self.x_log else _Scale(x_values, *across, self.x_whole)
        self._y = _LogScale(y_values, *up) if self.y_log else _Scale(y_values, *up)
        parts = [*self._axes(), *self._marks(), *self._levels(levels)]
        parts += [shape for one in self.series for shape in self._drawn(one)]
        if self.best is not None:
            at = (self._x(self.best[0]), self._y(self.best[1]))
            parts.append(f'<circle class="best" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="8"><title>best</title></circle>')
        title = escape(f"{self.y_label} against {self.x_label}")
        large = ' class="large"' if self.width > _LARGE else ""
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}"{large}'
        return Markup(f'<svg {size} role="img" aria-label="{title}">{"".join(parts)}</svg>')

    def _axes(self) -> list[str]:
        left, right, bottom, top = _LEFT, self._right, self.height - _BOTTOM, _TOP
        parts = []
        for value in self._y.ticks:
            y = self._y(value)
            parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        for value in self._x.ticks:
            x = self._x(value)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>')
        middle = (left + right) / 2
        parts.append(f'<text x="{middle}" y="{self.height - 8}" text-anchor="middle">{escape(self.x_label)}</text>')
        parts.append(f'<text x="6" y="15">{escape(self.y_label)}</text>')
        return parts

    def _marks(self) -> list[str]:
        bottom, parts = self.height - _BOTTOM, []
        events = sorted(self.events)
        least = _LETTER * max((len(word) for _, word in events), default=0)
        beside = _apart([self._x(x) for x, _ in events], least, _LEFT, self._right)
        for (x, word), to in zip(events, beside, strict=True):
            at = self._x(x)
            parts.append(f'<line class="event" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
            parts.append(f'<text class="note" x="{to:.1f}" y="{_TOP - 4}" text-anchor="middle">{escape(word)}</text>')
        if len(self.front) > 1:
            path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in self.front)
            parts.append(f'<polyline class="front" points="{path}"/>')
        return parts

    def _levels(self, levels: Sequence[tuple[str, int, float]]) -> list[str]:
        """Lines, and their names one below the other on the right, each as near to its line as the others let it."""
        parts = []
        ordered = sorted(levels, key=lambda level: -level[2])
        heights = _apart([self._y(y) for _, _, y in ordered], _ROW, _TOP + 4, self.height - _BOTTOM)
        for (name, colour, y), beside in zip(ordered, heights, strict=True):
            at, right = self._y(y), self._right
            word, _, figure = name.rpartition(" ")
            short = name if len(name) <= _LONGEST else f"{word[: _LONGEST - 2 - len(figure)].strip()}… {figure}"
            parts.append(
                f'<path class="level s{colour}" fill="none" d="M{_LEFT} {at:.1f}H{right}L{right + 8} {beside:.1f}">'
                f"<title>{escape(name)}</title></path>"
                f'<text class="name s{colour}" x="{right + 11}" y="{beside + 4:.1f}">{escape(short)}</text>'
            )
        return parts

    def _drawn(self, series: Series) -> list[str]:
        parts = []
        if series.line and len(series.points) > 1:
            path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y, *_ in series.points)
            parts.append(f'<polyline class="line" points="{path}"/>')
        for x, y, spread, word in series.points:
            at = (self._x(x), self._y(y))
            if spread:
                ends = (self._y(y - spread), self._y(y + spread))
                parts.append(f'<path class="spread" d="M{at[0]:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>')
            if word:
                shape = "ring" if series.hollow else "dot"
                parts.append(
                    f'<circle class="{shape}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4">'
                    f"<title>{escape(word)}</title></circle>"
                )
        return [f'<g class="s{series.colour}">', *parts, "</g>"]


def _apart(places: Sequence[float], least: float, first: float, last: float) -> list[float]:
    """Rising places moved so that each is `least` below the one before it, from `first` to `last` where they fit."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + least if moved else first))
    for index in reversed(range(len(moved))):
        limit = last if index == len(moved) - 1 else moved[index + 1] - least
        moved[index] = min(moved[index], limit)
    return moved


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest, with room between them where they are the same."""
    low, high = min(values), max(values)
    room = 0.0 if high > low else 0.05 * abs(high) or 1.0
    return low - room, high + room


class _Scale:
    """Values to pixels, with round ticks; a little room on both sides."""

    def __init__(self, values: Sequence[float], first: float, last: float, whole: bool = False):
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - room * (low != 0), high + room
        self.first, self.last = first, last
        power = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        power = max(1.0, power) if whole else power
        factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
        step = power * next(factor for factor in factors if (self.high - self.low) / (factor * power) <= 6)
        start = math.ceil(self.low / step - 1e-9)
        self.ticks = [round(k * step, 10) for k in range(start, math.floor(self.high / step + 1e-9) + 1)]

    def __call__(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


class _LogScale:
    """Positive values to pixels, by their logarithm; ticks at powers of ten."""

    def __init__(self, values: Sequence[float], first: float, last: float):
        if min(values) <= 0:
            raise ValueError(f"sparsekd.report: a logarithmic axis needs values above 0, got {min(values):g}")
        low, high = math.log10(min(values)), math.log10(max(values))
        room = 0.06 * (high - low) or 0.5
        self._pixels = _Scale([low - room, high + room], first, last)
        self.ticks = [10.0**power for power in range(math.ceil(low - room), math.floor(high + room) + 1)]

    def __call__(self, value: float) -> float:
        return self._pixels(math.log10(value))


def pareto(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    """Of (cost, quality) points those that no other beats in both, by rising cost."""
    sign = 1 if higher_is_better else -1
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * quality > sign * front[-1][1]:
            front.append((cost, quality))
    return front
