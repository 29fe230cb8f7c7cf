"""Files that hold a run: written whole or not at all, hashed, read without executing anything, and by one writer at a time.

A checkpoint is step_STEP.pt, a plain torch file (a zip) whose comment is the SHA-256 of what precedes it: one file, so that content and
sum cannot part. The two newest are kept. Who writes into a folder holds its file `lock`, which names process and host; the lock itself is
the kernel's, so it ends with the process however that ends, and a process number that is used again means nothing.
Try: `python test_dearli.py --soak 3` kills a run three times, in the middle of a write if it can, and compares what it ends with.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Callable

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors

from config import UserError

try:
    import fcntl
except ImportError:  # not on Windows: no locks there
    fcntl = None

KEEP = 2  # checkpoints of a run
MARK = b"sha256:"  # a zip comment of ours: the mark, then 64 hexadecimal digits
_held: dict[
    tuple[int, Path], object
] = {}  # open lock files by process and folder: to close one of two would release both


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part, whenever the power goes."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); what was there before is intact"
        ) from None
    with contextlib.suppress(
        OSError
    ):  # the new name is on the disk too, where folders can be synchronised
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def require_writable(folder: Path) -> None:
    """Make a folder, and raise UserError if no file can be written there: asked before hours of work, not after them."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}), expected a folder for results; choose another with --out or --runs"
        ) from None


