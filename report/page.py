"""report.html: one static page about a run. Figures, curves, classes, confusions, pictures, the configuration and the commands that remake it.

Everything is inside of the file: no server, no network (a Content-Security-Policy has the browser see to that), a few lines of JavaScript that
sort tables and nothing else; #sort=classes:pq:asc after the address opens the page with a table sorted. Whatever comes from a file passes
`esc` on its way into the page. The same run gives the same bytes.
"""

import base64
import dataclasses
import hashlib
import html
import json
import math
import re
import shlex
from pathlib import Path
from string import Template

import numpy as np

from config import PAPERS_DATASETS, PRESETS, Config, changes
from engine.checks import idle
from engine.flags import READS
from engine.parser import parser
from engine.run_log import read_log
from ground.errors import UserError
from ground.files import write_atomic
from inference import POSTERIORS, papers_reading
from readers.ground_truth import DataSet
from report import drawing, watch
from report.gallery import Card, spread
from report.groups import class_pixels

MAX_BYTES = 15_000_000  # of the page; pictures are left out until it is no larger
FREQUENCY_IMAGES = 200  # labelled images, at most, that class frequencies are counted on
POINTS, TIPS = 240, 40  # of a curve: parts that it is drawn in, and parts that show their numbers
MAX_HEAT, MAX_CONFUSIONS, MAX_SKIPPED = (
    28,
    20,
    200,
)  # classes of the heat map, rows of the list, skipped steps that are marked
FIGURES = (
    ("pq", "PQ", ("all", "pq")),
    ("pq_things", "PQ things", ("things", "pq")),
    ("pq_stuff", "PQ stuff", ("stuff", "pq")),
    ("sq", "SQ", ("all", "sq")),
    ("rq", "RQ", ("all", "rq")),
    ("miou", "mIoU", ("miou",)),
)
CURVES = {
    "loss": ("Loss", "weighted sum of all terms"),
    "labeled": ("Labelled images", "terms of the loss"),
    "unlabeled": ("Unlabelled images", "terms of the loss"),
    "terms": ("Terms", "of the loss"),
    "grad_norm": ("Gradient norm", "L2, before clipping"),
    "lr": ("Learning rate", "of the head"),
    "pseudo_segments": ("Pseudo-segments", "an unlabelled image"),
}

esc = lambda value: html.escape(str(value))


# ------------------------------------------------------------------------------------------------- a run on disk


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a run folder says of itself; a file that is not there is empty."""

    folder: Path
    config: dict
    metrics: dict
    log: list[dict]
    watched: list[dict]  # PQ at checkpoints (`watch.py`)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def readings(self) -> dict[str, dict]:
        return {k: v for k, v in self.metrics.items() if isinstance(v, dict) and "per_class" in v}

    @property
    def papers(self) -> str:
        return papers_reading(
            self.config.get("teacher_posterior") or usual_posterior(self.config.get("stage"))
        )

    @property
    def reading(self) -> str | None:
        """The paper's, or what there is."""
        return self.papers if self.papers in self.readings else next(iter(self.readings), None)

    def figure(self, reading: str | None, keys: tuple[str, ...]) -> float | None:
        return drawing.figure(self.readings.get(reading), keys)


def read(folder: Path, config: dict | None = None) -> Stored:
    """config: of a folder that has none. Raises: UserError if this is no folder of a run, or a file in it cannot be read."""
    content = {}
    for name in ("config", "metrics"):
        path = Path(folder) / f"{name}.json"
        try:
            content[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: not a readable JSON file ({error}); delete it and evaluate again (--stage eval)"
            ) from None
        if not isinstance(content[name], dict):
            raise UserError(
                f"{path}: holds a {type(content[name]).__name__}, expected an object; delete it and evaluate again (--stage eval)"
            )
    log = read_log(Path(folder) / "log.jsonl")
    if not (content["config"] or content["metrics"] or log):
        raise UserError(
            f"{folder}: holds no config.json, metrics.json or log.jsonl; expected the folder of a run"
        )
    return Stored(
        Path(folder), content["config"] or config or {}, content["metrics"], log, watch.read(folder)
    )


def usual_posterior(stage: str | None) -> str:
    """What makes the pseudo-labels of a method, if there are any; an official file is one of DEARLi."""
    return "decoder" if stage in ("dewa", "sup", "ssl") else "ensemble"


def nearest_preset(config: dict) -> tuple[str, dict]:
    """The preset with the fewest other numbers, and what differs from it."""
    own, _ = data_set(config)
    best = min(
        sorted(PRESETS, key=lambda preset: preset != own),
        key=lambda preset: len(changes(config, PRESETS[preset])),
    )
    return best, changes(config, PRESETS[best])


def data_set(config: dict) -> tuple[str, list[str]]:
    """The data set as --dataset wants it, and the flags that name the data. Of a folder of images (--images) a run knows the name only."""
    name, root = config.get("dataset", "mini"), config.get("data_root")
    if not root and name != "mini":
        return "mini", ["--images", name]
    known = name if name in PAPERS_DATASETS or not root else "custom"
    given = {
        "--dataset": known,
        "--data-root": root,
        "--variant": config.get("variant"),
        "--split": config.get("split"),
    }
    return known, [word for flag, value in given.items() if value for word in (flag, value)]


