"""Files of tensors: hashed, and read without executing anything.

A checkpoint is a plain torch file (a zip) whose comment is the SHA-256 of what precedes it: one
file, so that content and sum cannot part; a .safetensors file has the SHA-256 of its tensors in its
header.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Callable

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors

from ground.errors import UserError
from ground.files import write_atomic

MARK = b"sha256:"  # a zip comment of ours: the mark, then 64 hexadecimal digits


def load(path: Path) -> dict:
    """Read one checkpoint; UserError if it is damaged. Only tensors and plain values are ever
    unpickled.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        comment, zipped = content[-len(MARK) - 64 :], content.startswith(b"PK")
        # a zip of others ends so, without a comment
        bare = zipped and content[-22:-18] == b"PK\5\6" and content.endswith(b"\0\0")
        if comment.startswith(MARK) or zipped and not bare:
            digest = hashlib.sha256(memoryview(content)[: -len(comment) - 2]).hexdigest()
            if comment != MARK + digest.encode():
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


def cached(folder: Path, key: list, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """make(), or what it returned when it was called with this key before (the text tower of a
    large CLIP takes minutes on a CPU).

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
    """A .safetensors file with the SHA-256 of its tensors in the header: a flipped bit in a weight
    goes unnoticed otherwise.
    """
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
    """Tensors and metadata of a .safetensors file. Raises: UserError if it is missing, damaged, or
    not what its header says (`hashed_tensors`).
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        stated = metadata.get("sha256", "")
        if stated and hashlib.sha256(_body(Path(path).read_bytes())).hexdigest() != stated:
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
    """What a .safetensors or a plain torch file holds. Raises: UserError if it is missing (hint
    says how to get it) or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; {hint}")
    try:
        return read_tensors(path)[0] if path.suffix == ".safetensors" else load(path)
    except UserError as error:
        raise UserError(f"{error}; {hint}") from None


def load_foundation(module: torch.nn.Module, path: Path, hint: str) -> torch.nn.Module:
    """Fill a foundation model (CLIP, SAM) from a .safetensors or a plain torch file, in fp32; in
    eval mode afterwards.

    Raises: UserError if the file is missing (hint says how to get it), damaged, or of another
        model; never executes pickled code.
    """
    weights = read_weights(path, hint)
    try:
        module.load_state_dict({name: value.float() for name, value in weights.items()})
    except (RuntimeError, AttributeError) as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: weights of another model than {type(module).__name__} ({words} ...); {hint}"
        ) from None
    return module.eval()