def claim(folder: Path) -> None:
    """Be the one writer of a folder until `release` or the end of the process; remove what a killed writer left half-written.

    Raises: UserError if the folder cannot be written, or another process holds it (on a network disk: of any machine).
    """
    require_writable(folder)
    folder = Path(folder).resolve()
    if fcntl and (os.getpid(), folder) not in _held:
        file = open(folder / "lock", "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{folder}: {file.read().strip() or 'another process'} is writing there; wait for it, or choose another folder with --out"
                ) from None
            print(
                f"warning: {folder}: cannot be locked ({error.strerror}); make sure that no other process writes there"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held[os.getpid(), folder] = file
    for stray in folder.rglob(".*.[0-9]*.tmp"):
        stray.unlink(missing_ok=True)


def release(folder: Path) -> None:
    """Let others write into a folder. The lock file stays, empty: to remove it would let two processes lock two files of one name."""
    file = _held.pop((os.getpid(), Path(folder).resolve()), None)
    if file:
        file.truncate(0)
        file.close()


def save(folder: Path, step: int, state: dict) -> Path:
    """Write folder/step_STEP.pt, then remove all but it and the newest KEEP - 1 before it (one of a later step is a damaged one)."""
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


def load(path: Path) -> dict:
    """Read one checkpoint; UserError if it is damaged. Only tensors and plain values are ever unpickled."""
    path = Path(path)
    try:
        content = path.read_bytes()
        comment, zipped = content[-len(MARK) - 64 :], content.startswith(b"PK")
        bare = (
            zipped and content[-22:-18] == b"PK\5\6" and content.endswith(b"\0\0")
        )  # a zip of others ends so, without a comment
        if (comment.startswith(MARK) or zipped and not bare) and comment != MARK + hashlib.sha256(
            memoryview(content)[: -len(comment) - 2]
        ).hexdigest().encode():
            raise UserError(f"{path}: damaged, it does not end with its own SHA-256")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise UserError(f"{path}: holds a {type(state).__name__}, expected values by name")
        return state
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # torch raises a dozen types for what is one thing to the user
        raise UserError(
            f"{path}: not a checkpoint that can be read safely ({type(error).__name__})"
        ) from None


def newest(folder: Path) -> dict | None:
    """The newest readable checkpoint of a run folder; None if there is none at all. A damaged one is said and passed over.

    Raises: UserError if there are checkpoints and none can be read: to begin anew in silence would write over them.
    """
    found = steps(folder)
    for path in reversed(found):
        try:
            return load(path)
        except UserError as error:
            print(f"warning: {error}; trying the one before")
    if found:
        raise UserError(
            f"{folder}: none of its {len(found)} checkpoints can be read; choose another folder with --out, or delete them to begin anew"
        )
    return None


def cached(folder: Path, key: list, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """make(), or what it returned when it was called with this key before (the text tower of a large CLIP takes minutes on a CPU).

    key: JSON values, everything that the tensor depends on. A file that is damaged is made anew.
    """
    path = Path(folder) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            return read_tensors(path)[0]["tensor"]
        except (UserError, KeyError):
            print(f"warning: {path}: damaged; made again")
    tensor = make()
    write_atomic(path, hashed_tensors({"tensor": tensor.cpu()}))
    return tensor


def hashed_tensors(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> bytes:
    """A .safetensors file with the SHA-256 of its tensors in the header: a flipped bit in a weight goes unnoticed otherwise."""
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    return save_tensors(
        tensors,
        {
            "format": "pt",
            **(metadata or {}),
            "sha256": hashlib.sha256(_body(save_tensors(tensors))).hexdigest(),
        },
    )


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file. Raises: UserError if it is missing, damaged, or not what its header says (`hashed_tensors`)."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if (
            metadata.get("sha256", "")
            and hashlib.sha256(_body(Path(path).read_bytes())).hexdigest() != metadata["sha256"]
        ):
            raise UserError(
                f"{path}: damaged, the SHA-256 of its tensors differs from the one in its header"
            )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # as with torch: of several types, and of one meaning
        raise UserError(
            f"{path}: damaged, not a safetensors file ({' '.join(str(error).split())})"
        ) from None
    return tensors, metadata


def _body(content: bytes) -> memoryview:
    """What follows the header of a .safetensors file, whose length is in the first 8 bytes."""
    return memoryview(content)[8 + int.from_bytes(content[:8], "little") :]


def read_weights(path: Path, hint: str) -> dict:
    """What a .safetensors or a plain torch file holds. Raises: UserError if it is missing (hint says how to get it) or damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; {hint}")
    try:
        return read_tensors(path)[0] if path.suffix == ".safetensors" else load(path)
    except UserError as error:
        raise UserError(f"{error}; {hint}") from None


def load_foundation(module: torch.nn.Module, path: Path, hint: str) -> torch.nn.Module:
    """Fill a foundation model (CLIP, SAM) from a .safetensors or a plain torch file, in fp32; in eval mode afterwards.

    Raises: UserError if the file is missing (hint says how to get it), damaged, or of another model; never executes pickled code.
    """
    weights = read_weights(path, hint)
    try:
        module.load_state_dict({name: value.float() for name, value in weights.items()})
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path}: weights of another model than {type(module).__name__} ({' '.join(str(error).split())[:160]} ...); "
            f"{hint}"
        ) from None
    return module.eval()


@torch.no_grad()
def load_weights(
    into: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    source: str,
    may_differ: tuple[str, ...] = (),
) -> str:
    """Copy weights into parameters by name. Returns a line that says how many were taken, and which were not and why.

    may_differ: substrings of names that may be missing or of another shape (a linear class head after DeWa).
    Raises: UserError listing what does not fit; then nothing was copied.
    """
    missing = [n for n in into if n not in weights]
    extra = [n for n in weights if n not in into]
    shapes = [n for n in into if n in weights and into[n].shape != weights[n].shape]
    left = [n for n in missing + shapes + extra if any(part in n for part in may_differ)]
    wrong = [n for n in missing + shapes + extra if n not in left]

    def describe(n):
        return (
            f"{n} is missing"
            if n in missing
            else f"{n} is not a parameter of this model"
            if n in extra
            else f"{n}: expected {tuple(into[n].shape)}, found {tuple(weights[n].shape)}"
        )

    if wrong:
        raise UserError(
            f"{source}: fits another configuration ({len(wrong)} parameters): {'; '.join(describe(n) for n in wrong[:3])}; "
            f"use the flags it was trained with (see config.json beside it)"
        )
    for name, param in into.items():
        if name not in left:
            param.copy_(weights[name])
    return (
        f"{source}: {len(into) - len([n for n in left if n in into])} of {len(into)} tensors taken"
        + (f"; not taken: {'; '.join(map(describe, left))}" if left else "")
    )
