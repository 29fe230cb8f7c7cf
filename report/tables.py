"""The figures of a reading that people compare, in one order for text and for pages."""

import itertools
from typing import Iterable

from instance_eval import ErrorTypes, MaskAP
from panoptic_eval import PanopticScore, SemanticScore

COLUMNS = (*PanopticScore.columns, *SemanticScore.columns)


def columns_of(results: Iterable[dict]) -> tuple:
    """The columns that have the figures of these results, which may be of several metrics.

    results: of one reading each, as `evaluation.evaluate` returns. Without any: COLUMNS.
    """
    results = list(results)
    columns = {"ap": MaskAP.columns, "types": ErrorTypes.columns}
    columns |= {"all": PanopticScore.columns, "miou": SemanticScore.columns}
    found = [own for key, own in columns.items() if any(key in result for result in results)]
    return tuple(itertools.chain(*found)) or COLUMNS


def figure(metrics: dict | None, keys: tuple[str, ...]) -> float | None:
    """A figure of one reading, as ("things", "pq"), from 0 to 1.

    None if it is not there, or is over nothing: `evaluation.evaluate` gives 0 then, as the COCO
    panoptic API.
    """
    value, counted = metrics, None
    for key in keys:
        if not isinstance(value, dict):
            return None
        value, counted = value.get(key), value.get("miou_classes" if key == "miou" else "n")
    return None if counted == 0 else value


def table(rows: list[tuple[str, dict]], columns=COLUMNS) -> str:
    """A plain-text table in percent, n/a where there is nothing to measure.

    rows: (title, metrics of one reading as `evaluation.evaluate` returns).
    """
    width = max(len(title) for title, _ in rows)
    lines = [" " * width + "".join(f"{name:>11}" for name, _ in columns)]
    for title, metrics in rows:
        figures = [figure(metrics, keys) for _, keys in columns]
        cells = [f"{'n/a':>11}" if v is None else f"{100 * v:11.1f}" for v in figures]
        lines.append(f"{title:<{width}}" + "".join(cells))
    return "\n".join(lines)


def things_of(taxonomy) -> list[str]:
    """Short names of the classes of a `Taxonomy` that are things."""
    return [name for name, thing in zip(taxonomy.short_names, taxonomy.things) if thing]


def found(metrics: dict, things: list[str], short: bool = False) -> str:
    """How many objects a reading found, in words: what PQ, a mean over classes, does not say.

    metrics: of the reading, with counts by class;  things: names of the classes that are counted;
    short: for a caption. Empty where there is none.
    """
    counts = [metrics.get("per_class", {}).get(name, {}) for name in things]
    counts = [count for count in counts if "tp" in count]
    right, wrong, missed = (sum(c[key] for c in counts) for key in ("tp", "fp", "fn"))
    if not right + missed:
        return ""
    if short:
        return f"{right} of {right + missed} things found, {wrong} without a match"
    return (
        f"{right} of {right + missed} things are found (IoU above 0.5); {wrong} answers match "
        "none: drawn badly, of another class, several in one, or not there"
    )
