"""report.html: one static page about a run. Figures, curves, classes, confusions, pictures, the
configuration and the commands that remake it.

Here its values are gathered; words, elements, style and script are in templates/, whose engine
escapes what comes from a file. The page needs no server and no network (a Content-Security-Policy
has the browser see to that); its script sorts tables and nothing else: #sort=classes:pq:asc after
the address opens it with a table sorted. The same run gives the same bytes.
"""

import base64
import hashlib
import itertools
import math
import re
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from config import PHASES
from engine.flags import preset_of
from ground.errors import UserError
from ground.files import write_atomic
from inference import POSTERIORS
from readers.ground_truth import DataSet, Taxonomy
from report import drawing
from report.charts import chart, curve
from report.gallery import spread
from report.groups import class_pixels
from report.run_folder import FIELDS, Stored, commands, nearest_preset, usual_posterior
from report.tables import columns_of, found, things_of

TEMPLATES = Path(__file__).parent / "templates"
MAX_BYTES = 15_000_000  # of the page; pictures are left out until it is no larger
FREQUENCY_IMAGES = 200  # labelled images, at most, that class frequencies are counted on
MAX_HEAT, MAX_CONFUSIONS = 28, 20  # classes of the heat map, rows of the list
COUNTED = ("labelled", "unlabelled", "validation")  # images, in the sessions of a run
MEASURED = {"white", "object_width"}  # of the images, where the preset has no number
KINDS = {"instances": "ap", "segments": "all"}  # what is measured, by what a result then has
PER_CLASS = {  # figures and counts of a class
    "instances": (("ap", "ap50", "ap75"), ("instances",)),
    "segments": (("pq", "sq", "rq", "semantic_iou"), ("tp", "fp", "fn")),
    "classes": (("semantic_iou",), ()),
}
CURVES = {
    "loss": ("Loss", "weighted sum of all terms"),
    "labeled": ("Labelled images", "terms of the loss"),
    "unlabeled": ("Unlabelled images", "terms of the loss"),
    "terms": ("Terms", "of the loss"),
    "grad_norm": ("Gradient norm", "L2, before clipping"),
    "lr": ("Learning rate", "of the head"),
    "pseudo_segments": ("Pseudo-segments", "an unlabelled image"),
}


