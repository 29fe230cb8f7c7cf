"""Checkpoints of a run: what is in them, which of them stay, and how weights come back by name.

A checkpoint is step_STEP.pt, as `ground.tensor_files` reads and hashes it; the two newest are kept.
Try: `python test_dearli.py --soak 3` kills a run three times, in the middle of a write if it can,
and compares what it ends with.
"""

import hashlib
import io
import os
from pathlib import Path

import torch

from ground.errors import UserError
from ground.files import write_atomic
from ground.tensor_files import MARK, load

KEEP = 2  # checkpoints of a run


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes of a model, by name, without copying it: what is averaged, saved and
    resumed.

    That is its state_dict(): parameters, and buffers such as statistics of batch norm, prototypes,
    queues; without what is frozen and shared, whose names begin as `model.constant` says (a tuple;
    a model without it has nothing of the kind).
    """
    constant = getattr(model, "constant", ())
    return {k: t for k, t in model.state_dict().items() if not k.startswith(constant)}


def save(folder: Path, step: int, state: dict) -> Path:
    """Write folder/step_STEP.pt, then remove all but it and the newest KEEP - 1 before it (one of a
    later step is a damaged one).
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with buffer.getbuffer() as content:
        assert content[-2:] == b"\0\0", "a zip without a comment ends with the comment's length, 0"
        comment = MARK + hashlib.sha256(content[:-2]).hexdigest().encode()
    buffer.seek(-2, os.SEEK_END)
    buffer.write(len(comment).to_bytes(2, "little") + comment)
    path = Path(folder) / f"step_{step:07d}.pt"
    write_atomic(path, buffer.getbuffer())
    kept = [old for old in steps(folder) if old <= path][-KEEP:]
    for old in steps(folder):
        if old not in kept:
            old.unlink()
    return path


def steps(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(Path(folder).glob("step_*.pt"))


def newest(folder: Path) -> dict | None:
    """The newest readable checkpoint of a run folder; None if there is none at all. A damaged one
    is said and passed over.

    Raises: UserError if there are checkpoints and none can be read: to begin anew in silence would
        write over them.
    """
    paths = steps(folder)
    for path in reversed(paths):
        try:
            return load(path)
        except UserError as error:
            print(f"warning: {error}; trying the one before")
    if paths:
        raise UserError(
            f"{folder}: none of its {len(paths)} checkpoints can be read; choose another folder "
            "with --out, or delete them to begin anew"
        )
    return None


def require_free(folder: Path, resume: bool) -> None:
    """Raise UserError if a run is in the folder that is not to go on."""
    if not resume and steps(folder):
        raise UserError(
            f"{folder}: holds a run already; go on with --resume, or choose another folder with "
            f"--out"
        )


@torch.no_grad()
def load_weights(
    into: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    source: str,
    may_differ: tuple[str, ...] = (),
) -> str:
    """Copy weights into parameters by name. Returns a line that says how many were taken, and which
    were not and why.

    may_differ: substrings of names that may be missing or of another shape (a linear class head
    after DeWa).
    Raises: UserError listing what does not fit; then nothing was copied.
    """
    missing = [n for n in into if n not in weights]
    extra = [n for n in weights if n not in into]
    shapes = [n for n in into if n in weights and into[n].shape != weights[n].shape]
    left = [n for n in missing + shapes + extra if any(part in n for part in may_differ)]
    wrong = [n for n in missing + shapes + extra if n not in left]

    def describe(name: str) -> str:
        if name in missing:
            return f"{name} is missing"
        if name in extra:
            return f"{name} is not a parameter of this model"
        return f"{name}: expected {tuple(into[name].shape)}, found {tuple(weights[name].shape)}"

    if wrong:
        listed = "; ".join(map(describe, wrong[:3]))
        raise UserError(
            f"{source}: fits another configuration ({len(wrong)} parameters): {listed}; use the "
            "flags it was trained with (see config.json beside it)"
        )
    for name, param in into.items():
        if name not in left:
            param.copy_(weights[name])
    return (
        f"{source}: {len(into) - len([n for n in left if n in into])} of {len(into)} tensors taken"
        + (f"; not taken: {'; '.join(map(describe, left))}" if left else "")
    )
