"""Results as one SVG picture, written by hand (pure).

For each trace and queue depth a row of three panels: updates against record size (both axes
logarithmic; a policy without a limit stands at the mean size of its record), bytes to resync (bar
to the mean, tick at the 99th percentile), and the hit rate over time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from bitmapd.record.geometry import MIB
from bitmapd.units import human_size
from dmctl.simulate.chart import groups
from dmctl.simulate.result import Result

WIDTH, ROW, TOP, LEGEND = 1180, 330, 34, 22
COLOURS = (
    "#c2255c", "#1971c2", "#2f9e44", "#e8590c", "#6741d9", "#0c8599", "#868e96", "#f08c00",
    "#5c940d", "#862e9c", "#364fc7", "#a61e4d",
)  # fmt: skip
_STYLE = (
    "text{font:12px sans-serif;fill:#343a40}.t{font-weight:bold;font-size:13px}"
    ".s{font-size:11px;fill:#868e96}.g{stroke:#e9ecef}.a{stroke:#adb5bd}"
    ".l{fill:none;stroke-width:2;stroke-linejoin:round}"
)


class _Panel:
    """A rectangle with two axes; values are mapped into it."""

    def __init__(
        self, left: float, top: float, width: float, height: float, title: str, legible: str
    ) -> None:
        self.left, self.top, self.width, self.height = left, top, width, height
        self.parts = [
            f'<text class="t" x="{left:.0f}" y="{top - 20:.0f}">{escape(title)}</text>',
            f'<text class="s" x="{left:.0f}" y="{top - 6:.0f}">{escape(legible)}</text>',
            f'<path class="a" fill="none" d="M{left:.1f} {top:.1f}v{height:.1f}h{width:.1f}"/>',
        ]

    def x(self, part: float) -> float:
        return self.left + part * self.width

    def y(self, part: float) -> float:
        return self.top + (1 - part) * self.height

    def x_mark(self, part: float, label: str) -> None:
        x, bottom = self.x(part), self.top + self.height
        self.parts.append(f'<path class="g" d="M{x:.1f} {self.top:.1f}V{bottom:.1f}"/>')
        self.parts.append(
            f'<text class="s" text-anchor="middle" x="{x:.1f}" y="{bottom + 15:.1f}">'
            f"{escape(label)}</text>"
        )

    def y_mark(self, part: float, label: str) -> None:
        y = self.y(part)
        self.parts.append(f'<path class="g" d="M{self.left:.1f} {y:.1f}h{self.width:.1f}"/>')
        self.parts.append(
            f'<text class="s" text-anchor="end" x="{self.left - 6:.1f}" y="{y + 4:.1f}">'
            f"{escape(label)}</text>"
        )

    def line(self, points: Iterable[tuple[float, float]], colour: str) -> None:
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<path class="l" stroke="{colour}" d="M{path}"/>')

    def dot(self, x: float, y: float, colour: str) -> None:
        self.parts.append(
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.5" fill="{colour}"/>'
        )


class _Log:
    """A logarithmic axis over some values, from 0 to 1."""

    def __init__(self, values: Sequence[float], base: float) -> None:
        real = [value for value in values if value > 0] or [1.0]
        self.base = base
        self.low = math.floor(math.log(min(real), base) + 1e-9)
        self.high = max(math.ceil(math.log(max(real), base) - 1e-9), self.low + 1)

    def part(self, value: float) -> float:
        if value <= 0:
            return 0.0
        return (math.log(value, self.base) - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        return [self.base**power for power in range(self.low, self.high + 1)]


def render(results: Sequence[Result]) -> str:
    """The picture; there is at least one result."""
    policies = list(dict.fromkeys(result.policy for result in results))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(policies)}
    found = list(groups(results))
    legend_lines = -(-len(policies) // 8)
    height = TOP + ROW * len(found) + LEGEND * legend_lines
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        f' viewBox="0 0 {WIDTH} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for row, (trace, depth, members) in enumerate(found):
        top = TOP + ROW * row + 36
        title = f"{trace}, queue depth {depth}"
        parts += _curves(_Panel(52, top, 400, 230, title, "updates waited for per 1,000 writes,"
                                " against record size"), members, colours)  # fmt: skip
        parts += _bars(_Panel(590, top, 210, 230, "bytes to resync",
                              "mean; tick: 99th percentile"), members, colours)  # fmt: skip
        parts += _rates(_Panel(870, top, 280, 230, "hit rate",
                               "over the time of the trace"), members, colours)  # fmt: skip
    for i, name in enumerate(policies):
        x, y = 52 + (i % 8) * 138, TOP + ROW * len(found) + (i // 8) * LEGEND
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 10}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _largest(results: Sequence[Result]) -> list[Result]:
    """Of each policy the result with the largest limit."""
    return list({r.policy: r for r in sorted(results, key=lambda r: r.record_limit_bytes)}.values())


def _size(result: Result) -> float:
    """Where it stands on the axis of sizes, which begins at 1 MiB."""
    return max(result.record_limit_bytes if result.limited else result.mean_record_bytes, MIB)


def _curves(panel: _Panel, results: Sequence[Result], colours: dict[str, str]) -> list[str]:
    across, up = (
        _Log([_size(r) for r in results], 4),
        _Log([r.updates_per_1000 for r in results], 10),
    )
    for value in across.marks():
        panel.x_mark(across.part(value), human_size(value).replace(".0", ""))
    for value in up.marks():
        panel.y_mark(up.part(value), f"{value:g}")
    for name, colour in colours.items():
        mine = sorted((r for r in results if r.policy == name), key=_size)
        points = [(across.part(_size(r)), up.part(r.updates_per_1000)) for r in mine]
        if len(points) > 1 and mine[0].limited:
            panel.line(points, colour)
        for x, y in points:
            panel.dot(x, y, colour)
    return panel.parts


def _bars(panel: _Panel, results: Sequence[Result], colours: dict[str, str]) -> list[str]:
    shown = _largest(results)
    axis = _Log([max(r.mean_resync_bytes, r.p99_resync_bytes, MIB) for r in shown], 16)
    for value in axis.marks():
        panel.x_mark(axis.part(value), human_size(value).replace(".0", ""))
    step = 1 / len(shown)
    for i, result in enumerate(shown):
        colour, at = colours[result.policy], 1 - (i + 0.5) * step
        y, thick = panel.y(at), panel.height * step * 0.6
        mean = max(0.0, axis.part(result.mean_resync_bytes)) * panel.width
        panel.parts.append(
            f'<rect x="{panel.left:.1f}" y="{y - thick / 2:.1f}" width="{mean:.1f}"'
            f' height="{thick:.1f}" fill="{colour}"/>'
        )
        tick = panel.x(max(0.0, axis.part(result.p99_resync_bytes)))
        panel.parts.append(
            f'<path stroke="{colour}" stroke-width="2"'
            f' d="M{tick:.1f} {y - thick / 2 - 2:.1f}v{thick + 4:.1f}"/>'
        )
        panel.parts.append(
            f'<text class="s" text-anchor="end" x="{panel.left - 6:.1f}" y="{y + 4:.1f}">'
            f"{escape(result.policy)}</text>"
        )
    return panel.parts


def _rates(panel: _Panel, results: Sequence[Result], colours: dict[str, str]) -> list[str]:
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        panel.y_mark(value, f"{value:.0%}")
    for result in _largest(results):
        values = result.hit_rate.values
        points = [
            ((i + 0.5) / len(values), value) for i, value in enumerate(values) if value is not None
        ]
        if points:
            panel.line(points, colours[result.policy])
    return panel.parts