def write(
    folder: Path, runs: list[Stored], dataset: DataSet | None, cards: dict, missing: str = ""
) -> Path:
    """report.html about the first run, beside the others.

    cards: of `gallery.gallery`; the last of each group are left out until the page has no more
    than MAX_BYTES.  missing: why there are none. Raises: UserError if it cannot be written.
    """
    run, page = runs[0], template("page.html.j2")
    columns = columns_of(result for one in runs for result in one.readings.values())
    headings = [(title.lower().replace(" ", "_"), title) for title, _ in columns]
    shown = {"columns": columns, "figure_columns": headings}
    sections = {  # one that is None is left out
        "figures": run,
        "compare": comparison(runs) if len(runs) > 1 else None,
        "curves": curves(run),
        "perclass": classes(run, dataset),
        "confusion": confusions(run),
        "configuration": configuration(run),
    }

    taxonomy = dataset.taxonomy if dataset and cards else None
    painted = map(drawing.swatch, taxonomy.colours) if taxonomy else ()
    colours = list(zip(taxonomy.short_names, painted)) if taxonomy else []

    def content(most: int) -> bytes:
        album = {name: group[:most] for name, group in cards.items() if group[:most]}
        values = {"missing": missing, "reading": run.reading or "", "cards": album}
        cells = (cell for card in album.get("unlabelled", ()) for cell in card.cells)
        values["masked"] = any("SAM masks" in caption for caption, _ in cells)
        values["colours"] = colours
        sections["images"] = values if missing or album else None
        values = {"run": run, "about": about(run), "found": found_in(run), "sections": sections}
        return page.render(**values, **shown).encode("utf-8", "replace")

    most = max(map(len, cards.values()), default=0)
    while len(written := content(most)) > MAX_BYTES and most:
        most -= max(1, most // 4)
    path = Path(folder) / "report.html"
    write_atomic(path, written)
    return path


def template(name: str) -> jinja2.Template:
    """One of templates/, with the filters, the style and the script that they share."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.loader = jinja2.FileSystemLoader(TEMPLATES)
    environment.tests["finite"] = finite
    environment.filters |= {"percent": percent, "reading_title": reading_title, "base64": base_64}
    style, script = ((TEMPLATES / f).read_text("utf-8") for f in ("style.css", "script.js"))
    environment.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": base_64(hashlib.sha256(script.encode()).digest()),
    }
    return environment.get_template(name)


def base_64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def percent(value, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}" if finite(value) else "–"


def reading_title(reading: str) -> str:
    which, _, posterior = reading.partition("/")
    return f"{which}, {POSTERIORS[posterior]}" if posterior in POSTERIORS else reading


def found_in(run: Stored) -> str:
    """How many things the reading of the large figures found, in words; empty where they are not
    counted or the run does not say which classes are things."""
    stored = run.config.get("taxonomy")
    result = run.readings.get(run.reading)
    if not result or not isinstance(stored, dict) or run.config.get("labels") != "panoptic":
        return ""
    try:
        return found(result, things_of(Taxonomy.from_config(stored, run.name)))
    except UserError:  # of a file that somebody wrote
        return ""


def about(run: Stored) -> list[tuple[str, str]]:
    """When a run was trained, on how many images and on what: (what, text), as far as it says."""
    sessions = run.sessions
    if not sessions:
        return []
    unused = {"unlabelled"} if run.config.get("stage") == "sup" else set()
    counts = [(kind, sessions[-1].get(kind)) for kind in COUNTED if kind not in unused]
    rows = {
        "trained": _times(sessions),
        "images": ", ".join(f"{n:,} {kind}" for kind, n in counts if isinstance(n, int)),
        "machine": _in_turn(map(_machine, sessions)),
        "versions": _in_turn(map(_versions, sessions)),
    }
    return [(what, text) for what, text in rows.items() if text]


def _in_turn(texts) -> str:
    """What sessions say one after the other, once where it is the same."""
    return "; then ".join(text for text, _ in itertools.groupby(texts) if text)


def _machine(session: dict) -> str:
    threads, processes = (session.get(key, 1) for key in ("threads", "processes"))
    text = f"{session.get('machine', '')}, {threads} thread{'s' if threads != 1 else ''}"
    return f"{processes} processes, each on {text}" if processes != 1 else text


def _versions(session: dict) -> str:
    parts = {"Python": "python", "torch": "torch", "commit": "commit"}
    return ", ".join(f"{name} {session[key]}" for name, key in parts.items() if session.get(key))


def _times(sessions: list[dict]) -> str:
    try:
        times = [
            datetime.fromisoformat(sessions[k][key]) for k, key in ((0, "begun"), (-1, "last"))
        ]
    except (KeyError, TypeError, ValueError):
        return ""
    first, last = times
    end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%d %B %Y, %H:%M}"
    text = f"{first:%d %B %Y, %H:%M} to {end} {last:%Z}".strip()
    return f"{text}, in {len(sessions)} sessions" if len(sessions) > 1 else text


def comparison(runs: list[Stored]) -> dict:
    """Runs side by side: figures, losses, and what differs in the configuration."""
    readings = list(dict.fromkeys(reading for run in runs for reading in run.readings))
    configs = [run.config for run in runs]
    keys = sorted(set().union(*configs))
    same = [key for key in keys if all(c.get(key) == configs[0].get(key) for c in configs)]
    losses = [curve(run.name, run.log, "loss") for run in runs]
    labeled = [curve(run.name, _labeled_loss(run.log), "sum") for run in runs]
    begins = [
        (step, f"{run.name}: {text}", k)
        for k, run in enumerate(runs)
        for step, text, _ in _begins(run.log)
    ]
    charts = [
        chart(*CURVES["loss"], losses, begins=begins),
        chart("Loss on labelled images", "the same terms in all methods", labeled, begins=begins),
    ]
    return {
        "runs": runs,
        "run_columns": [(f"run{k}", run.name) for k, run in enumerate(runs)],
        "readings": readings,
        "reading_columns": [(f"r{k}", reading_title(r)) for k, r in enumerate(readings)],
        "charts": list(filter(None, charts)),
        "differing": [
            (key, [_readable(config.get(key)) for config in configs])
            for key in keys
            if key not in same
        ],
    }


def _labeled_loss(log: list[dict]) -> list[dict]:
    """The sum of the terms on labelled images, of steps that have some."""
    terms = [[v for key, v in row.items() if key.startswith("labeled/")] for row in log]
    return [{"step": row["step"], "sum": sum(own)} for row, own in zip(log, terms) if own]


def curves(run: Stored) -> dict:
    log, watched = run.log, run.watched[-1] if run.watched else {}
    quality = [curve(reading_title(r), run.watched, r, 100) for r in watched if "/" in r]
    keys = [key for row in log for key, value in row.items() if isinstance(value, (int, float))]
    panels = {name: [] for name in CURVES}
    for key in dict.fromkeys(keys):
        group, _, term = key.rpartition("/")
        panel = group.split("/")[0] or (key if key in CURVES else "terms")
        if key not in ("step", "time"):
            panels.setdefault(panel, []).append(curve(term, log, key))
    skipped = []
    for row in log:
        if "skipped" in row and isinstance(row["step"], int):
            why = f"{row['skipped']}; {', '.join(map(str, row.get('images', [])))}"
            skipped.append((row["step"], f"step {row['step']} was skipped: {why}"))
    begins = _begins(log)
    images = watched.get("images", "?")
    watching = f"percent, on the first {images} validation images alone: not those of the table"
    (heading, _), *_ = columns_of(run.readings.values())
    span, window = _span(log), max(1, len(log) // 20)
    charts = [chart(heading, watching, quality, begins=begins, span=span, window=1)]
    for name, lines in panels.items():
        title, unit = CURVES.get(name, (name, ""))
        own = 1 if name == "lr" else window  # what has no noise is shown as it is
        charts.append(chart(title, unit, lines, skipped, name == "grad_norm", begins, span, own))
    _, _, times = curve("time", log, "time")
    return {
        "charts": list(filter(None, charts)),
        "steps": len(log),
        "window": window,
        "panels": {name for name, lines in panels.items() if lines},
        "skipped": len(skipped),
        "begins": begins,
        "unlabelled_first": any(key.startswith("unlabeled/") for row in log[:1] for key in row),
        "time": duration(times[-1]) if times else "",
        "seconds_a_step": f"{np.median(np.diff([0.0, *times])):.2g}" if times else "",
    }


def _span(log: list[dict]) -> tuple[int, ...]:
    """The first and the last step of a log: all its curves have one axis."""
    steps = [row["step"] for row in log if isinstance(row["step"], int)]
    return (min(steps), max(steps)) if steps else ()


def _begins(log: list[dict]) -> list[tuple[int, str, None]]:
    """(step, text, in all curves) from where on there are unlabelled images, after a burn-in
    without them."""
    of = [any(key.startswith("unlabeled/") for key in row) for row in log]
    if True not in of[1:] or of[0] or not isinstance(log[of.index(True)]["step"], int):
        return []
    first = log[of.index(True)]["step"]
    return [(first, f"unlabelled images begin at step {first}", None)]


def duration(seconds: float) -> str:
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, name = next((unit for unit in units if seconds >= unit[0]), units[-1])
    return f"{seconds / size:.1f} {name}"


def classes(run: Stored, dataset: DataSet | None) -> dict | None:
    """A row for every class, by its share of the labelled pixels where the data set is at hand."""
    result = run.readings.get(run.reading)
    if not result:
        return None
    look, images, labeled = {}, (), None
    if dataset and dataset.taxonomy.short_names == list(result["per_class"]):
        labeled, images = len(dataset.labeled), spread(dataset.labeled, FREQUENCY_IMAGES)
        pixels = class_pixels(dataset, images)
        shares = (pixels / max(pixels.sum(), 1)).tolist()
        taxonomy = dataset.taxonomy
        painted = map(drawing.swatch, taxonomy.colours)
        look = dict(zip(taxonomy.short_names, zip(shares, painted, taxonomy.things)))
    measured = next((kind for kind, key in KINDS.items() if key in result), "classes")
    keys, number = PER_CLASS[measured]
    rows, confusion = [], result.get("confusion", ())
    for (name, row), pixels in itertools.zip_longest(result["per_class"].items(), confusion):
        figures = [row.get(key) for key in keys]
        counts = [row.get(key) for key in number]
        # over nothing, as is the IoU of a class without a true pixel
        if counts and not any(counts):
            figures = [None] * len(figures)
        elif pixels and not figures[-1] and not any(map(int, pixels.split())):
            figures[-1] = None
        rows.append((name, *look.get(name, (None, None, None)), figures, counts))
    rows.sort(key=lambda row: -(row[1] or 0))
    counted = {"counted": len(images), "labeled": labeled, "reading": run.reading}
    return {"rows": rows, "measured": measured, **counted}


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
    involved = np.argsort(-wrong.sum(0) - wrong.sum(1), kind="stable")
    shown = np.sort(involved[:MAX_HEAT])
    return {
        "stored": True,
        "reading": run.reading,
        "pairs": [
            (names[t], names[p], wrong[t, p] / truth[t], wrong[t, p] / truth.sum())
            for t, p in pairs
            if wrong[t, p]
        ],
        "classes": len(names),
        "names": [names[k] for k in shown],
        "shares": (pixels / truth[:, None])[np.ix_(shown, shown)].tolist(),
    }


def _readable(value):
    """A number of a configuration in words; of a digest the beginning."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {_readable(one)}" for key, one in value.items())
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}…"
    return "–" if value is None else value


