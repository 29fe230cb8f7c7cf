"""A rehearsal (--dry-run): what a run will cost, from a few of its steps, which are forgotten. Nothing is written.

It stands in for `trainer.Run`: the same models, the same batches, the same steps. Parts of a run that differ in cost (a burn-in has no unlabelled
images) are tried apart. Steps are those of untrained weights, and the first of each part, which warms up, is not counted.
Try: `python dearli.py --stage ssl --method dear --dry-run`.
"""

import statistics
import time
from pathlib import Path
from typing import Callable

import torch

from config import Config, changes
from data import Batches
from engine.optim import NotFinite
from engine.training import memory_gb, to_device
from ground.errors import UserError
from readers.ground_truth import DataSet
from readers.sixteen_bit import WHITE

TRIED = 3  # steps that are timed, of every part
IMAGES = 4  # validation images that are timed


class Rehearsal:
    """Has the face of `trainer.Run`. cfg: as there;  preset: what the configuration is compared with."""

    def __init__(self, folder: Path, cfg: Config, identity: dict, preset: Config):
        self.folder, self.cfg, self.config, self.seconds = Path(folder), cfg, dict(identity), 0.0
        changed = changes(vars(cfg), preset)
        if cfg.white == WHITE:  # nothing was measured
            changed.pop("white", None)
        say("run", f"{folder} (nothing is written now)")
        say(
            "config",
            f"{identity['stage']}; "
            + (
                f"other than the preset's: {', '.join(f'{k} {v}' for k, v in changed.items())}"
                if changed
                else "the preset's numbers"
            ),
        )

    def train(
        self,
        models: dict[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        step_fn: Callable,
        device: torch.device,
        title: str,
    ) -> None:
        """As `Run.train`, but for a few steps of each part. Prints the time that all would take, the memory, and the size of a checkpoint."""
        sizes = {
            name: sum(p.numel() for p in model.trained().values()) for name, model in models.items()
        }
        say(
            "model",
            ", ".join(f"{name}: {count:,} trained parameters" for name, count in sizes.items()),
        )
        parts = [*batches.parts, len(batches)]
        for first, end in zip(parts, parts[1:]):
            loading, stepping = [], []
            for step in range(first, min(first + TRIED + 1, end)):
                clock = time.perf_counter()
                batch = batches[step]
                loading.append(time.perf_counter() - clock)
                clock = time.perf_counter()
                for model in models.values():
                    model.train()
                try:
                    step_fn(to_device(batch, device), step)  # returns numbers: a GPU has finished
                except NotFinite as error:
                    raise UserError(
                        f"step {step}: {error}; a run would skip it or stop: lower --lr"
                    ) from None
                stepping.append(time.perf_counter() - clock)
            load, take = (statistics.median(times[1:] or times) for times in (loading, stepping))
            each = max(take, load / self.cfg.workers) if self.cfg.workers else take + load
            self.seconds += (end - first) * each
            behind = f"; making a batch takes {load:.2g} s" + (
                f" in one of {self.cfg.workers} loader processes" if self.cfg.workers else " more"
            )
            say(
                "steps",
                f"{first + 1} to {end}: {take:.2g} s each{behind}{', and is what the run waits for: raise --workers' if self.cfg.workers and each > take else ''}",
            )
        say("time", f"{duration(self.seconds)} of training")
        say_memory(device)
        values = sum(sizes.values()) + 2 * sizes["student"]  # of AdamW: two averages
        say("disk", f"{4e-6 * values:,.0f} MB a checkpoint, of which the newest two are kept")


def say_data(dataset: DataSet, split: str) -> None:
    things = sum(dataset.taxonomy.things)
    say(
        "data",
        f"{dataset.name}, split {split}: {len(dataset.taxonomy)} classes ({things} things), {len(dataset.labeled):,} labelled and {len(dataset.unlabeled):,} unlabelled "
        f"images, {len(dataset.val):,} for validation",
    )


def say_repeated(what: str, count: int, do: Callable[[int], object], tried: int = IMAGES) -> None:
    """Time do(k) for the first few of `count` things, and say how long all of them will take."""
    times = []
    for k in range(min(tried + 1, count)):
        clock = time.perf_counter()
        do(k)
        times.append(time.perf_counter() - clock)
    each = statistics.median(times[1:] or times) if times else 0.0
    say(what, f"{duration(count * each)}: {count:,} images of {each:.2g} s")


def say_memory(device: torch.device) -> None:
    say(
        "memory",
        f"{memory_gb(device):.1f} GB at most{' on the GPU' if device.type == 'cuda' else ', libraries included'}",
    )


def duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"about {seconds / unit:.0f} {name}"
    return f"about {seconds:.0f} seconds"


def say(what: str, text: str) -> None:
    print(f"{what:<11}{text}")