def commands(run: Stored, depth: int = 3) -> list[str]:
    """What remakes the run, and before it the runs that it began with. Precision and number of processes are not stored, and not said."""
    stage, before = run.config.get("stage"), []
    if stage not in ("dewa", "sup", "ssl", "dear", "dearli"):
        return []
    (name, flags), (preset, changed) = data_set(run.config), nearest_preset(run.config)
    changed.pop("teacher_posterior", None)  # the stage has its own
    if (given := run.config.get("teacher_posterior", usual_posterior(stage))) != usual_posterior(
        stage
    ):
        changed["teacher_posterior"] = given
    if "backbone" in changed:  # its weights would follow it
        changed["pretrained"] = run.config["pretrained"]
    flags += [] if preset == name else ["--preset", preset]
    init = run.config.get("init")
    older = re.match(r"(.*?): \d+ of \d+ tensors taken", str(init))
    start = init.get("source") if isinstance(init, dict) else older and older[1]
    line = lambda *words: shlex.join(["python", "dearli.py", *map(str, words)])
    if stage == "dewa":
        words = [["--stage", name, *flags] for name in ("masks", "dewa")]
        return [
            line(*words[0], *_numbers(words[0], run.config, changed)),
            line(*words[1], *_numbers(words[1], run.config, changed), "--out", run.folder),
        ]
    if start and depth and (Path(start) / "config.json").exists():
        before = commands(read(Path(start)), depth - 1)
    flags += ["--init", start] if start else []
    flags += ["--eval-on", "dev"] if run.metrics.get("evaluated_on") == "dev" else []
    words = ["--stage", *(["sup"] if stage == "sup" else ["ssl", "--method", stage]), *flags]
    return before + [line(*words, *_numbers(words, run.config, changed), "--out", run.folder)]


def _numbers(words: list, config: dict, changed: dict) -> list:
    """The numbers of `changed` as flags of the command that begins with `words`: those that it reads. config: of the run."""
    args = parser().parse_args([str(word) for word in words])
    unused = idle(
        args,
        Config(**{f.name: config[f.name] for f in dataclasses.fields(Config) if f.name in config}),
    )
    flags = []
    for key, value in changed.items():
        if key in READS[args.stage] and key not in unused:
            flag = f"--{key.replace('_', '-')}"
            flags += (
                [flag if value else f"--no-{flag[2:]}"]
                if isinstance(value, bool)
                else [flag, value]
            )
    return flags


# ---------------------------------------------------------------------------------------------- parts of the page


def percent(value) -> str:
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) and math.isfinite(value) else "–"


def cell(value, text: str | None = None, bar: bool = False) -> str:
    """A number of a table: as it is for sorting, in percent to be read."""
    there = isinstance(value, (int, float)) and math.isfinite(value)
    style = f' class="bar" style="--v:{100 * value:.1f}"' if bar and there else ""
    return f'<td data-v="{value if there else ""}"{style}>{percent(value) if text is None else text}</td>'


def table(name: str, columns: list[tuple[str, str]], rows: list[str]) -> str:
    """A table that sorts. columns: (key for the address, heading);  rows: HTML cells, the first of them a <th>."""
    head = "".join(
        f'<th scope="col" data-key="{key}"><button type="button">{esc(title)}</button></th>'
        for key, title in columns
    )
    return f'<div class="wide"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{"".join(f"<tr>{row}</tr>" for row in rows)}</tbody></table></div>'


def section(name: str, title: str, *parts: str, lead: str = "") -> str:
    return f'<section id="{name}"><h2>{title}</h2>{f"<p class=lead>{lead}</p>" if lead else ""}{"".join(parts)}</section>'


def said(reading: str) -> str:
    which, _, posterior = reading.partition("/")
    return f"{esc(which)}, {POSTERIORS[posterior]}" if posterior in POSTERIORS else esc(reading)


def headline(run: Stored) -> str:
    """The figures of the paper's reading, large, and all readings below."""
    if not run.readings:
        why = " (the warm-up knows no class)" if run.config.get("stage") == "dewa" else ""
        return section(
            "figures", "Figures", lead=f"This run has no metrics.json: it was not evaluated{why}."
        )
    tiles = "".join(
        f'<div><dt>{title}</dt><dd data-v="{value}">{percent(value)}</dd></div>'
        for _, title, keys in FIGURES
        if (value := run.figure(run.reading, keys)) is not None
    )
    mark = lambda r: " <em class=mark>the paper’s reading</em>" if r == run.papers else ""
    rows = [
        f'<th scope="row">{said(r)}{mark(r)}</th>'
        + "".join(cell(run.figure(r, keys), bar=key == "pq") for key, _, keys in FIGURES)
        for r in run.readings
    ]
    images = (
        f" on {run.metrics['images']} images" if isinstance(run.metrics.get("images"), int) else ""
    )
    where = (
        f" of <code>{esc(run.metrics['evaluated_on'])}</code>"
        if "evaluated_on" in run.metrics
        else ""
    )
    papers = ", the paper’s reading for this method" if run.reading == run.papers else ""
    return section(
        "figures",
        "Figures",
        f'<dl class="tiles">{tiles}</dl>',
        table("readings", [("reading", "Reading"), *((k, t) for k, t, _ in FIGURES)], rows),
        lead=f"Percent{images}{where}. The large figures are those of the {said(run.reading)}{papers}.",
    )


