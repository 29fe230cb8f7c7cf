"""A run: its folder, its configuration, its steps, its log, its checkpoints, and going on after a stop. Knows no method.

runs/NAME/ holds config.json, log.jsonl (a line a step), step_*.pt and, after evaluation, metrics.json. A batch depends on
(seed, step, slot) only, so a run that was stopped and resumed takes the same steps as one that was not.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

import checkpoint
from config import Config, UserError
from data import Batches, loader
from optim import NotFinite, set_lr

# What may change on --resume: how far to go, how fast, and how masks are made, which is another stage's business
MAY_CHANGE = {"ssl_steps", "sup_steps", "dewa_steps", "workers", "checkpoint_every", "log_every", "eval_batch", "sam", "sam_weights",
              "points_per_side", "points_per_batch", "pred_iou_thresh", "stability_thresh", "mask_nms_thresh"}
MAX_SKIPPED = 5                        # steps in a row whose loss is not finite, before the run stops


class Run:
    """A run folder. `parts` are the models by name (student, teacher); only what is trained is stored.

    Raises: UserError if the folder holds a run already and resume is off, or if the configuration differs.
    """

    def __init__(self, folder: Path, cfg: Config, identity: dict, resume: bool):
        self.folder, self.cfg = Path(folder), cfg
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: is a file, expected a folder for the run; choose another with --out")
        self.config = {**identity, **dataclasses.asdict(cfg)}
        self.state = checkpoint.newest(self.folder) if resume else None
        if not resume and checkpoint.steps(self.folder):
            raise UserError(f"{self.folder}: holds a run already; go on with --resume, or choose another folder with --out")
        if self.state:
            self._require_same(self.state["config"])
        checkpoint.write_atomic(self.folder / "config.json", json.dumps(self.config, indent=1).encode())
        self.log = self.folder / "log.jsonl"

    def _require_same(self, stored: dict) -> None:
        differs = differing(stored, self.config)
        if differs:
            listed = ", ".join(f"{k}: {stored.get(k)} there, {self.config[k]} now" for k in differs[:6])
            raise UserError(f"{self.folder}: cannot be resumed with another configuration ({listed}); choose another folder with --out")

    def train(self, models: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, batches: Batches,
              step_fn: Callable, device: torch.device, title: str) -> None:
        """Run step_fn(batch, step) -> losses from where the run stands to the last step, and keep checkpoints."""
        start, steps = self._restore(models, optimizer), len(batches)
        if start >= steps:
            print(f"{self.folder}: finished at step {start}, nothing to do")
            return
        lines = self._lines_before(start)
        skipped, clock = 0, time.time()
        bar = tqdm(zip(range(start, steps), loader(batches, start, self.cfg.workers)), initial=start, total=steps, desc=title,
                   unit="step", dynamic_ncols=True)
        with open(self.log, "w") as log:
            log.writelines(lines)
            for step, batch in bar:
                lr = set_lr(optimizer, step, steps, self.cfg)
                try:
                    losses = step_fn(to_device(batch, device), step)
                    skipped = 0
                except NotFinite as error:
                    skipped += 1
                    if skipped == MAX_SKIPPED:
                        raise UserError(f"{self.folder}: stopped after {MAX_SKIPPED} steps in a row without a finite loss; last: {error}") from None
                    tqdm.write(f"warning: skipped {error}")
                    losses = {"skipped": 1}
                log.write(json.dumps({"step": step, "lr": lr, "time": round(time.time() - clock, 3), **losses}) + "\n")
                if step % self.cfg.log_every == 0 and "loss" in losses:
                    bar.set_postfix(loss=f"{losses['loss']:.2f}", refresh=False)
                if (step + 1) % self.cfg.checkpoint_every == 0 or step + 1 == steps:
                    log.flush()
                    self._save(step + 1, models, optimizer)

    def _save(self, step: int, models: dict, optimizer) -> None:
        checkpoint.save(self.folder, step, {"step": step, "config": self.config, "optimizer": optimizer.state_dict(),
                                            **{name: {k: p.detach() for k, p in m.trained().items()} for name, m in models.items()}})

    def _restore(self, models: dict, optimizer) -> int:
        if not self.state:
            return 0
        for name, model in models.items():
            checkpoint.load_weights(model.trained(), self.state[name], f"{self.folder} ({name})")
        optimizer.load_state_dict(self.state["optimizer"])
        step, self.state = self.state["step"], None
        return step

    def _lines_before(self, step: int) -> list[str]:
        """Log lines of the steps that the checkpoint knows; later ones, or one cut short, are taken again."""
        kept = []
        for line in self.log.read_text().splitlines(keepends=True) if self.log.exists() and step else []:
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        return kept


def differing(stored: dict, config: dict) -> list[str]:
    """Keys that make a stored run another run than the one asked for; figures of the warm-up matter to the warm-up only."""
    return [key for key in config if key not in MAY_CHANGE and stored.get(key) != config[key]
            and not (key.startswith("dewa_") and config["stage"] != "dewa")]


def to_device(batch, device: torch.device):
    """A batch, or a tuple of batches of which some are None."""
    if isinstance(batch, tuple):
        return tuple(to_device(b, device) for b in batch)
    return None if batch is None else batch.to(device)
