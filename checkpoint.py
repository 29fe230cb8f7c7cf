"""Files that hold a run: written whole or not at all, hashed, and read without executing anything.

A checkpoint is NAME_STEP.pt, a plain torch file, beside NAME_STEP.pt.sha256. The two newest are kept.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Callable

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors

from config import UserError

KEEP = 2                               # checkpoints of a run


def write_atomic(path: Path, content: bytes) -> None:
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
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); what was there before is intact") from None


def save(folder: Path, step: int, state: dict) -> Path:
    """Write folder/step_STEP.pt and its hash, then remove all but the newest KEEP."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = Path(folder) / f"step_{step:07d}.pt"
    write_atomic(path.with_name(path.name + ".sha256"), hashlib.sha256(content).hexdigest().encode())
    write_atomic(path, content)
    for old in steps(folder)[:-KEEP]:
        old.unlink()
        old.with_name(old.name + ".sha256").unlink(missing_ok=True)
    return path


def steps(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(Path(folder).glob("step_*.pt"))


def load(path: Path) -> dict:
    """Read one checkpoint; UserError if it is damaged. Only tensors and plain values are ever unpickled."""
    path = Path(path)
    try:
        content = path.read_bytes()
        digest = path.with_name(path.name + ".sha256")
        if digest.exists() and digest.read_text().strip() != hashlib.sha256(content).hexdigest():
            raise UserError(f"{path}: damaged, its SHA-256 differs from the one in {digest.name}")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise UserError(f"{path}: holds a {type(state).__name__}, expected values by name")
        return state
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:         # torch raises a dozen types for what is one thing to the user
        raise UserError(f"{path}: not a checkpoint that can be read safely ({type(error).__name__})") from None


def newest(folder: Path) -> dict | None:
    """The newest readable checkpoint of a run folder; None if there is none. A damaged one is said and passed over."""
    for path in reversed(steps(folder)):
        try:
            return load(path)
        except UserError as error:
            print(f"warning: {error}; trying the one before")
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


def hashed_tensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A .safetensors file with the SHA-256 of its tensors in the header: a flipped bit in a weight goes unnoticed otherwise."""
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    return save_tensors(tensors, {"format": "pt", **(metadata or {}), "sha256": hashlib.sha256(_body(save_tensors(tensors))).hexdigest()})


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file. Raises: UserError if it is missing, damaged, or not what its header says (`hashed_tensors`)."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("sha256", "") and hashlib.sha256(_body(Path(path).read_bytes())).hexdigest() != metadata["sha256"]:
            raise UserError(f"{path}: damaged, the SHA-256 of its tensors differs from the one in its header")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:         # as with torch: of several types, and of one meaning
        raise UserError(f"{path}: damaged, not a safetensors file ({' '.join(str(error).split())})") from None
    return tensors, metadata


def _body(content: bytes) -> memoryview:
    """What follows the header of a .safetensors file, whose length is in the first 8 bytes."""
    return memoryview(content)[8 + int.from_bytes(content[:8], "little"):]


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
        raise UserError(f"{path}: weights of another model than {type(module).__name__} ({' '.join(str(error).split())[:160]} ...); "
                        f"{hint}") from None
    return module.eval()


@torch.no_grad()
def load_weights(into: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], source: str, may_differ: tuple[str, ...] = ()) -> str:
    """Copy weights into parameters by name. Returns a line that says how many were taken and which were not.

    may_differ: substrings of names that may be missing or of another shape (a linear class head after DeWa).
    Raises: UserError listing what does not fit; then nothing was copied.
    """
    missing = [n for n in into if n not in weights]
    extra = [n for n in weights if n not in into]
    shapes = [n for n in into if n in weights and into[n].shape != weights[n].shape]
    left = [n for n in missing + shapes + extra if any(part in n for part in may_differ)]
    wrong = [n for n in missing + shapes + extra if n not in left]
    if wrong:
        def describe(n):
            return (f"{n} is missing" if n in missing else f"{n} is not a parameter of this model" if n in extra else
                    f"{n}: expected {tuple(into[n].shape)}, found {tuple(weights[n].shape)}")
        raise UserError(f"{source}: fits another configuration ({len(wrong)} parameters): {'; '.join(describe(n) for n in wrong[:3])}; "
                        f"use the flags it was trained with (see config.json beside it)")
    for name, param in into.items():
        if name not in left:
            param.copy_(weights[name])
    return f"{source}: {len(into) - len([n for n in left if n in into])} of {len(into)} tensors taken" + (
        f"; not taken: {', '.join(left)}" if left else "")
