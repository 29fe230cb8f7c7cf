"""report.html: one static page about a run. Figures, curves, classes, confusions, pictures, the
configuration and the commands that remake it.

Here its values are gathered; words, elements, style and script are in templates/, whose engine
escapes what comes from a file. Everything is inside of the page: no server, no network (a
Content-Security-Policy has the browser see to that), and a script that sorts tables and nothing
else; #sort=classes:pq:asc after the address opens the page with a table sorted. The same run gives
the same bytes.
"""

import base64
import hashlib
import math
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from config import PRESETS
from engine.evaluation import class_pixels
from ground.files import write_atomic
from readers.ground_truth import DataSet
from report.charts import chart, curve
from report.gallery import POSTERIORS, Card, spread
from report.run_folder import FIELDS, Stored, commands, nearest_preset
from report.tables import COLUMNS

TEMPLATES = Path(__file__).parent / "templates"
MAX_BYTES = 15_000_000  # of the page; pictures are left out until it is no larger
FREQUENCY_IMAGES = 200  # labelled images, at most, that class frequencies are counted on
MAX_HEAT, MAX_CONFUSIONS = 28, 20  # classes of the heat map, rows of the list
CURVES = {
    "loss": ("Loss", "weighted sum of all terms"),
    "labeled": ("Labelled images", "terms of the loss"),
    "unlabeled": ("Unlabelled images", "terms of the loss"),
    "terms": ("Terms", "of the loss"),
    "grad_norm": ("Gradient norm", "L2, before clipping"),
    "lr": ("Learning rate", "of the head"),
    "pseudo_segments": ("Pseudo-segments", "an unlabelled image"),
}
ALBUM = {
    "worst": "Validation images, the worst",
    "best": "Validation images, the best",
    "unlabelled": "Unlabelled images and what the teacher says of them",
    "training": "Pseudo-labels as training went on",
}


def write(
    folder: Path,
    runs: list[Stored],
    dataset: DataSet | None,
    cards: dict[str, list[Card]],
    missing: str = "",
) -> Path:
    """report.html about the first run, beside the others. missing: why there are no cards.

    Pictures are left out, the last of each group first, until the page has no more than MAX_BYTES.
    Raises: UserError if it cannot be written.
    """
    page, values = _template(), gathered(runs, dataset)

    def content(most: int) -> bytes:
        shown = {name: group[:most] for name, group in cards.items()}
        values["sections"]["images"] = album(shown, runs[0].reading, missing)
        return page.render(values).encode("utf-8", "replace")

    most = max(map(len, cards.values()), default=0)
    while len(written := content(most)) > MAX_BYTES and most:
        most -= max(1, most // 4)
    path = Path(folder) / "report.html"
    write_atomic(path, written)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["finite"] = finite
    environment.filters |= {"percent": percent, "reading_title": reading_title, "base64": base_64}
    style, script = ((TEMPLATES / f).read_text("utf-8") for f in ("style.css", "script.js"))
    environment.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": base_64(hashlib.sha256(script.encode()).digest()),
        "figure_columns": [(title.lower().replace(" ", "_"), title) for title, _ in COLUMNS],
    }
    return environment.get_template("page.html.j2")


def base_64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def percent(value, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}" if finite(value) else "–"


def reading_title(reading: str) -> str:
    which, _, posterior = reading.partition("/")
    return f"{which}, {POSTERIORS[posterior]}" if posterior in POSTERIORS else reading


def gathered(runs: list[Stored], dataset: DataSet | None) -> dict:
    """The values of a page without its album; a section that is None is left out."""
    run = runs[0]
    facts = [run.config.get("stage"), run.config.get("dataset")]
    named = [(key, run.config.get(key)) for key in ("split", "seed")]
    facts += [f"{key} {value}" for key, value in named if value not in (None, "")]
    return {
        "title": run.name,
        "facts": " · ".join(fact for fact in facts if fact),
        "sections": {
            "figures": run,
            "compare": comparison(runs) if len(runs) > 1 else None,
            "curves": curves(run),
            "perclass": classes(run, dataset),
            "confusion": confusions(run),
            "configuration": configuration(run),
        },
    }


