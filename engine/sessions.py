"""sessions.json: when a run was trained, on what machine, and on how many images; for its page.

A run that goes on with --resume adds a session, of another machine maybe. Nothing of it makes a run
what it is: it is never compared. Runs of older versions have none.
"""

import json
import os
import platform
import re
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from ground import ranks
from ground.files import write_atomic

ROOT = Path(__file__).parent.parent
FILE = "sessions.json"


class Session:
    """The session that a run begins at a step, written as far as it has come.

    counts: images by kind, as {"labelled": 16}.   Raises: UserError if the file cannot be written.
    """

    def __init__(self, folder: Path, step: int, device: torch.device, counts: dict[str, int]):
        self.path = Path(folder) / FILE
        earlier = [row for row in read(folder) if row.get("from", 0) < step]
        self.rows = [*earlier, {"from": step, "begun": _now(), **surroundings(device), **counts}]
        self.reached(step)

    def reached(self, step: int) -> None:
        self.rows[-1] |= {"to": step, "last": _now()}
        write_atomic(self.path, json.dumps(self.rows, indent=1).encode())


def read(folder: Path) -> list[dict]:
    """The sessions of a run, the first one first; empty for a run that says nothing of them."""
    try:
        rows = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []  # it is about the run, and nothing depends on it
    rows = rows if isinstance(rows, list) else []
    return [row for row in rows if isinstance(row, dict)]


def surroundings(device: torch.device) -> dict:
    """Versions and machine of this process."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu(),
        "threads": torch.get_num_threads(),
        "processes": ranks.count(),
    }


def commit(root: Path = ROOT) -> str:
    """Of this program, where its folder is a git repository of its own; `-dirty` if files differ
    from it. Empty: nobody knows."""
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as Linux names it, or as Python does, and its cores that this process has."""
    try:
        name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
    except (OSError, UnicodeDecodeError):
        name = None
    name = name[1].strip() if name else platform.processor() or platform.machine()
    own = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(own(0)) if own else os.cpu_count()
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
