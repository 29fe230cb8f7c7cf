"""What a stored thing was made of: digests of images, weights and settings, and how two of them
differ.

Masks, warm-ups, caches and runs are found again by a name. They are used again only if they were
made of the same: compared here, by content and never by path, so that the same data under another
path is the same and other data under the same path is not.
"""

import hashlib
from pathlib import Path
from typing import Callable, Sequence

import torch

SAMPLED = 64  # files, at most, whose contents a fingerprint reads
SHOWN = 5  # names that a message lists


def of_bytes(*parts: bytes) -> str:
    """SHA-256 of the parts, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def of_file(path) -> str:
    """SHA-256 of a file, read by parts."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def of_text(*parts: str) -> str:
    """The same of texts, one a line. A file name that is no Unicode is one, too."""
    return of_bytes(*(f"{part}\n".encode("utf-8", "surrogateescape") for part in parts))


def of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of weights: their names, shapes and values; their order and their device do not
    matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def of_files(names: Sequence[str], size: Callable[[int], int], digest: Callable[[int], str]) -> str:
    """Fingerprint of many files, without reading them all: every name and size, and the contents
    of SAMPLED of them, evenly spread by name.

    size(i): bytes of file i.   digest(i): SHA-256 of its content.
    """
    order = sorted(range(len(names)), key=lambda i: names[i])
    return of_text(*(f"{names[i]} {size(i)}" for i in order), *(digest(i) for i in sample(order)))


def sample(indices: Sequence[int]) -> list[int]:
    """At most SAMPLED of them, evenly spread."""
    count = min(SAMPLED, len(indices))
    return [indices[k * len(indices) // count] for k in range(count)]


def bytes_of(path: Path) -> int:
    """Size of a file; -1 if it is not there."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def differences(there: dict, now: dict) -> str:
    """What two settings disagree in, e.g. `points_per_side: 4 there, 8 now`; empty if nothing."""
    return ", ".join(
        f"{key}: {there.get(key, 'nothing')!s:.12} there, {now.get(key, 'nothing')!s:.12} now"
        for key in dict.fromkeys([*now, *there])
        if there.get(key) != now.get(key)
    )


def listed(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join([*names[:SHOWN], *["..."] * (len(names) > SHOWN)])
