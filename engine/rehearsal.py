"""A rehearsal (--dry-run): what a run will cost, from a few of its steps, which are forgotten.
Nothing is written.

It stands in for `training.Run`: the same models, the same batches, the same steps. Parts of a run
that differ in cost (a burn-in has no unlabelled images) are tried apart. Steps are those of
untrained weights, and the first of each part, which warms up, is not counted.
Try: `python dearli.py --stage ssl --method dear --dry-run`.
"""

import statistics
import time
from pathlib import Path
from typing import Callable

import torch

from config import Config, changes
from data import Batches
from engine.checkpoint import state_of
from engine.method import Method
from engine.optim import NotFinite
from engine.run_log import memory_gb
from engine.training import WATCHED, to_device
from ground.errors import UserError
from readers.ground_truth import DataSet
from readers.sixteen_bit import WHITE

TRIED = 3  # steps that are timed, of every part
IMAGES = 4  # validation images that are timed


class Rehearsal:
    """Has the face of `training.Run`. cfg: as there;  preset: what the configuration is compared
    with.
    """

    def __init__(self, folder: Path, cfg: Config, identity: dict, preset: Config):
        self.folder, self.cfg, self.config = Path(folder), cfg, dict(identity)
        self.watch = None
        self.seconds = 0.0
        changed = changes(vars(cfg), preset)
        if cfg.white == WHITE:  # nothing was measured
            changed.pop("white", None)
        numbers = ", ".join(f"{name} {value}" for name, value in changed.items())
        numbers = f"other than the preset's: {numbers}" if numbers else "the preset's numbers"
        say("run", f"{folder} (nothing is written there now)")
        say("config", f"{identity['stage']}; {numbers}")

    def train(self, method: Method, batches: Batches) -> None:
        """As `Run.train`, but for a few steps of each part. Prints the time that all would take,
        the memory, and the size of a checkpoint."""
        sizes = {
            name: sum(t.numel() for t in state_of(model).values())
            for name, model in method.models.items()
        }
        counts = (f"{name}: {count:,} trained parameters" for name, count in sizes.items())
        say("model", ", ".join(counts))
        parts = [*batches.parts, len(batches)]
        for first, end in zip(parts, parts[1:]):
            self._part(method, batches, first, end)
        say("time", f"{duration(self.seconds)} of training")
        say_memory(method.device)
        values = sum(sizes.values()) + 2 * sizes["student"]  # of AdamW: two averages
        say("disk", f"{4e-6 * values:,.0f} MB a checkpoint, of which the newest two are kept")

    def _part(self, method: Method, batches: Batches, first: int, end: int) -> None:
        loading, stepping = [], []
        for step in range(first, min(first + TRIED + 1, end)):
            clock = time.perf_counter()
            batch = batches[step]
            loading.append(time.perf_counter() - clock)
            clock = time.perf_counter()
            for model in method.models.values():
                model.train()
            try:  # returns numbers: a GPU has finished
                method.step(to_device(batch, method.device), step)
            except NotFinite as error:
                raise UserError(
                    f"step {step}: {error}; a run would skip it or stop: lower --lr"
                ) from None
            stepping.append(time.perf_counter() - clock)
        load, take = (statistics.median(times[1:] or times) for times in (loading, stepping))
        text = f"{first + 1} to {end}: {take:.2g} s each; making a batch takes {load:.2g} s"
        each, workers = take + load, self.cfg.workers
        if workers:
            each = max(take, load / workers)
            text += f" in one of {workers} loader processes"
            if each > take:
                text += ", and is what the run waits for: raise --workers"
        else:
            text += " more"
        self.seconds += (end - first) * each
        say("steps", text)


def say_data(dataset: DataSet, split: str) -> None:
    things = sum(dataset.taxonomy.things)
    say(
        "data",
        f"{dataset.name}, split {split}: {len(dataset.taxonomy)} classes ({things} things), "
        f"{len(dataset.labeled):,} labelled and {len(dataset.unlabeled):,} unlabelled "
        f"images, {len(dataset.val):,} for validation",
    )


def say_repeated(what: str, count: int, do: Callable[[int], object], tried: int = IMAGES) -> float:
    """Time do(k) for the first few of `count` things, and say how long all of them will take.
    Returns the seconds of one."""
    times = []
    for k in range(min(tried + 1, count)):
        clock = time.perf_counter()
        do(k)
        times.append(time.perf_counter() - clock)
    each = statistics.median(times[1:] or times) if times else 0.0
    say(what, f"{duration(count * each)}: {count:,} images of {each:.2g} s")
    return each


def say_watching(images: int, each: float) -> None:
    """What `report.watch` takes, beside the training. each: seconds of an image."""
    text = f"{duration(WATCHED * images * each)}: {WATCHED} times or more {images} images"
    say("watching", f"{text}, beside the training (--watch)")


def say_memory(device: torch.device) -> None:
    what = " on the GPU" if device.type == "cuda" else ", libraries included"
    say("memory", f"{memory_gb(device):.1f} GB at most{what}")


def duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"about {seconds / unit:.0f} {name}"
    return f"about {seconds:.0f} seconds"


def say(what: str, text: str) -> None:
    print(f"{what:<11}{text}")
