"""Curves over steps as values of a picture, which the page draws as SVG: places, labels, tips."""

import math
import re

import numpy as np

POINTS, TIPS = 240, 40  # of a curve: parts that it is drawn in, and parts that show their numbers
FEW = 20  # numbers, each of which is a dot of its curve
MAX_SKIPPED = 200  # skipped steps that are marked
WIDTH, HEIGHT = 380, 220  # of a picture, in its own units, as are its margins
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 34

Curve = tuple[str, list[int], list[float]]  # name, steps, finite numbers


def curve(name: str, log: list[dict], key: str, factor: float = 1.0) -> Curve:
    """A number of a log over its steps; NaN, infinity and what is no number are left out."""
    rows = [
        (row["step"], factor * row[key])
        for row in log
        if isinstance(row["step"], int)
        and isinstance(row.get(key), (int, float))
        and abs(row[key]) < 1e100
    ]
    return name, [step for step, _ in rows], [value for _, value in rows]


def chart(
    title: str,
    unit: str,
    curves: list[Curve],
    skipped: list = (),
    log: bool = False,
    begins: list = (),
    span: tuple[int, ...] = (),
    window: int = 0,
) -> dict | None:
    """One panel; None without a number.

    skipped: (step, text) of steps to mark;  begins: (step, text, curve) of steps from where on
    something is different, in one curve or (None) in all;  log: a logarithmic scale, if all is
    positive and spans decades;  span: steps that the axis shows at least;  window: numbers of which
    the mean is drawn at the last of them, 1: no mean, 0: a twentieth of those of the curve.
    Returns: `rows` and `columns` of the grid (place, label), `curves` (name, last mean), `dots`
    (curve, x, y) of short curves, `paths` (kind, curve, SVG path), `tips` (left side, text),
    `marks` (x, text) and `begins` (x, text, curve).
    """
    values = [value for _, _, numbers in curves for value in numbers]
    if not values:
        return None
    steps = [step for _, own, _ in curves for step in own] + [step for step, _ in skipped]
    steps += span
    scale = _Scale(steps, values, log)
    dots, raw, smooth, tips, ends = [], [], [], {}, {}
    for k, (name, own, numbers) in enumerate(curves):
        if not numbers:
            continue
        numbers, width = np.array(numbers), window or max(1, len(numbers) // 20)
        average = _average(numbers, width)
        ends[k] = f"{average[-1]:.3g}"
        for i in _middles(numbers, TIPS):
            tips.setdefault(own[i], []).append(f"{name} {average[i]:.3g}")
        if len(numbers) <= FEW:
            dots += [(k, scale.x(x), scale.y(y)) for x, y in zip(own, numbers.tolist())]
        if len(numbers) > 1:
            places = dict.fromkeys([0, *_middles(numbers, POINTS), len(numbers) - 1])
            smooth.append(("smooth", k, scale.path(own, average, places)))
        if width > 1:
            raw.append(("raw", k, scale.path(own, numbers, _peaks(numbers))))
    columns = ticks(scale.first, scale.last) if len(set(steps)) > 1 else [scale.first]
    shift = (WIDTH - LEFT - RIGHT) / TIPS / 2
    texts = [(step, f"step {step}: {', '.join(parts)}") for step, parts in sorted(tips.items())]
    return {
        "title": title,
        "unit": unit,
        "log": scale.log,
        "curves": [(name, ends.get(k, "–")) for k, (name, _, _) in enumerate(curves)],
        "rows": [(scale.y(value), _short(value)) for value in scale.rows()],
        "columns": [(scale.x(step), f"{step:g}") for step in columns if step == int(step)],
        "dots": dots,
        "paths": raw + smooth,
        "tips": [(scale.x(step, -shift), text) for step, text in texts],
        "marks": [(scale.x(step), why) for step, why in skipped[:MAX_SKIPPED]],
        "begins": [
            (scale.x(step), text, k) for step, text, k in begins if scale.first < step < scale.last
        ],
    }


class _Scale:
    """Steps first ... last to x and numbers low ... high to y. log: low and high are exponents."""

    def __init__(self, steps: list[int], values: list[float], log: bool):
        least, most = min(values), max(values)
        self.log = log and least > 0 and most > 20 * least
        ends = (math.log10(least), math.log10(most)) if self.log else (min(0.0, least), most)
        self.low, self.high = ends if ends[1] > ends[0] else (ends[0], ends[0] + 1.0)
        self.first, self.last = min(steps), max(max(steps), min(steps) + 1)

    def x(self, step: float, shift: float = 0.0) -> float:
        share = (step - self.first) / (self.last - self.first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT) + shift, 1)

    def y(self, value: float) -> float:
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, steps: list[int], values, indices) -> str:
        return "M" + "L".join(f"{self.x(steps[i])} {self.y(float(values[i]))}" for i in indices)

    def rows(self) -> list[float]:
        """Numbers that get a line of the grid."""
        if not self.log:
            return ticks(self.low, self.high)
        factors = (1,) if self.high - self.low > 2 else (1, 3)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        rows = [factor * 10.0**power for power in powers for factor in factors]
        return [row for row in rows if self.low <= math.log10(row) <= self.high]


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round numbers between low and high, some `number` of them."""
    size = (high - low) / number
    power = 10.0 ** math.floor(math.log10(size))
    unit = next(u * power for u in (1, 2, 5, 10) if u * power >= size * 0.999)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [k * unit for k in range(first, last + 1)]


def _average(values: np.ndarray, width: int) -> np.ndarray:
    """Of each number and those before it, `width` in all, the mean; at the beginning of fewer."""
    stop, total = np.arange(1, len(values) + 1), np.cumsum(np.append(0.0, values))
    start = np.maximum(stop - width, 0)
    # sums of far larger numbers are rounded: an average is never outside of its numbers
    return np.clip((total[stop] - total[start]) / (stop - start), values.min(), values.max())


def _short(value: float) -> str:
    """A label that has room: 0.0006 is 6e-4."""
    text = f"{value:.3g}"
    return re.sub(r"(\.0)?e\+?(-?)0*", r"e\2", f"{value:.1e}") if len(text) > 5 else text


def _parts(values: np.ndarray, count: int) -> list[np.ndarray]:
    """Indices in at most so many parts of about one size."""
    return np.array_split(np.arange(len(values)), min(count, len(values)))


def _middles(values: np.ndarray, count: int) -> list[int]:
    return [int(part[len(part) // 2]) for part in _parts(values, count)]


def _peaks(values: np.ndarray) -> list[int]:
    """The lowest and the highest of each part: none is lost in a picture."""
    parts = _parts(values, POINTS)
    return [i for p in parts for i in sorted({p[values[p].argmin()], p[values[p].argmax()]})]
