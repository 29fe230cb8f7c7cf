"""Watching a run while it trains: at every checkpoint the PQ of a few validation images, and pictures of the pseudo-labels.

RUN/pq.jsonl gets a line a checkpoint: `step`, `images`, and the PQ (0 to 1) of every reading; RUN/pseudo/ the pictures (`gallery.snapshot`). They
are looked at and decide nothing. Training does not notice: it draws nothing from what is drawn here, and its clock stands still.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config
from engine.evaluation import evaluate
from engine.training import read_log
from ground import ranks
from ground.errors import UserError
from ground.files import write_atomic
from mean_teacher import teacher_alpha
from readers.ground_truth import DataSet
from report import tables
from report.gallery import Reading, snapshot


def watcher(
    folder: Path,
    models: dict,
    dataset: DataSet,
    cfg: Config,
    device: torch.device,
    images: int,
    warm: bool = False,
):
    """A function of the step for `trainer.Run.watch`. images: of the validation set, the first so many; 0 measures nothing and draws nothing."""

    def watch(step: int) -> None:
        try:
            metrics = evaluate(models, dataset, cfg, device, images, title="")
            if ranks.rank() == 0:
                figures = {
                    reading: tables.figure(of, ("all", "pq")) for reading, of in metrics.items()
                }
                row = {"step": step, "images": min(images, len(dataset.val)), **figures}
                kept = [old for old in read(folder) if old["step"] < step]
                write_atomic(
                    file(folder), "".join(json.dumps(r) + "\n" for r in (*kept, row)).encode()
                )
                if "teacher" in models and images:
                    snapshot(
                        folder,
                        step,
                        Reading("", models["teacher"], cfg, teacher_alpha(cfg, step, warm)),
                        dataset,
                        device,
                    )
        except UserError as error:  # an image that cannot be read, a full disk: not worth the run, which says so itself if it matters
            if ranks.count() > 1:  # the others are waiting for what this rank has not measured
                raise
            tqdm.write(f"warning: step {step}: not measured ({error})")

    return watch if images else lambda step: None


def file(folder: Path) -> Path:
    return Path(folder) / "pq.jsonl"


def read(folder: Path) -> list[dict]:
    """The lines of pq.jsonl by step; no file is no line."""
    return read_log(file(folder))
