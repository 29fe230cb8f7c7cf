"""Tables of the papers on the miniature world: rungs that are trained over several seeds, several
at a time.

Every rung takes the same number of steps. What is a stage of its own in its paper comes on top:
DEARLi's warm-up, and the teacher of labels alone of Guided Distillation; a control takes the
warm-up's steps as semi-supervised ones. A rung that is there already, of the same
numbers and images, is not trained again.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from config import METHODS, PRESETS, Config, dashed
from engine import masks
from engine.begin import Begun, beginning, identity, settle
from engine.checks import require_semi_supervised
from engine.evaluation import predict_image
from engine.method import Method
from engine.request import Course, Machine, Place, Source
from engine.sameness import differing
from engine.training import Stopped
from ground.errors import UserError
from ground.files import require_writable, write_atomic
from pretrained import foundation
from readers.ground_truth import DataSet
from report import drawing
from report.gallery import image_quality
from report.tables import columns_of, figure

LONGEST = (
    "dearli",
    "control",
    *sorted(METHODS.keys() - {"dearli"}),
    "sup",
)  # first: it has a warm-up
MAX_JOBS = 8
SHOWN_IMAGES, LOOKED_AT = 4, 40  # of the demo's picture
READINGS = ("student/decoder", "student/ensemble", "teacher/decoder", "teacher/ensemble")


@dataclass(frozen=True)
class Rung:
    """A row of a table: what is trained, what is changed in the configuration, and the reading that
    the paper takes.

    kind: `sup` or a method.   over: titles of rows that it is compared with, seed by seed.
    control: it takes as many semi-supervised steps more as DEARLi's warm-up has.   on_top: its
    burn-in is a stage of its own in its paper, and the run is longer by it.   name: of what is
    trained, where it is not the kind.   numbers: fields that a method of another paper sets.
    """

    title: str
    kind: str
    reading: str = "student/decoder"
    changes: tuple[tuple[str, object], ...] = ()
    over: tuple[str, ...] = ()
    control: bool = False
    on_top: bool = False
    name: str = ""
    numbers: tuple[tuple[str, object], ...] = ()

    @property
    def run(self) -> str:
        """Name of what is trained; rows that differ in the reading alone share it."""
        changes = (f"{key}-{value}".replace(":", "-") for key, value in self.changes)
        return "-".join([self.name or self.kind, *changes, *["control"] * self.control])

    def folder(self, place: Place, source: Source, cfg: Config) -> Path:
        return place.folder(source, f"{self.run}-{source.split}", cfg.seed)

    def config(self, cfg: Config) -> Config:
        """Equal steps (the paper's supervised runs have steps of their own); the control has more,
        and no longer a burn-in; `on_top` has more by its burn-in."""
        cfg = dataclasses.replace(cfg, **dict(self.numbers), **dict(self.changes)).settled()
        steps = cfg.ssl_steps + cfg.dewa_steps * self.control + cfg.burn_in * self.on_top
        if self.kind == "sup":
            return dataclasses.replace(cfg, teacher_posterior="decoder", sup_steps=steps)
        posterior = METHODS[self.kind].numbers["teacher_posterior"]
        return dataclasses.replace(cfg, teacher_posterior=posterior, ssl_steps=steps)


SUPERVISED, ENSEMBLE = "M2F-Lang, supervised", "student/ensemble"
CONTROL = "  with DeWa's steps as well"
RUNGS = (  # Table 1
    Rung(SUPERVISED, "sup"),
    Rung("  + P_ENS at evaluation", "sup", ENSEMBLE, over=(SUPERVISED,)),
    Rung("M2F-Lang + SSL", "ssl", over=(SUPERVISED,)),
    Rung("DEAR", "dear", ENSEMBLE, over=("M2F-Lang + SSL",)),
    Rung(CONTROL, "dear", ENSEMBLE, over=("DEAR",), control=True),
    Rung("DEARLi", "dearli", ENSEMBLE, over=("DEAR", CONTROL)),
)
ALPHAS = tuple(
    Rung(f"DEAR, alpha {value}", "dear", ENSEMBLE, (("alpha", value),))
    for value in (0.5, 0.6, 0.7, "0.4:0.8", "labeled")
)  # Table 8
SHOWN = tuple(rung for rung in RUNGS if rung.kind != "ssl" and not rung.control)  # of the demo


def ladder(method: str | None, preset: str) -> tuple[tuple[Rung, ...], str]:
    """The ladder of a paper, and its name. preset: the one whose numbers its other methods have."""
    if method is None:
        return RUNGS, "ladder"
    return _RUNGS_OF[method](preset), f"ladder-{method}"


def _pldc(preset: str) -> tuple[Rung, ...]:
    mine = {**vars(PRESETS[preset]), **METHODS["pldc"].on(preset)}
    product = round(mine["class_threshold"] * mine["mask_threshold"], 3)
    first, alone = "Mask2Former, supervised", "  in PL-DC's views"
    own, guided = "PL-DC", _items("guided", preset)
    return (
        Rung(first, "sup", name="sup-instances", numbers=(("colour", False),)),
        Rung(alone, "pldc", changes=(("lambda_u", 0.0),), over=(first,)),
        Rung("Guided Distillation", "guided", over=(first,), on_top=True, numbers=guided),
        Rung(own, "pldc", over=(first, alone, "Guided Distillation")),
        Rung("  without DDTF", "pldc", changes=(("coupled", product),), over=(own,)),
        Rung("  without DICC", "pldc", changes=(("clip_view", "none"),), over=(own,)),
        Rung("  without PMUA", "pldc", changes=(("pixel_certainty", False),), over=(own,)),
    )


def _esl(preset: str) -> tuple[Rung, ...]:
    first, hard, soft = "DeepLabv3+, supervised", "hard pseudo-labels", "soft labels"
    return (
        Rung(first, "sup", name="sup-deeplab"),
        Rung(hard, "hard", over=(first,), numbers=_items("hard", preset)),
        Rung(soft, "esl", changes=(("contrast_weight", 0.0),), over=(hard,)),
        Rung("ESL: soft labels and contrast", "esl", over=(first, soft)),
    )


_RUNGS_OF = {"pldc": _pldc, "esl": _esl}  # `engine.flags.LADDERS`


def _items(method: str, preset: str) -> tuple[tuple[str, object], ...]:
    """What a method sets, but for the length: that is the ladder's."""
    fields = METHODS[method].on(preset).items()
    return tuple((name, value) for name, value in fields if name != "ssl_steps")


def require_rungs(cfg: Config, rungs: tuple[Rung, ...]) -> None:
    """Raise UserError for a configuration that some rung cannot be trained with, before the first
    one is.
    """
    for rung in rungs:
        if rung.kind != "sup":
            require_semi_supervised(rung.config(cfg), rung.kind == "dearli")
    clip = cfg.classifier == "language" and not foundation.is_timm(cfg.backbone)
    if not clip and any(rung.kind == "dear" for rung in rungs):
        raise UserError(
            "the rungs are those of M2F-Lang: demo, ladder and alpha need --classifier language "
            "and a CLIP; for others use --stage sup and --stage ssl"
        )


@dataclass(frozen=True)
class Trainer:
    """Trains rungs by the stages of `dearli`, in folders of their own."""

    source: Source
    place: Place
    machine: Machine
    course: Course
    stage_sup: Callable
    stage_ssl: Callable
    warm_up: Callable

    def __call__(self, rung: Rung, cfg: Config, later: bool) -> dict | None:
        """The metrics of a rung, which is trained unless they are there. later: train only, and
        return None.
        """
        folder, numbers = rung.folder(self.place, self.source, cfg), rung.config(cfg)
        # a table is of the numbers that it says: masks and a warm-up of others are refused, as if
        # all flags were given
        given = frozenset(vars(cfg))
        course = dataclasses.replace(
            self.course, resume=True, steps=_length(rung, numbers), given=given, later=later
        )
        require_length(folder, numbers)
        metrics = self.finished(rung, numbers, course, folder)
        if metrics is not None:
            return metrics
        place = dataclasses.replace(self.place, out=folder)
        if rung.kind == "sup":
            self.stage_sup(self.source, place, self.machine, numbers, course)
        else:
            self.stage_ssl(self.source, place, self.machine, numbers, course, rung.kind)
        return None if later else json.loads((folder / "metrics.json").read_text())

    def finished(self, rung: Rung, cfg: Config, course: Course, folder: Path) -> dict | None:
        """The metrics of a rung that is there, of the same numbers, images, ground truth and start;
        else None.
        """
        if not (folder / "metrics.json").exists():
            return None
        metrics = json.loads((folder / "metrics.json").read_text())
        stored = json.loads((folder / "config.json").read_text())
        source, dataset = self.source, self.source.load(cfg)
        about = {
            "data": dataset.train.fingerprint(dataset.labeled if rung.kind == "sup" else None),
            "truth": dataset.truth_fingerprint(unlabeled=rung.kind != "sup"),
        }
        if rung.kind == "dearli":
            place = dataclasses.replace(self.place, out=None)
            where = source, place, self.machine, cfg, course, dataset, folder
            init = self.warm_up(*where, None, rung.kind)
            about["init"] = beginning(folder, Begun(), init)[1]
        numbers = dataclasses.asdict(settle(cfg, dataset))
        expected = {**identity(source, rung.kind, dataset.taxonomy), **about, **numbers}
        same = (
            about.keys() <= stored.keys()
            and not differing(stored, expected)
            and metrics.get("evaluated_on") == source.evaluated_on
        )
        return metrics if same else None

    def logs(self, tasks: list[tuple[Rung, Config]]) -> set[Path]:
        """The log.jsonl of all runs."""
        folders = {rung.folder(self.place, self.source, cfg) for rung, cfg in tasks}
        for rung, cfg in tasks:
            if rung.kind == "dearli":
                folders.add(self.place.folder(self.source, "dewa", cfg.seed))
        return {folder / "log.jsonl" for folder in folders}


def require_length(folder: Path, cfg: Config) -> None:
    """Raise UserError if a run is there that was begun for another number of steps: made longer, it
    would not be the run of a table."""
    if not (folder / "config.json").exists():
        return
    stored = json.loads((folder / "config.json").read_text())
    for name in ("sup_steps", "ssl_steps", "dewa_steps"):
        if stored.get(name) != getattr(cfg, name):
            raise UserError(
                f"{folder}: a run with {dashed(name)} {stored.get(name)}, where the table has "
                f"{getattr(cfg, name)}; choose another folder with --runs, or delete this one"
            )


def _work(rung: Rung) -> str:
    return "control" if rung.control else rung.kind


def _length(rung: Rung, cfg: Config) -> int:
    """Steps of its own stage, of the configuration of a rung."""
    return cfg.sup_steps if rung.kind == "sup" else cfg.ssl_steps


def run_rungs(train: Trainer, tasks: list[tuple[Rung, Config]], jobs: int) -> list[dict]:
    """Train rungs that do not depend on each other, several at a time, each in a process of its
    own; their metrics, in order.

    jobs: 0: as many as there are CPU cores, MAX_JOBS at most; one on a GPU.
    """
    usual = min(os.cpu_count(), MAX_JOBS) if train.machine.device.type == "cpu" else 1
    jobs = min(jobs or usual, len(tasks))
    if jobs == 1:
        return [train(rung, cfg, False) for rung, cfg in tasks]
    spawn, threads = multiprocessing.get_context("spawn"), max(1, os.cpu_count() // jobs)
    total, logs = _total(tasks), train.logs(tasks)
    title = f"{len(tasks)} runs, {jobs} at a time"
    with (
        ProcessPoolExecutor(jobs, spawn, _in_silence, (threads,)) as pool,
        tqdm(total=total, desc=title, unit="step", dynamic_ncols=True) as bar,
    ):
        order = sorted(range(len(tasks)), key=lambda k: LONGEST.index(_work(tasks[k][0])))
        running = {pool.submit(_rung, train, *tasks[k], True): k for k in order}
        metrics = {}
        try:
            while running:
                for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                    k = running.pop(future)
                    metrics[k] = future.result()
                    if metrics[k] is None:  # trained; whichever process is free evaluates it
                        running[pool.submit(_rung, train, *tasks[k], False)] = k
                bar.n = sum(log.read_bytes().count(b"\n") for log in logs if log.exists())
                bar.refresh()
        except BaseException:  # after Ctrl-C the processes have got it, too: each saves its run
            pool.shutdown(cancel_futures=True)
            raise
    return [metrics[k] for k in range(len(tasks))]


def _total(tasks: list[tuple[Rung, Config]]) -> int:
    """Steps of all runs, and of the warm-ups before them: one a seed."""
    warm_ups = {cfg.seed: cfg.dewa_steps for rung, cfg in tasks if rung.kind == "dearli"}
    return sum(_length(rung, rung.config(cfg)) for rung, cfg in tasks) + sum(warm_ups.values())


def _rung(train: Trainer, rung: Rung, cfg: Config, later: bool) -> dict | None:
    """`train` in a process of `run_rungs`, which after Ctrl-C takes no other: the pool has handed
    out one more than it can cancel."""
    global _stopped
    if _stopped:
        raise Stopped(signal.SIGINT, "not begun, stopped")
    try:
        return train(rung, cfg, later)
    except (Stopped, KeyboardInterrupt) as stop:
        _stopped = True
        if not multiprocessing.parent_process().is_alive():  # nobody waits for what is returned
            os._exit(getattr(stop, "code", 130))
        raise


_stopped = False


def _in_silence(threads: int) -> None:
    """A process of `run_rungs`: its lines would run into those of the others; what matters is in
    the run's folder.
    """
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Who stops or kills the table alone stops its runs as well: each saves where it is."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def table(
    rungs: tuple[Rung, ...], name: str, train: Trainer, cfg: Config, count: int, jobs: int
) -> Path:
    """Every rung over `count` seeds: two tables, and the raw figures in NAME.json."""
    require_rungs(cfg, rungs)
    top = train.place.out or train.place.runs
    require_writable(top)
    # apart from the demo's and from those of single stages, which may be of other lengths
    place = dataclasses.replace(train.place, runs=train.place.runs / "ladder")
    source, train = train.source, dataclasses.replace(train, place=place)
    if any(rung.kind == "dearli" for rung in rungs):
        masks.make(source, place.masks(source), train.machine, cfg)  # all seeds share them
    seeds = list(range(cfg.seed, cfg.seed + count))
    trained = {rung.run: rung for rung in rungs}.values()
    tasks = [(rung, dataclasses.replace(cfg, seed=seed)) for rung in trained for seed in seeds]
    results: dict[str, list[dict]] = {}
    for (rung, _), metrics in zip(tasks, run_rungs(train, tasks, jobs)):
        results.setdefault(rung.run, []).append(metrics)
    print("\n" + tables(rungs, results))
    write_results(top / f"{name}.json", results, source, cfg, seeds)
    return top / f"{name}.json"


def tables(rungs: tuple[Rung, ...], results: dict[str, list[dict]]) -> str:
    """Three tables: mean and standard deviation over seeds of the paper's reading of each rung; its
    gain over other rungs, the mean of the differences of the same seeds and its standard error; and
    all readings of every run.
    """
    columns = _columns(results)
    (first, keys), by_title = columns[0], {rung.title: rung for rung in rungs}
    heads = [title for title, _ in columns]

    def figures(rung: Rung, where: tuple[str, ...]) -> list[float]:
        return _figures(results[rung.run], rung.reading, where)

    lines = _head(["rung (the paper's reading)", *heads])
    for rung in rungs:
        lines.append(_row(rung.title, [_spread(figures(rung, where)) for _, where in columns]))
    lines += ["", *_head(["gain", *heads])]
    for rung, title in ((rung, title) for rung in rungs for title in rung.over):
        pairs = [(figures(rung, where), figures(by_title[title], where)) for _, where in columns]
        cells = [_gain(*pair) for pair in pairs]
        lines.append(_row(f"{rung.title.strip()} over {title.strip()}", cells))
    lines += ["", *_head([first, *READINGS])]
    for run, metrics in results.items():
        there = [r for r in READINGS if all(r in m for m in metrics)]
        cells = [_spread(_figures(metrics, r, keys)) if r in there else "" for r in READINGS]
        lines.append(_row(run, cells))
    return "\n".join(lines)


def _columns(results: dict[str, list[dict]]) -> list[tuple[str, tuple[str, ...]]]:
    """The columns of `report.tables` that these results have figures of, the paper's first."""
    of = [m[r] for metrics in results.values() for m in metrics for r in READINGS if r in m]
    return [
        (title, keys)
        for title, keys in columns_of(of)
        if title not in ("SQ", "RQ") and all(figure(m, keys) is not None for m in of)
    ]


def _head(titles: list[str]) -> list[str]:
    return [_row(titles[0], titles[1:]), "|---" * len(titles) + "|"]


def _row(title: str, cells: list[str]) -> str:
    return f"| {' | '.join([title.strip(), *cells])} |"


def _figures(metrics: list[dict], reading: str, keys: tuple[str, ...]) -> list[float]:
    """A figure in percent, by seed."""
    return [100 * figure(m[reading], keys) for m in metrics]


def _spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def _gain(values: list[float], others: list[float]) -> str:
    """Mean ± standard error of the paired differences."""
    gains = [a - b for a, b in zip(values, others)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0
    return f"{statistics.mean(gains):+.1f} ± {error:.1f}"


def write_results(
    path: Path, results: dict[str, list[dict]], source: Source, cfg: Config, seeds: list[int]
) -> None:
    """The raw figures of all runs and seeds, with the command that made them."""
    content = {
        "command": "python " + " ".join(sys.argv),
        "seeds": seeds,
        "split": source.split,
        "evaluated_on": source.eval_on,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "config": dataclasses.asdict(cfg),
        "results": {run: [_slim(m) for m in metrics] for run, metrics in results.items()},
    }
    write_atomic(path, json.dumps(content, indent=1).encode())
    print(f"\n{path}")


def _slim(metrics: dict) -> dict:
    """The figures of all readings, from 0 to 1: "pq", "pq_things", ..."""
    slim = {}
    for reading in READINGS:
        if reading in metrics:
            of = metrics[reading]
            named = [("_".join(reversed(keys)), keys) for _, keys in columns_of([of])]
            values = {name.removesuffix("_all"): figure(of, keys) for name, keys in named}
            slim[reading] = {name: value for name, value in values.items() if value is not None}
    return slim


def picture(methods: list[tuple[str, Method, str]], dataset: DataSet, path: Path) -> None:
    """A picture of SHOWN_IMAGES validation images, their ground truth, and what each method says of
    them: of the first LOOKED_AT those whose PQ, mean of the methods, lies in the middle.

    methods: (title, method, reading).
    """
    looked_at = []
    for i in range(min(LOOKED_AT, len(dataset.val))):
        image, truth = dataset.val.image(i), dataset.val.truth(i)
        answers = [predict_image(m, image, [reading])[reading] for _, m, reading in methods]
        pairs = zip(methods, answers)
        total = sum(image_quality(m, dataset, i, answer) or 0.0 for (_, m, _), answer in pairs)
        looked_at.append((total, i, image, truth, answers))
    looked_at.sort(key=lambda row: row[:2])
    first = max(0, (len(looked_at) - SHOWN_IMAGES) // 2)
    rows = [
        (image, [(one.segment_map, one.labels) for one in (truth, *answers)])
        for _, _, image, truth, answers in looked_at[first : first + SHOWN_IMAGES]
    ]
    titles = ["image", "ground truth", *(title for title, _, _ in methods)]
    caption = (
        f"Of the first {len(looked_at)} validation images the {len(rows)} whose PQ, mean of the "
        "methods, lies in the middle. Striped: no answer.\n"
        f"{len(dataset.labeled)} labelled images, and but for the supervised run "
        f"{len(dataset.unlabeled)} unlabelled ones."
    )
    drawing.picture(rows, titles, dataset.taxonomy, path, caption)
    print(f"\n{path}: images, ground truth and predictions side by side")
