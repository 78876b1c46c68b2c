"""Small charts as SVG: they take their colours from the page, so that they are right in the dark too.

A chart is 360 units wide, which is a phone: letters are not smaller there than the page's own.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
Points = Sequence[Sequence[float]]


def lines(series: Mapping[str, Points], across: str, title: str) -> Markup:
    """A line for each series of (x, y); a point alone, or few of them, get a dot each."""
    points = [point for each in series.values() for point in each if _finite(point)]
    if not points:
        return Markup("")
    frame = _Frame(points, zero=False)
    drawn = []
    for index, (name, each) in enumerate(series.items()):
        places = [frame.place(*point) for point in each if _finite(point)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        # every value, behind their mean
        kind = "each " if name == "as logged" else ""
        marks = f'<polyline class="line {kind}c{index % 6}" points="{path}"/>'
        if len(places) <= 30:
            marks += "".join(
                f'<circle class="dot c{index % 6}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places
            )
        drawn.append(f"<g><title>{escape(name)}</title>{marks}</g>")
    return frame.around("".join(drawn), across, title)


def scatter(points: Points, across: str, title: str) -> Markup:
    """Dots, and the diagonal on which both coordinates are equal."""
    points = [point for point in points if _finite(point)]
    if not points:
        return Markup("")
    ends = [value for point in points for value in point]
    frame = _Frame([(min(ends), min(ends)), (max(ends), max(ends))], zero=False)
    (x0, y0), (x1, y1) = frame.place(min(ends), min(ends)), frame.place(max(ends), max(ends))
    diagonal = f'<line class="grid" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'
    dots = "".join(
        f'<circle class="dot c0 faint" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
        for x, y in (frame.place(*point) for point in points)
    )
    return frame.around(diagonal + dots, across, title)


def bars(counts: Sequence[float], ends: tuple[float, float], across: str, title: str) -> Markup:
    """A histogram whose bars part the range `ends` into like pieces."""
    low, high = ends
    frame = _Frame([(low, 0), (high, max([*counts, 1]))], zero=True)
    width = (high - low) / len(counts)
    drawn = []
    for index, count in enumerate(counts):
        left, top = frame.place(low + index * width, count)
        right, bottom = frame.place(low + (index + 1) * width, 0)
        drawn.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}"'
            f' height="{bottom - top:.1f}"><title>{count}</title></rect>'
        )
    return frame.around("".join(drawn), across, title)


class _Frame:
    """The axes around some points."""

    def __init__(self, points: Points, zero: bool):
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        self.xs = ticks(min(xs), max(xs), about=6)
        self.ys = ticks(0 if zero else min(ys), max(ys))
        self.x0, self.x1 = (min(xs), max(xs)) if max(xs) > min(xs) else (self.xs[0], self.xs[-1])
        self.y0, self.y1 = min(self.ys[0], *ys), max(self.ys[-1], *ys)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point stands."""
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def around(self, inside: str, across: str, title: str) -> Markup:
        """The whole picture."""
        drawn = []
        for value in self.ys:
            y = self.place(self.x0, value)[1]
            drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in self.xs:
            if self.x0 <= value <= self.x1:
                x = self.place(value, self.y0)[0]
                # the last number does not reach over the edge
                anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
                drawn.append(
                    f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{number(value)}</text>'
                )
        label = escape(f"{title}; across: {across}")
        # every word from outside was escaped above
        head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        return Markup(f"{head}{''.join(drawn)}{inside}</svg>")


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        size = abs(low) or 1.0
        low, high = low - size / 2, high + size / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number as an axis shows it: 4 000, 0.25, 2e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    # thin spaces part thousands
    return f"{value:,.10g}".replace(",", "\u2009") if abs(value) >= 1000 else f"{value:.4g}"


def _finite(point: Sequence[float]) -> bool:
    return all(value is not None and math.isfinite(value) for value in point)