def comparison(runs: list[Stored]) -> dict:
    """Runs side by side: figures, losses, and what differs in the configuration."""
    readings = list(dict.fromkeys(reading for run in runs for reading in run.readings))
    configs = [run.config for run in runs]
    keys = sorted(set().union(*configs))
    titles = [(f"r{k}", reading_title(reading)) for k, reading in enumerate(readings)]
    losses = [curve(run.name, run.log, "loss") for run in runs]
    labeled = [curve(run.name, _labeled_loss(run.log), "sum") for run in runs]
    charts = [
        chart(*CURVES["loss"], losses),
        chart("Loss on labelled images", "the same terms in all methods", labeled),
    ]
    return {
        "runs": runs,
        "run_columns": [("key", "Number"), *((f"run{k}", r.name) for k, r in enumerate(runs))],
        "readings": readings,
        "reading_columns": [("run", "Run"), *titles],
        "charts": list(filter(None, charts)),
        "differing": [
            (key, [config.get(key, "–") for config in configs])
            for key in keys
            if any(config.get(key) != configs[0].get(key) for config in configs)
        ],
    }


def _labeled_loss(log: list[dict]) -> list[dict]:
    """The sum of the terms on labelled images, of steps that have some."""
    terms = [[v for key, v in row.items() if key.startswith("labeled/")] for row in log]
    return [{"step": row["step"], "sum": sum(own)} for row, own in zip(log, terms) if own]


def curves(run: Stored) -> dict:
    panels = {name: {} for name in CURVES}  # keys of the log, each once, in order
    for row in run.log:
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, (int, float)):
                panels.setdefault(_panel(key), {})[key] = True
    skipped = [
        (row["step"], f"step {row['step']} was skipped: {row['skipped']}; {_images(row)}")
        for row in run.log
        if "skipped" in row and isinstance(row["step"], int)
    ]
    charts = [_watched(run.watched)] if run.watched else []
    for name, keys in panels.items():
        lines = [curve(key.split("/")[-1], run.log, key) for key in keys]
        if any(steps for _, steps, _ in lines):
            charts.append(chart(*CURVES.get(name, (name, "")), lines, skipped, name == "grad_norm"))
    times = curve("time", run.log, "time")[2]
    seconds = np.diff([0.0, *times])
    return {
        "charts": list(filter(None, charts)),
        "steps": len(run.log),
        "skipped": len(skipped),
        "time": duration(seconds.sum()) if times else "",
        "seconds_a_step": f"{np.median(seconds):.2g}" if times else "",
    }


def _panel(key: str) -> str:
    """Where a number of the log is drawn."""
    if "/" in key:
        return key.split("/")[0]
    return key if key in CURVES else "terms"


def _images(row: dict) -> str:
    return ", ".join(map(str, row.get("images", [])))


def _watched(rows: list[dict]) -> dict | None:
    """PQ at the checkpoints."""
    lines = [curve(reading_title(key), rows, key, 100) for key in rows[-1] if "/" in key]
    return chart("PQ", f"percent, on {rows[-1].get('images', '?')} validation images", lines)


def duration(seconds: float) -> str:
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, name = next((unit for unit in units if seconds >= unit[0]), units[-1])
    return f"{seconds / size:.1f} {name}"


