"""A run: its folder, its configuration, its steps, its log, its checkpoints, and going on after a stop. Knows no method.

runs/NAME/ holds config.json, log.jsonl (a line a step), step_*.pt and, after evaluation, metrics.json. A batch depends on
(seed, step, slot) only, so a run that was stopped and resumed takes the same steps as one that was not.

A line of the log: `step`, `lr`, `time` (seconds of training up to here, all sessions together; a step that is taken again after a kill
counts once), and what the step says of itself (losses, grad_norm); or `skipped`, the reason, and `images`, the files of the batch.
A line is written before the checkpoint that knows of it, so a log has no hole; later lines are dropped on --resume.
Try: `python dearli.py --stage sup --steps 100 --no-eval --out runs/try-stop`, Ctrl-C at any time, and the same again with --resume.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Iterator

import torch
from tqdm import tqdm

from config import BEFORE, Config
from data import Batches, loader
from engine import checkpoint
from engine.flags import READS
from engine.optim import Broken, NotFinite, set_lr
from ground import files, ranks
from ground.errors import UserError
from ground.identity import differences

# What may change on --resume: how far to go, how fast, and how masks are made, which is another stage's business
MAY_CHANGE = {
    "ssl_steps",
    "sup_steps",
    "dewa_steps",
    "workers",
    "checkpoint_every",
    "log_every",
    "eval_batch",
    "sam",
    "sam_weights",
    "points_per_side",
    "points_per_batch",
    "pred_iou_thresh",
    "stability_thresh",
    "mask_nms_thresh",
}
LATER = {
    "taxonomy",
    "data",
    "truth",
    "init",
    "masks",
}  # what runs did not always store of their identity
MAX_SKIPPED = 5  # steps in a row whose loss or gradient is not finite, before the run stops


class Stopped(Exception):
    """SIGTERM or Ctrl-C ended a run, after a whole step and its checkpoint. code: the exit code that says so, 128 + signal."""

    def __init__(self, number: int, where: str):
        super().__init__(number, where)
        self.code = 128 + number

    def __str__(self) -> str:
        return f"{self.args[1]} by {signal.Signals(self.args[0]).name}; go on with --resume"


class Run:
    """A run folder, of which this process (of several: rank 0) is the one writer from here to the end of `train`. Only what is trained
    is stored; all ranks read it.

    notes: what config.json shall say beside the configuration.
    state: the newest checkpoint, where it has been read already (by who holds the folder,
    `checkpoint.claim`).
    watch: called with the step after every checkpoint, by all ranks.   curves: a SummaryWriter of TensorBoard, which gets what log.jsonl gets.
    Raises: UserError if the folder cannot be written, another process writes there, it holds a run already and resume is off, or the
        configuration differs.
    """

    def __init__(
        self, folder: Path, cfg: Config, identity: dict, resume: bool, state: dict | None = None
    ):
        self.folder, self.cfg, self.notes, self.watch, self.curves = (
            Path(folder),
            cfg,
            {},
            lambda step: None,
            None,
        )
        if ranks.rank() == 0:
            files.claim(self.folder)
        ranks.wait()
        self.config = {**identity, **dataclasses.asdict(cfg)}
        self.state = (state or checkpoint.newest(self.folder)) if resume else None
        require_free(self.folder, resume)
        if self.state:
            self._require_same(self.state)
        self.log = self.folder / "log.jsonl"

    def _require_same(self, state: dict) -> None:
        if not {"step", "config", "optimizer"} <= state.keys():
            raise UserError(
                f"{self.folder}: its newest step_*.pt is not a checkpoint of a run; choose another folder with --out"
            )
        stored = state["config"]
        differs = differing(stored, self.config)
        if differs:
            listed = ", ".join(_differs(k, stored.get(k), self.config[k]) for k in differs)
            raise UserError(
                f"{self.folder}: cannot be resumed with another configuration ({listed}); choose another folder with --out"
            )
        unknown = [key for key in self.config if key in LATER - stored.keys()]
        if unknown:
            print(
                f"warning: {self.folder}: an older run that does not store what it was made of "
                f"({', '.join(unknown)}): not compared, taken as it is now"
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
        """Run step_fn(batch, step) -> losses from where the run stands to the last step, and keep checkpoints.

        models: by name (student, teacher), in training mode at every step, whatever was done with them in between (a teacher has its own mind).
        step_fn may raise NotFinite and then leaves the models as they were: the step is skipped; or Broken, if it did not, which ends the run.
        Raises: Stopped, after SIGTERM or Ctrl-C;  UserError if nothing can be written, MAX_SKIPPED steps in a row were not finite, a weight is
            not, or a loader process died: the checkpoints that were there are intact.
        """
        start, seconds = self._restore(models, optimizer, len(batches))
        ranks.agree([t for model in models.values() for t in model.state_dict().values()])
        if start >= len(batches):
            print(f"{self.folder}: finished at step {start}, nothing to do")
            files.release(self.folder)
            return
        self._begin(start)
        try:
            self._steps(start, seconds, models, optimizer, batches, step_fn, device, title)
            return
        except (
            RuntimeError
        ) as error:  # torch raises it wherever the main process stands when a worker dies
            died = str(error).splitlines()[0]
            if ranks.count() > 1:
                raise UserError(
                    f"{self.folder}: this or another process of the run failed ({died}); go on with --resume"
                ) from None
            if "DataLoader worker" not in died:
                raise
        finally:
            files.release(self.folder)
        raise UserError(
            f"{self.folder}: a loader process died ({died}); if memory ran out, lower --workers; go on with --resume"
        )

    def _steps(self, start, seconds, models, optimizer, batches, step_fn, device, title) -> None:
        steps, skipped, in_a_row, stop, clock = (
            len(batches),
            0,
            0,
            False,
            time.monotonic() - seconds,
        )
        with (
            signals() as asked,
            open(self.log if ranks.rank() == 0 else os.devnull, "ab", buffering=0) as log,
            contextlib.closing(loader(batches, start, self.cfg.workers)) as loaded,
            tqdm(
                initial=start,
                total=steps,
                desc=title,
                unit="step",
                dynamic_ncols=True,
                disable=ranks.rank() > 0,
            ) as bar,
        ):
            for step, batch in zip(range(start, steps), loaded):
                row = {"step": step, "lr": set_lr(optimizer, step, steps, self.cfg), "time": 0.0}
                torch.manual_seed(
                    self.cfg.seed * 1_000_003 + step
                )  # drop path of a trained backbone
                for model in models.values():
                    model.train()
                try:
                    row |= step_fn(to_device(batch, device), step)
                    in_a_row = 0
                except NotFinite as error:
                    self._require_whole(
                        models, step + 1, images_of(batch) if isinstance(error, Broken) else ()
                    )
                    row |= {
                        "skipped": str(error),
                        "images": [
                            name for names in ranks.gather(images_of(batch)) for name in names
                        ],
                    }
                    said = f"step {step}: {error}; images: {', '.join(row['images'])}"
                    tqdm.write(f"warning: skipped {said}")
                    skipped, in_a_row = skipped + 1, in_a_row + 1
                row["time"] = round(time.monotonic() - clock, 3)
                append(log, row)
                if in_a_row == MAX_SKIPPED:
                    raise UserError(
                        f"{self.folder}: stopped after {MAX_SKIPPED} steps in a row that were not finite; last: {said}"
                    )
                bar.update()
                if self.curves is not None:
                    for name, value in row.items():
                        if isinstance(value, float):
                            self.curves.add_scalar(name, value, step)
                if step % self.cfg.log_every == 0 and "loss" in row:
                    bar.set_postfix_str(summary(row, device), refresh=False)
                stop = (
                    ranks.total(torch.tensor(float(bool(asked)), device=device)) > 0
                )  # one rank is told, all save and stop
                if (step + 1) % self.cfg.checkpoint_every == 0 or step + 1 == steps or stop:
                    self._save(
                        log,
                        {"step": step + 1, "steps": steps, "time": row["time"]},
                        models,
                        optimizer,
                    )
                    pause = time.monotonic()
                    self.watch(step + 1)
                    clock += time.monotonic() - pause
                if stop:
                    break
        if skipped:
            print(f"{self.folder}: {skipped} steps were skipped; log.jsonl says which and why")
        if stop:
            raise Stopped(
                asked[0] if asked else signal.SIGTERM,
                f"{self.folder}: stopped at step {step + 1} of {steps}",
            )

    def _begin(self, start: int) -> None:
        """Bring the folder to the step of the checkpoint: its evaluation is of another state, and later lines of the log are taken again."""
        if ranks.rank() > 0:
            return
        (self.folder / "metrics.json").unlink(missing_ok=True)
        files.write_atomic(
            self.folder / "config.json",
            json.dumps({**self.config, **self.notes}, indent=1).encode(),
        )
        kept = [json.dumps(row) + "\n" for row in read_log(self.log) if row["step"] < start]
        files.write_atomic(self.log, "".join(kept).encode())

    def _save(self, log, progress: dict, models: dict, optimizer) -> None:
        self._require_whole(models, progress["step"])
        weights = {
            name: {k: p.detach() for k, p in model.trained().items()}
            for name, model in models.items()
        }
        if ranks.rank() > 0:
            return
        os.fsync(log.fileno())
        checkpoint.save(
            self.folder,
            progress["step"],
            {**progress, "config": self.config, "optimizer": optimizer.state_dict(), **weights},
        )

    def _require_whole(self, models: dict, step: int, images=()) -> None:
        """Raise UserError if a weight is not finite, after so many steps: no further step can mend it."""
        broken = [
            f"{name}: {k}"
            for name, model in models.items()
            for k, p in model.trained().items()
            if not torch.isfinite(p).all()
        ]
        if broken:
            batch = f"; images: {', '.join(images)}" if images else ""
            raise UserError(
                f"{self.folder}: weights are not finite at step {step} ({', '.join(broken[:3])}){batch}; the checkpoint before is intact; "
                f"begin again with a lower --lr"
            )

    def _restore(self, models: dict, optimizer, steps: int) -> tuple[int, float]:
        """Fill models and optimiser from the checkpoint; returns (steps taken, seconds they took)."""
        state, self.state = self.state, None
        if not state:
            return 0, 0.0
        for name, model in models.items():
            checkpoint.load_weights(model.trained(), state[name], f"{self.folder} ({name})")
        optimizer.load_state_dict(state["optimizer"])
        if state.get("steps", steps) != steps and state["step"] < steps:
            print(
                f"{self.folder}: {state['step']} steps were taken on the schedule of {state['steps']}, the rest follows that of {steps}: "
                f"not the same as {steps} from the start"
            )
        return state["step"], state.get("time", 0.0)


def require_free(folder: Path, resume: bool) -> None:
    """Raise UserError if a run is in the folder that is not to go on."""
    if not resume and checkpoint.steps(folder):
        raise UserError(
            f"{folder}: holds a run already; go on with --resume, or choose another folder with "
            f"--out"
        )


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A list that receives the number of a SIGTERM or SIGINT (Ctrl-C); the second one acts as if nobody listened."""
    asked: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # no other may listen
    before = {
        n: signal.getsignal(n) or signal.SIG_DFL
        for n in (signal.SIGINT, signal.SIGTERM)
        if main and signal.getsignal(n) != signal.SIG_IGN
    }

    def note(number, frame):
        asked.append(number)
        signal.signal(number, before[number])
        os.write(
            2,
            f"\n{signal.Signals(number).name}: the step at hand is finished and saved; once more to stop at once\n".encode(),
        )

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def append(log, row: dict) -> None:
    """Add a line to a log that is open without a buffer, all of it or nothing."""
    line, end = (json.dumps(row) + "\n").encode(), log.tell()
    try:
        while line:  # a disk that fills up takes a part, and says why it takes no more
            line = line[log.write(line) :]
    except OSError as error:
        log.truncate(end)
        raise UserError(
            f"{log.name}: cannot be written ({error.strerror}); make room and go on with --resume"
        ) from None


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; one that was cut short is left out, and no file is no line."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and "step" in row else []
    return rows


