"""Watching a run while it trains: ten times or more the figures of a few validation images, and
pictures of the pseudo-labels.

RUN/pq.jsonl gets a line each time: `step`, `images`, and the first figure (PQ, 0 to 1) of every
reading; RUN/pseudo/ the pictures (`gallery.snapshot`). They are looked at and decide nothing.
Training does not notice: it draws no random number from what is measured here, and its clock stands
still.
"""

import json
from pathlib import Path

from tqdm import tqdm

from engine.evaluation import evaluate
from engine.method import Method
from engine.run_log import read_log
from ground import ranks
from ground.errors import UserError
from ground.files import write_atomic
from inference import PSEUDO
from readers.ground_truth import DataSet
from report import tables
from report.gallery import snapshot


def watcher(folder: Path, method: Method, dataset: DataSet, images: int):
    """A function of the step for `training.Run.watch`. images: of the validation set, the first so
    many; 0: no function.
    """

    def watch(step: int) -> None:
        try:
            metrics = evaluate(method, dataset, images, title="")
            if ranks.rank() == 0:
                _write(folder, step, min(images, len(dataset.val)), method, metrics)
                if PSEUDO in method.pictured:
                    snapshot(folder, step, method, dataset)
        except UserError as error:  # an image that cannot be read, a full disk: not worth the run
            if ranks.count() > 1:  # the others are waiting for what this rank has not measured
                raise
            tqdm.write(f"warning: step {step}: not measured ({error})")

    return watch if images else None


def _write(folder: Path, step: int, images: int, method: Method, metrics: dict) -> None:
    """The line of a step; lines of later steps, of before a kill, go."""
    _, where = method.metrics[0].columns[0]
    figures = {reading: tables.figure(result, where) for reading, result in metrics.items()}
    row = {"step": step, "images": images, **figures}
    rows = [*(old for old in read(folder) if old["step"] < step), row]
    write_atomic(file(folder), "".join(json.dumps(row) + "\n" for row in rows).encode())


def file(folder: Path) -> Path:
    return Path(folder) / "pq.jsonl"


def read(folder: Path) -> list[dict]:
    """The lines of pq.jsonl by step; no file is no line."""
    return read_log(file(folder))