def compared(runs: list[Stored]) -> str:
    """Runs side by side: figures in the paper's reading, PQ in all readings, losses, and what differs in the configuration."""
    if len(runs) < 2:
        return ""
    rows = [
        f'<th scope="row"><i class="key c{k % 6}"></i>{esc(r.name)} <em>{said(r.reading or "not evaluated")}</em></th>'
        + cell(
            r.metrics.get("images"),
            esc(f"{r.metrics.get('images', '–')} {r.metrics.get('evaluated_on', '')}"),
        )
        + "".join(cell(r.figure(r.reading, keys), bar=key == "pq") for key, _, keys in FIGURES)
        for k, r in enumerate(runs)
    ]
    readings = list(dict.fromkeys(reading for r in runs for reading in r.readings))
    all_pq = [
        f'<th scope="row"><i class="key c{k % 6}"></i>{esc(r.name)}</th>'
        + "".join(cell(r.figure(reading, ("all", "pq")), bar=True) for reading in readings)
        for k, r in enumerate(runs)
    ]
    keys = sorted(
        {
            key
            for r in runs
            for key in r.config
            if any(other.config.get(key) != r.config[key] for other in runs)
        }
    )
    other = [
        f'<th scope="row"><code>{esc(key)}</code></th>'
        + "".join(f"<td>{esc(r.config.get(key, '–'))}</td>" for r in runs)
        for key in keys
    ]
    labeled = lambda r: [
        {"step": row["step"], "sum": sum(terms)}
        for row in r.log
        if (terms := [v for k, v in row.items() if k.startswith("labeled/")])
    ]
    curves = [
        chart(
            "Loss", "weighted sum of all terms", [(r.name, *values(r.log, "loss")) for r in runs]
        ),
        chart(
            "Loss on labelled images",
            "the same terms in all methods",
            [(r.name, *values(labeled(r), "sum")) for r in runs],
        ),
    ]
    return section(
        "compare",
        "Side by side",
        table(
            "runs", [("run", "Run"), ("images", "Images"), *((k, t) for k, t, _ in FIGURES)], rows
        ),
        f"<h3>PQ in every reading</h3>{table('pq', [('run', 'Run'), *((f'r{k}', said(r)) for k, r in enumerate(readings))], all_pq)}"
        if readings
        else "",
        f'<div class="charts">{"".join(curves)}</div>',
        "<h3>What differs in the configuration</h3>"
        + (
            table(
                "config",
                [("key", "Number"), *((f"run{k}", r.name) for k, r in enumerate(runs))],
                other,
            )
            if keys
            else "<p>Nothing.</p>"
        ),
        lead="Each run in the reading that the paper takes for its method.",
    )


def values(log: list[dict], key: str, factor: float = 1.0) -> tuple[list[int], list[float]]:
    """Steps and numbers of a curve; NaN, infinity and what is no number are left out."""
    rows = [
        (r["step"], factor * r[key])
        for r in log
        if isinstance(r["step"], int)
        and isinstance(r.get(key), (int, float))
        and abs(r[key]) < 1e100
    ]
    return [s for s, _ in rows], [v for _, v in rows]


def curves(run: Stored) -> str:
    keys = list(
        dict.fromkeys(
            key
            for row in run.log
            for key in row
            if key not in ("step", "time") and isinstance(row[key], (int, float))
        )
    )
    group = lambda key: key.split("/")[0] if "/" in key else key if key in CURVES else "terms"
    skipped = [
        (
            row["step"],
            f"step {row['step']} was skipped: {row['skipped']}; {', '.join(map(str, row.get('images', [])))}",
        )
        for row in run.log
        if "skipped" in row and isinstance(row["step"], int)
    ]
    charts = (
        [
            chart(
                "PQ",
                f"percent, on {run.watched[-1].get('images', '?')} validation images",
                [
                    (said(key), *values(run.watched, key, 100))
                    for key in run.watched[-1]
                    if "/" in key
                ],
            )
        ]
        if run.watched
        else []
    )
    charts += [
        chart(*CURVES.get(name, (name, "")), series, skipped, log=name == "grad_norm")
        for name in dict.fromkeys([*CURVES, *map(group, keys)])
        if (
            series := [
                (key.split("/")[-1], *values(run.log, key)) for key in keys if group(key) == name
            ]
        )
        and any(steps for _, steps, _ in series)
    ]
    if not charts:
        return section("curves", "Curves", lead="This run has no log.jsonl with a finished step.")
    seconds = np.diff([0.0, *values(run.log, "time")[1]])
    steps = lambda n: f"{n} step{'' if n == 1 else 's'}"
    facts = [
        steps(len(run.log)),
        f"{duration(seconds.sum())} of training, {np.median(seconds):.2g} seconds a step (median)"
        if len(seconds)
        else "",
        f"<strong>{steps(len(skipped))} skipped</strong>, marked in red"
        if skipped
        else "no step was skipped",
    ]
    return section(
        "curves",
        "Curves",
        f'<div class="charts">{"".join(charts)}</div>',
        lead="; ".join(filter(None, facts))
        + ". The pale line is the log, the dark one a moving average over a twentieth of it.",
    )