def differing(stored: dict, config: dict) -> list[str]:
    """Keys that make a stored run another run than the one asked for; numbers that its stage does not read make none."""
    # a run of stage ssl is named after its method; runs did not always store everything
    read = READS.get(config["stage"], READS["ssl"])
    idle = (
        MAY_CHANGE | (LATER - stored.keys()) | ({f.name for f in dataclasses.fields(Config)} - read)
    )
    stored = {**BEFORE, **stored}
    if stored.get("data") is not None and stored["data"] == config.get("data"):
        idle |= {"dataset", "data_root"}  # the same images under another path are the same
    return [
        key
        for key in config
        if key not in idle and _essence(key, stored.get(key)) != _essence(key, config[key])
    ]


def _essence(key: str, value):
    """What of a value makes a run that run: not the path of a thing, nor the colours of classes."""
    parts = {
        "init": ("sha256",),
        "masks": ("generator", "digest"),
        "taxonomy": ("names", "things"),
    }.get(key)
    return {part: value.get(part) for part in parts} if parts and isinstance(value, dict) else value


def _differs(key: str, there, now) -> str:
    """A line's part about a key of `differing`."""
    if key == "masks" and isinstance(there, dict) and isinstance(now, dict):
        differs = differences(there.get("generator") or {}, now["generator"] or {})
        return f"masks: {differs or 'others'} (it began with those of {there.get('folder')})"
    what = {
        "data": "data: other training images",
        "truth": "truth: other ground truth, or other labelled or unlabelled images",
    }.get(key)
    return f"{what} than it began with" if what else f"{key}: {there!s:.60} there, {now!s:.60} now"


def summary(row: dict, device: torch.device) -> str:
    """The loss of a step, the sums of its labelled and its unlabelled terms, and the memory so far, for the progress bar."""
    parts = {
        kind: sum(v for k, v in row.items() if k.startswith(f"{kind}/"))
        for kind in ("labeled", "unlabeled")
        if any(k.startswith(f"{kind}/") for k in row)
    }
    return ", ".join(
        [
            *(f"{name} {value:.2f}" for name, value in {"loss": row["loss"], **parts}.items()),
            f"{memory_gb(device):.1f} GB",
        ]
    )


def memory_gb(device: torch.device) -> float:
    """The most memory that this process has used up to here: on a GPU what tensors took, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def to_device(batch, device: torch.device):
    """A batch, or a tuple of batches of which some are None."""
    if isinstance(batch, tuple):
        return tuple(to_device(b, device) for b in batch)
    return None if batch is None else batch.to(device)


def images_of(batch) -> list[str]:
    """Names of the files in a batch, or in a tuple of batches of which some are None."""
    return [
        name
        for b in (batch if isinstance(batch, tuple) else (batch,))
        if b is not None
        for name in b.names
    ]