def classes(run: Stored, dataset: DataSet | None) -> dict | None:
    """A row for every class, by its share of the labelled pixels where the data set is at hand."""
    result = run.readings.get(run.reading)
    if not result:
        return None
    names, unseen = list(result["per_class"]), _unseen(result)
    known, images, labeled = {}, (), None
    if dataset and dataset.taxonomy.short_names == names:
        labeled = len(dataset.labeled)
        images = spread(dataset.labeled, FREQUENCY_IMAGES)
        pixels = class_pixels(dataset, images)
        shares = (pixels / max(pixels.sum(), 1)).tolist()
        known = dict(zip(names, zip(shares, dataset.taxonomy.colours, dataset.taxonomy.things)))
        names.sort(key=lambda name: -known[name][0])
    rows = []
    for name in names:
        row = result["per_class"][name]
        share, colour, thing = known.get(name, (None, None, None))
        counts = [row.get(key) for key in ("tp", "fp", "fn")]
        figures = [row.get(key) for key in ("pq", "sq", "rq", "semantic_iou")]
        if not any(counts):  # the figures are over nothing
            figures = [None] * len(figures)
        elif name in unseen:
            figures[-1] = None
        kind = "thing" if thing else "stuff"
        own = {"share": share, "colour": colour, "kind": kind, "figures": figures, "counts": counts}
        rows.append({"name": name, **own})
    titles = [(title.lower(), title) for title in ("PQ", "SQ", "RQ", "IoU", "TP", "FP", "FN")]
    return {
        "columns": [("class", "Class"), ("share", "Labelled %"), *titles],
        "rows": rows,
        "counted": len(images),
        "labeled": labeled,
    }


def _unseen(result: dict) -> set[str]:
    """Classes without a true pixel: their IoU of 0 is over nothing."""
    return {
        name
        for (name, row), pixels in zip(result["per_class"].items(), result.get("confusion", ()))
        if not row.get("semantic_iou") and not any(map(int, pixels.split()))
    }


def confusions(run: Stored) -> dict | None:
    """What is taken for what: the strongest confusions, and a map of the classes most involved."""
    result = run.readings.get(run.reading) or {}
    if "confusion" not in result:
        return {"stored": False} if "miou" in result else None
    names = list(result["per_class"])
    counts = [list(map(int, row.split())) for row in result["confusion"]]
    pixels = np.array(counts, np.int64)  # (K, K), a row for every true class
    truth, wrong = np.maximum(pixels.sum(1), 1), pixels.copy()
    np.fill_diagonal(wrong, 0)
    strongest = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    pairs = [divmod(place, len(names)) for place in strongest.tolist()]
    involved = np.argsort(-wrong.sum(0) - wrong.sum(1), kind="stable")[:MAX_HEAT]
    shown = np.sort(involved)
    return {
        "stored": True,
        "reading": run.reading,
        "columns": [
            ("truth", "Truth"),
            ("prediction", "Taken for"),
            ("share", "% of class"),
            ("all", "% of all"),
        ],
        "pairs": [
            (names[t], names[p], wrong[t, p] / truth[t], wrong[t, p] / truth.sum())
            for t, p in pairs
            if wrong[t, p]
        ],
        "classes": len(names),
        "names": [names[k] for k in shown],
        "shares": (pixels / truth[:, None])[np.ix_(shown, shown)].tolist(),
    }


def album(cards: dict[str, list[Card]], reading: str | None, missing: str) -> dict | None:
    groups = []
    for name, group in cards.items():
        first, _, number = name.partition(" of ")
        groups.append((f"{ALBUM[first]} of {number}" if number else ALBUM[first], group))
    if not missing and not any(group for _, group in groups):
        return None
    return {"missing": missing, "reading": reading or "", "groups": groups}


def configuration(run: Stored) -> dict:
    """Its numbers beside those of the nearest preset: what differs, and what is the same."""
    if not run.config:
        return {"preset": None}
    preset, changed = nearest_preset(run.config)
    usual = {key: getattr(PRESETS[preset], key) for key in FIELDS}
    differing = [
        key
        for key, value in run.config.items()
        if key != "taxonomy" and (key in changed if key in usual else value not in ("", None))
    ]
    same = [key for key in FIELDS if key in run.config and key not in changed]
    rows = [[(k, run.config[k], usual.get(k, "")) for k in keys] for keys in (differing, same)]
    made = "\n".join(commands(run))
    return {"preset": preset, "differing": rows[0], "same": rows[1], "commands": made}
