"""Curves over steps as values of a picture: places, labels and tips, which the page draws as SVG."""

import dataclasses
import math

import numpy as np

POINTS, TIPS = 240, 40  # of a curve: parts that it is drawn in, and parts that show their numbers
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
    skipped: list[tuple[int, str]] = (),
    log: bool = False,
) -> dict | None:
    """One panel; None without a number.

    skipped: (step, why) of steps to mark;  log: a logarithmic scale, if all is positive and spans
    decades. Returns: `rows` and `columns` of the grid (place, label), `dots` (curve, x, y) of
    curves of one step, `paths` (kind, curve, SVG path), `tips` (left side, text), `marks` (x, why).
    """
    values = [value for _, _, numbers in curves for value in numbers]
    if not values:
        return None
    steps = [step for _, own, _ in curves for step in own] + [step for step, _ in skipped]
    scale = _scale(steps, values, log)
    dots, raw, smooth, tips = [], [], [], {}
    for k, (name, own, numbers) in enumerate(curves):
        average, half = _average(numbers)
        for i in map(_middle, _parts(numbers, TIPS)):
            tips.setdefault(own[i], []).append(f"{name} {average[i]:.4g}")
        if len(numbers) == 1:
            dots.append((k, scale.x(own[0]), scale.y(numbers[0])))
        elif numbers:
            middle = [0, *map(_middle, _parts(numbers, POINTS)), len(numbers) - 1]
            smooth.append(("smooth", k, scale.path(own, average, dict.fromkeys(middle))))
        if half:
            raw.append(("raw", k, scale.path(own, numbers, _ends(numbers))))
    columns = ticks(scale.first, scale.last) if len(set(steps)) > 1 else [scale.first]
    shift = (WIDTH - LEFT - RIGHT) / TIPS / 2
    texts = [(step, f"step {step}: {', '.join(parts)}") for step, parts in sorted(tips.items())]
    return {
        "title": title,
        "unit": unit,
        "log": scale.log,
        "names": [name for name, _, _ in curves],
        "rows": [(scale.y(value), f"{value:.3g}") for value in scale.rows()],
        "columns": [(scale.x(step), f"{step:g}") for step in columns if step == int(step)],
        "dots": dots,
        "paths": raw + smooth,
        "tips": [(scale.x(step, -shift), text) for step, text in texts],
        "marks": [(scale.x(step), why) for step, why in skipped[:MAX_SKIPPED]],
    }


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Steps first ... last to x and numbers low ... high to y. log: low and high are exponents."""

    first: int
    last: int
    low: float
    high: float
    log: bool

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


def _scale(steps: list[int], values: list[float], log: bool) -> _Scale:
    least, most = min(values), max(values)
    log = log and least > 0 and most > 20 * least
    low, high = (math.log10(least), math.log10(most)) if log else (min(0.0, least), most)
    last = max(max(steps), min(steps) + 1)
    return _Scale(min(steps), last, low, high if high > low else low + 1.0, log)


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round numbers between low and high, some `number` of them."""
    size = (high - low) / number
    power = 10.0 ** math.floor(math.log10(size))
    unit = next(u * power for u in (1, 2, 5, 10) if u * power >= size * 0.999)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [k * unit for k in range(first, last + 1)]


def _average(numbers: list[float]) -> tuple[np.ndarray, int]:
    """The moving average over a twentieth of a curve, and how far it reaches to either side."""
    values, place, half = np.array(numbers), np.arange(len(numbers)), len(numbers) // 40
    total = np.cumsum(np.append(0.0, values))
    stop, start = np.minimum(place + half + 1, len(numbers)), np.maximum(place - half, 0)
    average = (total[stop] - total[start]) / (stop - start)
    # sums of far larger numbers are rounded: an average is never outside of its numbers
    return np.clip(average, min(numbers, default=0.0), max(numbers, default=0.0)), half


def _parts(numbers: list[float], count: int) -> list[range]:
    """Indices in at most so many parts of about one size."""
    return np.array_split(np.arange(len(numbers)), min(count, len(numbers))) if numbers else []


def _middle(part: np.ndarray) -> int:
    return int(part[len(part) // 2])


def _ends(numbers: list[float]) -> list[int]:
    """Indices of the lowest and the highest of each part: no peak is lost."""
    values = np.array(numbers)
    parts = _parts(numbers, POINTS)
    pairs = [{part[values[part].argmin()], part[values[part].argmax()]} for part in parts]
    return [i for pair in pairs for i in sorted(pair)]
