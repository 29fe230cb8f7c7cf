"""The end of a stage: figures, a table, metrics.json and report.html; and the page again, later,
beside other runs.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from config import Config, numbers_of
from data import Batches
from engine import rehearsal
from engine.begin import measured_by, require_own_numbers, settle
from engine.evaluation import evaluate
from engine.method import Method
from engine.request import Course, Source
from engine.stored import Stored, read, restore
from ground import ranks
from ground.errors import UserError
from ground.files import write_atomic
from readers.ground_truth import DataSet, Taxonomy
from report import page, run_folder, tables, views, warm_up
from report.gallery import Other, gallery
from report.groups import frequency_groups, group_quality


@dataclass(frozen=True)
class Pictures:
    """What the page shows. count: validation images;  masks: folder of SAM's masks."""

    count: int
    masks: Path


def finish(
    method: Method,
    dataset: DataSet,
    folder: Path,
    source: Source,
    course: Course,
    pictures: Pictures,
    config: dict | None = None,
) -> None:
    """Evaluate, write metrics.json and report.html, print the table. config: of a stored run, for
    the page.
    """
    if course.later:
        return
    if course.dry_run:
        _rehearse(method, dataset, folder, course)
        return
    if course.evaluate:
        metrics = evaluate(method, dataset)
        if course.groups:
            _add_groups(metrics, dataset, course.groups)
        about = {"evaluated_on": source.evaluated_on, "images": len(dataset.val)}
        own = (folder / "config.json").exists()  # it says which run this is
        measured = measured_by({} if own else config or {}, dataset)
        content = {**about, **measured, **metrics}
        if ranks.rank() == 0:
            write_atomic(folder / "metrics.json", json.dumps(content, indent=1).encode())
        columns = [column for metric in method.metrics for column in metric.columns]
        print(tables.table(list(metrics.items()), columns))
        if said := _found(method, dataset, metrics):
            print(said)
        print(f"{folder / 'metrics.json'}")
    if ranks.rank() == 0:
        write_report(method, dataset, folder, pictures, config)


def _rehearse(method: Method, dataset: DataSet, folder: Path, course: Course) -> None:
    def one(k):
        evaluate(method, dataset, 1, title="")

    each = rehearsal.say_repeated("evaluation", len(dataset.val), one)
    if course.watch and course.evaluate:
        rehearsal.say_watching(min(course.watch, len(dataset.val)), each)
    if course.report:
        _say_views(folder, method, method.batches(dataset), dataset)


def _found(method: Method, dataset: DataSet, metrics: dict) -> str:
    """How many things the paper's reading found."""
    things = tables.things_of(dataset.taxonomy) if method.cfg.labels == "panoptic" else []
    said = tables.found(metrics.get(method.reading, {}), things)
    return said and f"{method.reading}: {said}"


def finish_warm_up(
    method: Method, batches: Batches, folder: Path, course: Course, masks: Path
) -> None:
    """The same of the warm-up, which is not evaluated. masks: folder of those that it learns."""
    if course.dry_run and course.report:
        _say_views(folder, method, batches)
    elif not course.dry_run and ranks.rank() == 0:
        write_report(method, None, folder, Pictures(0, masks), batches=batches)


def _say_views(folder: Path, method: Method, batches: Batches, dataset=None) -> None:
    if ranks.rank() == 0:
        path = views.write(folder, method, batches, dataset)
        rehearsal.say("views", f"{path}: what the network will see; open it in a browser")


def _add_groups(metrics: dict, dataset: DataSet, count: int) -> None:
    groups = frequency_groups(dataset, count)
    for reading, result in metrics.items():
        result["groups"] = group_quality(result, dataset.taxonomy, groups)
        figures = (f"{100 * g['pq']:.1f}" if g["n"] else "n/a" for g in result["groups"])
        print(
            f"{reading}: PQ of {count} groups of classes, least to most frequent: "
            + ", ".join(figures)
        )