def duration(seconds: float) -> str:
    return next(
        f"{seconds / unit:.1f} {name}"
        for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
        if seconds >= unit or unit == 1
    )


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round numbers between low and high, some `number` of them."""
    size = (high - low) / number
    power = 10.0 ** math.floor(math.log10(size))
    unit = next(u * power for u in (1, 2, 5, 10) if u * power >= size * 0.999)
    return [
        k * unit for k in range(math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9) + 1)
    ]


def chart(
    title: str,
    unit: str,
    series: list[tuple[str, list[int], list[float]]],
    skipped=(),
    log: bool = False,
) -> str:
    """Curves of one panel as SVG. series: name, steps, finite numbers;  skipped: (step, why);  log: if all is positive and spans decades."""
    W, H, left, right, top, bottom = 380, 220, 44, 10, 12, 34
    everything = [v for _, _, numbers in series for v in numbers]
    steps = [s for _, of, _ in series for s in of] + [s for s, _ in skipped]
    if not everything:
        return ""
    log = log and min(everything) > 0 and max(everything) > 20 * min(everything)
    low, high = (
        (math.log10(min(everything)), math.log10(max(everything)))
        if log
        else (min(0.0, min(everything)), max(everything))
    )
    high = high if high > low else low + 1.0
    first, last = min(steps), max(max(steps), min(steps) + 1)
    x = lambda step: left + (step - first) / (last - first) * (W - left - right)
    y = lambda v: (
        H - bottom - ((math.log10(v) if log else v) - low) / (high - low) * (H - top - bottom)
    )
    path = lambda points: "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    decades = (
        [
            m * 10.0**p
            for p in range(math.floor(low), math.ceil(high) + 1)
            for m in ((1,) if high - low > 2 else (1, 3))
        ]
        if log
        else []
    )
    marks = [t for t in decades if low <= math.log10(t) <= high] if log else ticks(low, high)
    parts = [
        f'<line class="grid" x1="{left}" x2="{W - right}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{left - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.3g}</text>'
        for t in marks
    ]
    parts += [
        f'<text x="{x(t):.1f}" y="{H - bottom + 16}" text-anchor="middle">{t:g}</text>'
        for t in (ticks(first, last, 4) if len(set(steps)) > 1 else [first])
        if t == int(t)
    ]
    parts += [
        f'<text x="{(W + left - right) / 2}" y="{H - 3}" text-anchor="middle" class="unit">step</text>'
    ]
    smooth_lines, tips = [], {}
    for k, (name, of, numbers) in enumerate(series):
        if not numbers:
            continue
        a, where = np.array(numbers), np.array(of)
        half = len(a) // 40
        total = np.cumsum(np.append(0.0, a))
        ends = (
            np.minimum(np.arange(len(a)) + half + 1, len(a)),
            np.maximum(np.arange(len(a)) - half, 0),
        )
        smooth = np.clip((total[ends[0]] - total[ends[1]]) / (ends[0] - ends[1]), a.min(), a.max())
        for part in np.array_split(np.arange(len(a)), min(TIPS, len(a))):
            tips.setdefault(int(where[part[len(part) // 2]]), []).append(
                f"{name} {smooth[part[len(part) // 2]]:.4g}"
            )
        raw = []
        for part in np.array_split(
            np.arange(len(a)), min(POINTS, len(a))
        ):  # the lowest and the highest of each part: no peak is lost
            raw += sorted({int(part[a[part].argmin()]), int(part[a[part].argmax()])})
        if len(a) == 1:
            parts.append(
                f'<circle class="c{k % 6}" cx="{x(of[0]):.1f}" cy="{y(numbers[0]):.1f}" r="3"/>'
            )
            continue
        if half:
            parts.append(
                f'<path class="raw c{k % 6}" d="{path((x(of[i]), y(numbers[i])) for i in raw)}"/>'
            )
        middle = (
            [p[len(p) // 2] for p in np.array_split(np.arange(len(a)), min(POINTS, len(a)))]
            if half
            else range(len(a))
        )
        smooth_lines.append(
            f'<path class="smooth c{k % 6}" d="{path((x(of[i]), y(float(smooth[i]))) for i in dict.fromkeys([0, *middle, len(a) - 1]))}"/>'
        )
    parts += smooth_lines
    width = (W - left - right) / TIPS
    parts += [
        f'<rect class="tip" x="{x(s) - width / 2:.1f}" y="{top}" width="{width:.1f}" height="{H - top - bottom}"><title>step {s}: {esc(", ".join(said))}</title></rect>'
        for s, said in sorted(tips.items())
    ]
    parts += [
        f'<line class="skip" x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{top}" y2="{top + 14}"><title>{esc(why)}</title></line>'
        for s, why in skipped[:MAX_SKIPPED]
    ]
    keys = (
        "".join(
            f'<span><i class="key c{k % 6}"></i>{esc(name)}</span>'
            for k, (name, _, _) in enumerate(series)
        )
        if len(series) > 1
        else ""
    )
    return (
        f"<figure><figcaption><b>{esc(title)}</b> <small>{esc(unit)}{', log scale' if log else ''}</small>{f'<p>{keys}</p>' if keys else ''}</figcaption>"
        f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{esc(title)} over steps">{"".join(parts)}</svg></figure>'
    )


def classes(run: Stored, dataset: DataSet | None) -> str:
    """A row for every class, by its share of the labelled pixels where the data set is at hand."""
    result = run.readings.get(run.reading)
    if not result:
        return ""
    columns = [
        ("class", "Class"),
        ("share", "Labelled %"),
        *((k, k.upper()) for k in ("pq", "sq", "rq")),
        ("iou", "IoU"),
        *((k, k.upper()) for k in ("tp", "fp", "fn")),
    ]
    names, shares, lead = (
        list(result["per_class"]),
        {},
        "The data set is not at hand, so how frequent the classes are is not said.",
    )
    if dataset and dataset.taxonomy.short_names == names:
        seen = spread(dataset.labeled, FREQUENCY_IMAGES)
        pixels = class_pixels(dataset, seen)
        shares = dict(zip(names, (pixels / max(pixels.sum(), 1)).tolist()))
        lead = f"Labelled: share of the pixels of {'the' if len(seen) == len(dataset.labeled) else f'{len(seen)} of the'} {len(dataset.labeled)} labelled images."
        names.sort(key=lambda name: -shares[name])
        tag = {
            name: f'<i class="swatch" style="background:rgb{c}"></i>'
            for name, c in zip(dataset.taxonomy.short_names, dataset.taxonomy.colours)
        }
        kind = {
            name: "thing" if t else "stuff"
            for name, t in zip(dataset.taxonomy.short_names, dataset.taxonomy.things)
        }
    # Without a true pixel of a class, its IoU of 0 is over nothing.
    confusion = result.get("confusion", ())
    unseen = {
        name
        for (name, row), counts in zip(result["per_class"].items(), confusion)
        if not row.get("semantic_iou") and not any(map(int, counts.split()))
    }
    rows = []
    for name in names:
        row = result["per_class"][name]
        occurs = sum(row.get(k, 0) for k in ("tp", "fp", "fn")) > 0
        rows.append(
            f'<th scope="row">{f"{tag[name]}{esc(name)} <em>{kind[name]}</em>" if shares else esc(name)}</th>'
            + cell(shares.get(name), f"{100 * shares[name]:.2f}" if shares else None)
            + "".join(
                cell(row.get(k) if occurs else None, bar=k == "pq") for k in ("pq", "sq", "rq")
            )
            + cell(row.get("semantic_iou") if occurs and name not in unseen else None)
            + "".join(cell(row.get(k), str(row.get(k, "–"))) for k in ("tp", "fp", "fn"))
        )
    return section(
        "perclass",
        "Classes",
        table("classes", columns, rows),
        lead=f"{lead} TP, FP and FN are segments; IoU is that of semantic segmentation. A click on a heading sorts.",
    )


def confusions(run: Stored) -> str:
    """What is taken for what: the strongest confusions as a list, and a heat map of the classes that are involved most."""
    result = run.readings.get(run.reading) or {}
    if "confusion" not in result:
        return (
            section(
                "confusion",
                "What is taken for what",
                lead="Not stored in metrics.json; <code>--stage eval</code> adds it.",
            )
            if result and "miou" in result
            else ""
        )
    names, pixels = (
        list(result["per_class"]),
        np.array([[int(v) for v in row.split()] for row in result["confusion"]], np.int64),
    )
    truth, wrong = np.maximum(pixels.sum(1), 1), pixels.copy()
    np.fill_diagonal(wrong, 0)
    rows = []
    for flat in np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS].tolist():
        t, p = divmod(flat, len(names))
        if wrong[t, p]:
            of_all = wrong[t, p] / truth.sum()
            rows.append(
                f'<th scope="row">{esc(names[t])}</th><td class="text">{esc(names[p])}</td>'
                + cell(wrong[t, p] / truth[t], bar=True)
                + cell(of_all, f"{100 * of_all:.2f}")
            )
    columns = [
        ("truth", "Truth"),
        ("prediction", "Taken for"),
        ("share", "% of class"),
        ("all", "% of all"),
    ]
    listed = table("confusions", columns, rows) if rows else "<p>Nothing is confused.</p>"
    involved = wrong.sum(0) + wrong.sum(1)
    chosen = sorted(np.argsort(-involved, kind="stable")[:MAX_HEAT].tolist())
    of = (
        f"the {len(chosen)} of {len(names)} classes with the most confused pixels"
        if len(chosen) < len(names)
        else "all classes"
    )
    return section(
        "confusion",
        "What is taken for what",
        f'<div class="two"><div>{listed}</div><div>{heat_map(names, pixels / truth[:, None], chosen)}</div></div>',
        lead=(
            f"Pixels of the {said(run.reading)}, by semantic inference, which leaves none unanswered. The map shows {of}: a row is a true class, in percent of its pixels."
        ),
    )


def heat_map(names: list[str], share: np.ndarray, chosen: list[int]) -> str:
    side, gutter, head, n = 22, 112, 88, len(chosen)
    short = lambda name: esc(name if len(name) <= 16 else name[:15] + "…")
    parts = []
    for r, t in enumerate(chosen):
        at, over = head + r * side, gutter + r * side
        parts.append(
            f'<text x="{gutter - 6}" y="{at + 15}" text-anchor="end">{short(names[t])}</text>'
            f'<text transform="translate({over + 15} {head - 6}) rotate(-60)">{short(names[t])}</text>'
        )
        for c, p in enumerate(chosen):
            if (v := float(share[t, p])) >= 0.005:
                box = f'x="{gutter + c * side}" y="{at}" width="{side - 1}" height="{side - 1}"'
                text = (
                    f'<text class="value" x="{gutter + c * side + side / 2 - 0.5}" y="{at + 15}" text-anchor="middle">{100 * v:.0f}</text>'
                    if v >= 0.095
                    else ""
                )
                parts.append(
                    f'<g class="{"right" if t == p else "wrong"}"><title>{esc(names[t])} taken for {esc(names[p])}: {percent(v)} %</title>'
                    f'<rect {box} fill-opacity="{math.sqrt(v):.2f}"/>{text}</g>'
                )
    width = gutter + n * side + 34
    return (
        f'<div class="wide"><svg class="heat" viewBox="0 0 {width} {head + n * side + 1}" style="min-width:{width * 0.85:.0f}px;max-width:{width * 1.25:.0f}px"'
        f' role="img" aria-label="confusion of classes">'
        f'<rect class="frame" x="{gutter - 1}" y="{head - 1}" width="{n * side + 1}" height="{n * side + 1}"/>{"".join(parts)}</svg></div>'
        f'<p class="lead"><i class="key right"></i>right <i class="key wrong"></i>taken for another class; less than half a percent is left blank</p>'
    )


def album(cards: dict[str, list[Card]], reading: str | None, missing: str) -> str:
    if missing:
        return section("images", "Images", lead=f"Without pictures: {esc(missing)}")
    titles = {
        "worst": "Validation images, the worst",
        "best": "Validation images, the best",
        "unlabelled": "Unlabelled images and what the teacher says of them",
        "training": "Pseudo-labels as training went on",
    }
    out = []
    for name, group in cards.items():
        shown = "".join(
            f'<article style="--n:{len(card.cells)}"><h4>{esc(card.title)} <span>{esc(card.note)}</span></h4><div class="cells">'
            + "".join(
                f'<figure><img alt="" src="data:image/webp;base64,{base64.b64encode(picture).decode()}"><figcaption>{caption}</figcaption></figure>'
                for caption, picture in card.cells
            )
            + "</div></article>"
            for card in group
        )
        first, _, of = name.partition(" of ")
        out.append(
            f"<h3>{titles[first]}{f' of {of}' if of else ''}</h3><div class=cards>{shown}</div>"
            if group
            else ""
        )
    return (
        section(
            "images",
            "Images",
            *out,
            lead=f"By the PQ of each image, read from the {said(reading or '')}; the number below a picture is the PQ of that answer.",
        )
        if any(out)
        else ""
    )


def configuration(run: Stored) -> str:
    if not run.config:
        return section("configuration", "Configuration", lead="This run has no config.json.")
    preset, changed = nearest_preset(run.config)
    fields = [f.name for f in dataclasses.fields(Config)]
    rows = lambda keys: "".join(
        f'<tr><th scope="row"><code>{esc(k)}</code></th><td class="text">{esc(run.config[k])}</td>'
        + (
            f'<td class="text dim">{esc(getattr(PRESETS[preset], k))}</td>'
            if k in fields
            else "<td></td>"
        )
        + "</tr>"
        for k in keys
    )
    head = f"<thead><tr><th>Number</th><th>This run</th><th>Preset {preset}</th></tr></thead>"
    first = [
        k
        for k in run.config
        if k != "taxonomy" and (k in changed if k in fields else run.config[k] not in ("", None))
    ]
    same, made = [k for k in fields if k in run.config and k not in changed], commands(run)
    return section(
        "configuration",
        "Configuration",
        f'<div class="wide"><table class="plain">{head}<tbody>{rows(first)}</tbody></table></div>',
        f'<details><summary>{len(same)} numbers as in the preset</summary><div class="wide"><table class="plain">{head}'
        f"<tbody>{rows(same)}</tbody></table></div></details>",
        f"<h3>To make it again</h3><pre><code>{esc(chr(10).join(made))}</code></pre>"
        if made
        else "",
        lead=f"What differs from the preset <code>{preset}</code> comes first.",
    )


def page(
    runs: list[Stored], dataset: DataSet | None, cards: dict[str, list[Card]], missing: str
) -> str:
    run = runs[0]
    sections = [
        headline(run),
        compared(runs),
        curves(run),
        classes(run, dataset),
        confusions(run),
        album(cards, run.reading, missing),
        configuration(run),
    ]
    links = re.findall(r'<section id="(\w+)"><h2>([^<]+)</h2>', "".join(sections))
    facts = [run.config.get(k) for k in ("stage", "dataset")] + [
        f"{k} {run.config[k]}" for k in ("split", "seed") if run.config.get(k) not in (None, "")
    ]
    return PAGE.substitute(
        title=esc(run.name),
        facts=" · ".join(esc(f) for f in facts if f),
        body="".join(sections),
        style=STYLE,
        script=SCRIPT,
        hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        nav="".join(f'<a href="#{name}">{title}</a>' for name, title in links),
    )


def write(
    folder: Path,
    runs: list[Stored],
    dataset: DataSet | None,
    cards: dict[str, list[Card]],
    missing: str = "",
) -> Path:
    """report.html about the first run, beside the others. missing: why there are no cards.

    Pictures are left out, the last of each group first, until the page has no more than MAX_BYTES. Raises: UserError if it cannot be written.
    """
    most = max(map(len, cards.values()), default=0)
    while (
        len(content := page(runs, dataset, cards, missing).encode("utf-8", "replace")) > MAX_BYTES
        and most
    ):
        most -= max(1, most // 4)
        cards = {name: group[:most] for name, group in cards.items()}
    path = Path(folder) / "report.html"
    write_atomic(path, content)
    return path


# ------------------------------------------------------------------------------------------------------ template

STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfa;--card:#fff;--ink:#1d1f22;--dim:#686c73;--line:#e4e4df;--accent:#2468b4;--bar:#dbe7f4;--wrong:#d9621e;--skip:#c62f2f;
--c0:#2468b4;--c1:#d9621e;--c2:#15946b;--c3:#7a55c7;--c4:#b08500;--c5:#c2428a}
@media screen and (prefers-color-scheme:dark){:root{--paper:#16181b;--card:#1d2024;--ink:#e6e7e9;--dim:#9aa0a8;--line:#32363c;--accent:#74aeea;--bar:#263b53;--wrong:#f0854a;--skip:#ff7066;
--c0:#74aeea;--c1:#f0854a;--c2:#45c497;--c3:#ab90ec;--c4:#dcb442;--c5:#e97fb8}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%;scroll-padding-top:3.5rem}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
header,main{max-width:76rem;margin:0 auto;padding:0 1.25rem}header{padding-top:2.5rem}
h1{font-size:1.9rem;line-height:1.2;margin:0;letter-spacing:-.015em;overflow-wrap:anywhere}
header p,.lead{color:var(--dim);margin:.35rem 0 0}
nav{position:sticky;top:0;z-index:1;background:var(--paper);border-bottom:1px solid var(--line);margin-top:1.25rem}
nav div{max-width:76rem;margin:0 auto;padding:.6rem 1.25rem;display:flex;gap:1.4rem;overflow-x:auto;white-space:nowrap;font-size:.9rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
section{margin:2.75rem 0}h2{font-size:1.3rem;margin:0;letter-spacing:-.01em}h3{font-size:1rem;margin:2rem 0 .6rem}
h4{font-size:.9rem;font-weight:600;margin:1.4rem 0 .4rem;overflow-wrap:anywhere}
h4 span,em,small,.dim{color:var(--dim);font-weight:400;font-style:normal}em{font-size:.82em}.lead{font-size:.9rem;max-width:48rem}
.mark{color:var(--accent);background:var(--bar);border-radius:1em;padding:.1em .6em;margin-left:.4em}
.tiles{display:flex;flex-wrap:wrap;gap:.5rem 2.5rem;align-items:baseline;margin:1.5rem 0 1.75rem}.tiles dt{color:var(--dim);font-size:.85rem}
.tiles dd{margin:0;font-size:1.65rem;line-height:1.15;font-weight:500}
.tiles div:first-child dd{font-size:3.4rem;font-weight:600;letter-spacing:-.03em;line-height:1}
.wide{overflow-x:auto;margin-top:1rem}table{border-collapse:collapse;font-size:.9rem;min-width:100%}
th,td{padding:.34rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;font-weight:400}
th:first-child,.text,.plain th,#confusions th:nth-child(2){text-align:left}tbody th:first-child{padding-left:0}
thead th{color:var(--dim);font-size:.82rem;vertical-align:bottom;padding-top:0}thead th:first-child{padding-left:0}
tr:has(.mark){font-weight:600}tr:has(.mark) th{font-weight:600}tbody tr:hover{background:color-mix(in srgb,var(--line) 35%,transparent)}
.text,.plain td{white-space:normal;overflow-wrap:anywhere}
th button{all:unset;cursor:pointer;color:inherit}th button:hover{color:var(--ink)}
th button:focus-visible,a:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
th[aria-sort] button{color:var(--ink)}th[aria-sort=descending] button:after{content:" ↓"}th[aria-sort=ascending] button:after{content:" ↑"}
.bar{min-width:9.5rem;background:linear-gradient(var(--bar),var(--bar)) no-repeat right calc(8.7rem - var(--v)*.05rem) top 50%/calc(var(--v)*.05rem) 1rem}
.swatch,.key{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.5em;vertical-align:-.04em}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(21rem,100%),1fr));gap:1.75rem 2rem;margin-top:1.25rem}figure{margin:0;min-width:0}
figcaption{font-size:.9rem}figcaption p{margin:.1rem 0 0}
figcaption span{margin-right:1em;font-size:.82rem;color:var(--dim)}svg{display:block;width:100%;height:auto}svg text{font-size:11px;fill:var(--dim)}
.grid{stroke:var(--line)}
path{fill:none;stroke:var(--c)}.raw{stroke-width:1;opacity:.3}.smooth{stroke-width:1.8;stroke-linejoin:round}circle{fill:var(--c)}i.key{background:var(--c)}
.skip{stroke:var(--skip);stroke-width:2}
.tip{fill:var(--ink);fill-opacity:0}.tip:hover{fill-opacity:.07}.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}
.c5{--c:var(--c5)}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:1rem 3rem;align-items:start}.two>div{min-width:0}
.heat .frame{fill:none;stroke:var(--line)}.right{--c:var(--dim)}.wrong{--c:var(--wrong)}.heat g rect{fill:var(--c)}.heat .right rect{opacity:.5}
.heat .value{font-size:9.5px;fill:var(--ink)}
.cards{display:flex;flex-wrap:wrap;gap:0 2rem}article{flex:1 1 calc(var(--n)*9.5rem);min-width:0}
.cells{display:grid;grid-template-columns:repeat(var(--n),minmax(0,1fr));gap:.6rem}.cells figcaption{font-size:.8rem;color:var(--dim);margin-top:.2rem}
.cells b{color:var(--ink);font-weight:600}
img{display:block;width:100%;height:auto;border-radius:3px}details{margin-top:1rem}summary{cursor:pointer;color:var(--accent);font-size:.9rem}
code,pre{font:.86em/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
pre{margin:0;padding:.9rem 1rem;background:var(--card);border:1px solid var(--line);border-radius:5px;white-space:pre-wrap;overflow-wrap:anywhere}
@media (max-width:44rem){header{padding-top:1.5rem}article{flex-basis:100%}.cells{grid-template-columns:repeat(2,minmax(0,1fr))}.tiles{gap:.5rem 1.6rem}
.tiles div:first-child{flex-basis:100%}section{margin:2.25rem 0}tbody th:first-child{white-space:normal;min-width:8.5rem}.bar{min-width:0;background:none}
.mark{white-space:nowrap;margin:0}th,td{padding:.34rem .5rem}}
@media print{html{font-size:9.5px}nav{display:none}body{font-size:1rem;background:none}th,td{white-space:normal;padding:.34rem .5rem}
.bar{min-width:0;background:none}.charts{grid-template-columns:repeat(3,1fr)}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.wide{overflow:visible}.heat{min-width:0!important;max-width:30rem}
article,.charts figure,tr{break-inside:avoid}h2,h3,h4{break-after:avoid}section{margin:1.5rem 0}}
"""

