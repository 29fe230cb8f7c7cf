"""A run, or an official file, as one file: for the official code, or as safetensors."""

from pathlib import Path

import dewa
from config import Config
from engine.request import Source
from engine.stored import Stored, clip_of
from ground.errors import UserError
from pretrained import foundation, official


def export(stored: Stored, source: Source, cfg: Config, out: Path | None, form: str) -> Path:
    """Write the file; `out` None: beside the run, under its name. form: "official" or
    "safetensors".
    """
    weights = stored.state.get("weights") or whole_model(stored, source, cfg)
    ending = ".pth" if form == "official" else ".safetensors"
    path = free(out or Path(stored.path).with_suffix(ending))
    official.write(path, weights, form)
    print(f"{path}: {weights.summary()}")
    return path


def require_mask2former(cfg: Config, stored: Stored) -> None:
    """Raise UserError for a run of another network: none of the formats is made for it."""
    if cfg.network != "mask2former":
        raise UserError(
            f"--stage export: {stored.path} is a DeepLabv3+, and no format here is made for it; "
            "its step_*.pt are torch's own"
        )


def free(path: Path) -> Path:
    """The path. Raises: UserError if there is something."""
    if path.exists():
        raise UserError(f"{path}: exists already; name another file with --out")
    return path


def whole_model(stored: Stored, source: Source, cfg: Config) -> official.Weights:
    """The student of a run with its CLIP and the criterion's buffers, which runs do not store."""
    if foundation.is_timm(cfg.backbone):
        raise UserError(
            f"--stage export: a file holds a whole CLIP, and backbone {cfg.backbone} has none; its "
            "runs are used as they are (--weights, --init)"
        )
    taxonomy = dewa.TAXONOMY if stored.is_warm_up else stored.taxonomy(source, cfg)
    clip = foundation.load_clip(cfg, clip_of(stored))[0].state_dict()
    student = stored.state["student"]
    trained = {
        name.replace("backbone.", "visual.", 1): value
        for name, value in student.items()
        if name.startswith("backbone.")
    }
    head = {name: value for name, value in student.items() if name.startswith("head.")}
    kind = "dewa" if stored.config["stage"] in ("dewa", "sup") else "student"
    criterion = official.criterion(kind, len(taxonomy), cfg.no_object_weight)
    return official.Weights(kind, head, {**clip, **trained}, criterion)