def _usual(key: str, value, usual: dict):
    """A number of the preset; a share of the steps is said to be one."""
    own = usual.get(key, "")
    share = key in PHASES and isinstance(own, float) and own != value
    return f"{own:g} of the steps" if share else own


def configuration(run: Stored) -> dict:
    """Its numbers beside those of the nearest preset: what differs, what is the same, and what is
    no choice: images, first weights, and what was measured of them."""
    if not run.config:
        return {"preset": None}
    preset, changed = nearest_preset(run.config)
    numbers = preset_of(preset, run.config.get("network", "mask2former"))
    usual = {key: getattr(numbers, key) for key in FIELDS}
    usual["teacher_posterior"] = usual_posterior(run.config.get("stage"))
    rows = [(key, _readable(value), _usual(key, value, usual)) for key, value in run.config.items()]
    measured = {key for key in MEASURED if not usual[key]}
    chosen = [row for row in rows if row[0] in usual.keys() - measured]
    differing = [row for row in chosen if row[0] in changed and row[1] != row[2]]
    made_of = [row for row in rows if row not in chosen and row[1] not in ("", "–", 0)]
    return {
        "preset": preset,
        "differing": differing,
        "same": [row for row in chosen if row not in differing],
        "made_of": [(key, value) for key, value, _ in made_of if key != "taxonomy"],
        "commands": commands(run),
    }