def write_report(
    method: Method,
    dataset: DataSet | None,
    folder: Path,
    pictures: Pictures,
    config: dict | None = None,
    batches: Batches | None = None,
) -> None:
    """report.html at the end of a stage. dataset: None of the warm-up, which has batches."""
    try:
        run = run_folder.read(folder, {**(config or {}), **dataclasses.asdict(method.cfg)})
        shown = dataset is not None and run.reading and pictures.count
        cards = draw_cards(method, dataset, run, pictures) if shown else {}
        if batches is not None:
            cards = warm_up.cards(method, batches)
        print(page.write(folder, [run], dataset, cards))
    except Exception as error:  # a picture of the run is not worth the run
        print(
            f"warning: {folder / 'report.html'}: not written ({type(error).__name__}: {error}); "
            f"again with --stage report --weights {folder}"
        )


def draw_cards(
    method: Method, dataset: DataSet, run: run_folder.Stored, pictures: Pictures, others=()
) -> dict:
    data = run.config.get("data")
    indices = dataset.labeled if run.config.get("stage") == "sup" else None
    own = data in (None, dataset.train.fingerprint(indices))
    folder = run.folder if own else None  # its pseudo-labels were made on its own images
    return gallery(method, dataset, run.reading, pictures.count, pictures.masks, folder, others)


def report_again(
    stored: Stored,
    source: Source,
    device,
    cfg: Config,
    folder: Path,
    compare: tuple[Path, ...],
    pictures: Pictures,
    safe: bool,
) -> Path:
    """report.html of a run, beside those of `compare`; without its data or its weights, what can be
    said without them.

    safe: colours that colour-blind people can tell apart.
    """
    require_own_numbers(folder, stored, cfg)
    own = stored.path if stored.path.is_dir() else folder
    run, *others = [run_folder.read(path, stored.config) for path in (own, *compare)]
    _say_other_measure(run, others)
    source = dataclasses.replace(source, eval_on=run.metrics.get("evaluated_on", "val"))
    dataset, cards = None, {}
    missing = "" if run.reading or stored.is_warm_up else "the run was not evaluated"
    try:
        if stored.is_warm_up:
            again = stored, source, cfg, device, pictures.masks
            cards = warm_up.cards_again(*again) if pictures.count else {}
        else:
            dataset = source.load(cfg, config=stored.config, origin=stored.path)
            dataset.taxonomy = repainted(dataset.taxonomy, safe)
        if dataset and not missing and pictures.count:
            own = settle(cfg, dataset), dataset.taxonomy
            method = restore(stored, *own, device, source.name)
            beside = _others(others, cfg, dataset, device, source.name)
            cards = draw_cards(method, dataset, run, pictures, beside)
    except UserError as error:
        missing = str(error)
        print(f"warning: no pictures: {error}")
    print(page.write(folder, [run, *others], dataset, cards, missing))
    return folder


def _say_other_measure(run, others: list) -> None:
    mine = run.metrics.get("validation")
    for other in others:
        if mine and other.metrics.get("validation") not in (None, mine):
            print(
                f"warning: {other.folder}: measured by other validation images, or other truth, "
                f"than {run.folder}: the figures beside each other do not compare"
            )


def _others(runs: list, cfg: Config, dataset: DataSet, device, name: str) -> list[Other]:
    """What the runs of --compare say of an image, in the paper's reading of each; one without
    weights, or of other classes, says nothing."""
    others = []
    for run in runs:
        try:
            if not any(Path(run.folder).glob("step_*.pt")) or not run.reading:
                raise UserError(f"{run.folder}: no weights, or not evaluated")
            stored = read(run.folder)
            own = dataclasses.replace(cfg, **numbers_of(stored.config))
            if own.white not in (0, dataset.val.white) or own.stretch != dataset.val.stretch:
                raise UserError(f"{run.folder}: sees images by another exposure")
            own = settle(own, dataset)
            method = restore(stored, own, dataset.taxonomy, device, name)
            others.append(Other(run.name, method, run.reading))
        except (UserError, KeyError) as error:
            print(f"warning: no pictures of a run beside this one: {error}")
    return others


def repainted(taxonomy: Taxonomy, safe: bool) -> Taxonomy:
    """With colours that colour-blind people can tell apart, instead of the data set's."""
    return dataclasses.replace(taxonomy, palette=None) if safe else taxonomy
