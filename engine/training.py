"""A run: its folder, its configuration, its steps, its log, its checkpoints, and going on after a
stop. Knows no method.

runs/NAME/ holds config.json, log.jsonl (a line a step), sessions.json, step_*.pt and, after
evaluation, metrics.json. A batch depends on (seed, step, slot) only, so a run that was stopped and
resumed takes the same steps as one that was not.

A line of the log: `step`, `lr`, `time` (seconds of training up to here, all sessions together; a
step that is taken again after a kill counts once), and what the step says of itself (losses,
grad_norm); or `skipped`, the reason, and `images`, the files of the batch. A line is written before
the checkpoint that knows of it, so a log has no hole; later lines are dropped on --resume.
Try: `python dearli.py --stage sup --steps 100 --no-eval --out runs/try-stop`, Ctrl-C at any time,
and the same again with --resume.
"""

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Callable, Iterator

import torch
from tqdm import tqdm

from config import BEFORE, Config
from data import Batches, loader
from engine import checkpoint
from engine.checkpoint import state_of
from engine.method import Method
from engine.optim import Broken, NotFinite, set_lr
from engine.run_log import append, images_of, read_log, summary
from engine.sameness import LATER, difference, differing
from engine.sessions import Session
from ground import files, ranks
from ground.errors import UserError

MAX_SKIPPED = 5  # steps in a row whose loss or gradient is not finite, before the run stops
WATCHED = 10  # times a run is watched, at least, if it has so many steps


class Stopped(Exception):
    """SIGTERM or Ctrl-C ended a run, after a whole step and its checkpoint. code: the exit code
    that says so, 128 + signal.
    """

    def __init__(self, number: int, where: str):
        super().__init__(number, where)
        self.code = 128 + number

    def __str__(self) -> str:
        return f"{self.args[1]} by {signal.Signals(self.args[0]).name}; go on with --resume"


