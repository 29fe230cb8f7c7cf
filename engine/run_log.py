"""log.jsonl, a line a step, and what a run shows of itself while it goes."""

import contextlib
import json
import math
import sys
from pathlib import Path

import torch

from ground.errors import UserError


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


def summary(row: dict, device: torch.device) -> str:
    """The loss of a step, the sums of its labelled and its unlabelled terms, and the memory so far,
    for the progress bar.
    """
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
    """The most memory that this process has used up to here: on a GPU what tensors took, else all
    of it.
    """
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


def images_of(batch) -> list[str]:
    """Names of the files in a batch, or in a tuple of batches of which some are None."""
    return [
        name
        for b in (batch if isinstance(batch, tuple) else (batch,))
        if b is not None
        for name in b.names
    ]
