"""Files from a cache, or downloaded into it; either way their SHA-256 is checked."""

import hashlib
import os
import re
from pathlib import Path

import torch

from ground.errors import UserError


def fetch(path: Path, address: str, digest: str, otherwise: str) -> Path:
    """A file of a cache, downloaded if it is not there; its SHA-256 must be `digest`.

    Raises: UserError naming file, place and address; then nothing is left behind.
    """
    if path.exists():
        if sha256(path) != digest:
            raise UserError(
                f"{path}: SHA-256 is {sha256(path)}, expected {digest}; delete it, and it is "
                f"downloaded again from {address}"
            )
        return path
    print(f"{path}: downloading {address}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # to a temporary file first
        torch.hub.download_url_to_file(address, str(path), hash_prefix=digest)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{address}: cannot be fetched ({error}); download it elsewhere and put it to {path}, "
            f"{otherwise}"
        ) from None
    return path


def hub_file(repository: str, names: tuple[str, ...], backbone: str) -> Path:
    """One of the files of a Hugging Face repository, from the hub's own cache or by download.

    Its SHA-256 is the one that the hub states.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    for local in (True, False):  # what is there already needs no network
        for name in names:
            try:
                path = Path(hf_hub_download(repository, name, local_files_only=local))
            except Exception as error:  # the hub's client has a dozen types for "not here"
                why = type(error).__name__
                if not local and isinstance(error, LocalEntryNotFoundError):
                    break  # the hub does not answer: another name would wait as long
                continue
            # In the hub's cache a file is a link to a blob that has the name of its SHA-256 (and
            # may be a link into another store itself).
            expected = Path(os.readlink(path)).name if path.is_symlink() else ""
            if re.fullmatch("[0-9a-f]{64}", expected) and sha256(path) != expected:
                raise UserError(
                    f"{path.resolve()}: damaged, its SHA-256 is not {expected}; delete it and try "
                    f"again"
                )
            return path
    raise UserError(
        f"{backbone}: weights cannot be had ({why}); download "
        f"https://huggingface.co/{repository}/resolve/main/{names[-1]} elsewhere and name it with "
        f"--pretrained FILE, or take what needs no network: --backbone mini, or --pretrained "
        f"random with --train-backbone"
    )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