class Run:
    """A run folder, of which this process (of several: rank 0) is the one writer from here to the
    end of `train`.

    Only what is trained is stored; all ranks read it.
    state: the newest checkpoint, where it has been read already (by who holds the folder,
    `files.claim`).
    notes: what config.json shall say beside the configuration.   counts: of images, for
    sessions.json.   watch: called with the step, by all ranks, after every tenth of the steps or as
    often as there are checkpoints, whichever is more often, and at the end.   curves: a
    SummaryWriter of TensorBoard, which gets what log.jsonl gets.
    Raises: UserError if the folder cannot be written, another process writes there, it holds a run
        already and resume is off, or the configuration differs.
    """

    def __init__(
        self, folder: Path, cfg: Config, identity: dict, resume: bool, state: dict | None = None
    ):
        self.folder, self.cfg = Path(folder), cfg
        self.notes: dict = {}
        self.counts: dict[str, int] = {}
        self.watch: Callable[[int], None] | None = None
        self.curves = None
        if ranks.rank() == 0:
            files.claim(self.folder)
        ranks.wait()
        self.config = {**identity, **dataclasses.asdict(cfg)}
        self.state = (state or checkpoint.newest(self.folder)) if resume else None
        checkpoint.require_free(self.folder, resume)
        if self.state:
            self._require_same(self.state)
        self.log = self.folder / "log.jsonl"

    def _require_same(self, state: dict) -> None:
        if not {"step", "config", "optimizer"} <= state.keys():
            raise UserError(
                f"{self.folder}: its newest step_*.pt is not a checkpoint of a run; choose another "
                "folder with --out"
            )
        stored = state["config"]
        differs = differing(stored, self.config)
        if differs:
            there = {**BEFORE, **stored}
            listed = ", ".join(difference(k, there.get(k), self.config[k]) for k in differs)
            raise UserError(
                f"{self.folder}: cannot be resumed with another configuration ({listed}); choose "
                "another folder with --out"
            )
        unknown = [key for key in self.config if key in LATER - stored.keys()]
        if unknown:
            print(
                f"warning: {self.folder}: an older run that does not store what it was made of "
                f"({', '.join(unknown)}): not compared, taken as it is now"
            )

    def train(self, method: Method, batches: Batches) -> None:
        """Take the steps from where the run stands to the last one, and keep checkpoints.

        Models are in training mode at every step, whatever was done with them in between (a teacher
        has its own mind). A step that raises NotFinite is skipped; one that raises Broken ends the
        run.
        Raises: Stopped, after SIGTERM or Ctrl-C;  UserError if nothing can be written, MAX_SKIPPED
            steps in a row were not finite, a weight is not, or a loader process died: the
            checkpoints that were there are intact.
        """
        start, seconds = self._restore(method, len(batches))
        ranks.agree([t for model in method.models.values() for t in model.state_dict().values()])
        if start >= len(batches):
            print(f"{self.folder}: finished at step {start}, nothing to do")
            files.release(self.folder)
            return
        self._begin(start, method.device)
        try:
            self._steps(start, seconds, method, batches)
            return
        except (
            RuntimeError
        ) as error:  # torch's, wherever the main process stands when a worker dies
            died = str(error).splitlines()[0]
            if ranks.count() > 1:
                raise UserError(
                    f"{self.folder}: this or another process of the run failed ({died}); go on "
                    "with --resume"
                ) from None
            if "DataLoader worker" not in died:
                raise
        finally:
            files.release(self.folder)
        raise UserError(
            f"{self.folder}: a loader process died ({died}); if memory ran out, lower --workers; "
            "go on with --resume"
        )

    def _steps(self, start: int, seconds: float, method: Method, batches: Batches) -> None:
        steps, clock, stop = len(batches), time.monotonic() - seconds, False
        self.skipped, self.in_a_row = 0, 0
        every = min(self.cfg.checkpoint_every, max(1, steps // WATCHED))
        hidden = ranks.rank() > 0
        bar = tqdm(
            initial=start,
            total=steps,
            desc=method.title,
            unit="step",
            dynamic_ncols=True,
            disable=hidden,
        )
        with (
            signals() as asked,
            open(os.devnull if hidden else self.log, "ab", buffering=0) as log,
            contextlib.closing(loader(batches, start, self.cfg.workers)) as loaded,
            bar,
        ):
            for step, batch in zip(range(start, steps), loaded):
                row = self._step(method, batch, step, steps)
                row["time"] = round(time.monotonic() - clock, 3)
                append(log, row)
                self._require_progress(row)
                bar.update()
                self._show(bar, row, method.device)
                # one rank is told, all save and stop
                told = torch.tensor(float(bool(asked)), device=method.device)
                stop = bool(ranks.total(told) > 0)
                last = step + 1 == steps
                if (step + 1) % self.cfg.checkpoint_every == 0 or last or stop:
                    progress = {"step": step + 1, "steps": steps, "time": row["time"]}
                    self._save(log, progress, method)
                if self.watch and ((step + 1) % every == 0 or last):
                    pause = time.monotonic()
                    self.watch(step + 1)
                    clock += time.monotonic() - pause
                if stop:
                    break
        if self.skipped:
            print(f"{self.folder}: {self.skipped} steps were skipped; log.jsonl says which and why")
        if stop:
            where = f"{self.folder}: stopped at step {step + 1} of {steps}"
            raise Stopped(asked[0] if asked else signal.SIGTERM, where)

    def _step(self, method: Method, batch, step: int, steps: int) -> dict:
        """One step of the method: its line of the log."""
        row = {"step": step, "lr": set_lr(method.optimizer, step, steps, self.cfg), "time": 0.0}
        torch.manual_seed(self.cfg.seed * 1_000_003 + step)  # drop path of a trained backbone
        for model in method.models.values():
            model.train()
        try:
            row |= method.step(to_device(batch, method.device), step)
            self.in_a_row = 0
        except NotFinite as error:
            names = images_of(batch)
            self._require_whole(method, step + 1, names if isinstance(error, Broken) else ())
            row["skipped"] = str(error)
            row["images"] = [name for of_rank in ranks.gather(names) for name in of_rank]
            tqdm.write(f"warning: skipped {_skipped(row)}")
            self.skipped += 1
            self.in_a_row += 1
        return row

    def _require_progress(self, row: dict) -> None:
        if self.in_a_row == MAX_SKIPPED:
            raise UserError(
                f"{self.folder}: stopped after {MAX_SKIPPED} steps in a row that were not finite; "
                f"last: {_skipped(row)}"
            )

    def _show(self, bar, row: dict, device: torch.device) -> None:
        for name, value in row.items() if self.curves is not None else ():
            if isinstance(value, float):
                self.curves.add_scalar(name, value, row["step"])
        every = min(self.cfg.log_every, max(1, bar.total // 20))  # of a short run, more often
        if row["step"] % every == 0 and "loss" in row:
            bar.set_postfix_str(summary(row, device), refresh=False)

    def _begin(self, start: int, device: torch.device) -> None:
        """Bring the folder to the step of the checkpoint: its evaluation is of another state, and
        later lines of the log are taken again."""
        if ranks.rank() > 0:
            return
        (self.folder / "metrics.json").unlink(missing_ok=True)
        config = json.dumps({**self.config, **self.notes}, indent=1).encode()
        files.write_atomic(self.folder / "config.json", config)
        rows = [json.dumps(row) + "\n" for row in read_log(self.log) if row["step"] < start]
        files.write_atomic(self.log, "".join(rows).encode())
        self.session = Session(self.folder, start, device, self.counts)

    def _save(self, log, progress: dict, method: Method) -> None:
        self._require_whole(method, progress["step"])
        weights = {name: state_of(model) for name, model in method.models.items()}
        if ranks.rank() > 0:
            return
        os.fsync(log.fileno())
        optimizer = {"config": self.config, "optimizer": method.optimizer.state_dict()}
        checkpoint.save(self.folder, progress["step"], {**progress, **optimizer, **weights})
        self.session.reached(progress["step"])

    def _require_whole(self, method: Method, step: int, images=()) -> None:
        """Raise UserError if a weight is not finite, after so many steps: no further step can mend
        it.
        """
        broken = [
            f"{name}: {key}"
            for name, model in method.models.items()
            for key, value in state_of(model).items()
            if not torch.isfinite(value).all()
        ]
        if broken:
            batch = f"; images: {', '.join(images)}" if images else ""
            raise UserError(
                f"{self.folder}: weights are not finite at step {step} ({', '.join(broken[:3])})"
                f"{batch}; the checkpoint before is intact; begin again with a lower --lr"
            )

    def _restore(self, method: Method, steps: int) -> tuple[int, float]:
        """Fill models and optimiser from the checkpoint: (steps taken, seconds they took)."""
        state, self.state = self.state, None
        if not state:
            return 0, 0.0
        for name, model in method.models.items():
            checkpoint.load_weights(state_of(model), state[name], f"{self.folder} ({name})")
        method.optimizer.load_state_dict(state["optimizer"])
        if state.get("steps", steps) != steps and state["step"] < steps:
            print(
                f"{self.folder}: {state['step']} steps were taken on the schedule of "
                f"{state['steps']}, the rest follows that of {steps}: not the same as {steps} from "
                "the start"
            )
        return state["step"], state.get("time", 0.0)


def _skipped(row: dict) -> str:
    return f"step {row['step']}: {row['skipped']}; images: {', '.join(row['images'])}"


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A list that receives the number of a SIGTERM or SIGINT (Ctrl-C); the second one acts as if
    nobody listened.
    """
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
        text = "the step at hand is finished and saved; once more to stop at once"
        os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def to_device(batch, device: torch.device):
    """A batch, or a tuple of batches of which some are None."""
    if isinstance(batch, tuple):
        return tuple(to_device(b, device) for b in batch)
    return None if batch is None else batch.to(device)