SCRIPT = """
const read = cell => cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v === '' ? NaN : +cell.dataset.v;
function sort(heading, down) {
  const table = heading.closest('table'), column = heading.cellIndex, body = table.tBodies[0];
  const order = (a, b) => typeof a === 'string' ? a.localeCompare(b) * (down ? -1 : 1) : isNaN(a) - isNaN(b) || (down ? b - a : a - b) || 0;
  [...body.rows].sort((a, b) => order(read(a.cells[column]), read(b.cells[column]))).forEach(row => body.append(row));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
  heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
}
function follow() {
  const [, table, key, way] = /^#sort=(\\w+):(\\w+)(?::(asc|desc))?$/.exec(location.hash) || [];
  const heading = table && document.querySelector(`#${table} th[data-key="${key}"]`);
  if (heading) sort(heading, way !== 'asc');
  return heading;
}
addEventListener('click', event => {
  const heading = event.target.closest('th[data-key]');
  if (!heading) return;
  const now = heading.getAttribute('aria-sort'), number = heading.cellIndex && heading.closest('table').tBodies[0].rows[0]?.cells[heading.cellIndex].dataset.v !== undefined;
  const way = now ? (now === 'descending' ? 'asc' : 'desc') : number ? 'desc' : 'asc';
  location.hash = `sort=${heading.closest('table').id}:${heading.dataset.key}:${way}`;
});
addEventListener('hashchange', follow);
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => d.open = true));
follow()?.scrollIntoView({block: 'center'});
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-$hash'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1><p>$facts</p></header>
<nav><div>$nav</div></nav>
<main>$body</main>
<script>$script</script>
</body>
</html>
""")
