"""Masks as run lengths, as COCO has them: down the columns, zeros first. pycocotools writes and
reads them.

Its decoder trusts what it is given: a text that ends in the middle of a number is read beyond its
end, and of a mask that the runs do not fill the rest is memory that nobody wrote. So every run
length is looked at before it gets them. Axes: H W pixels.
"""

import numpy as np
from pycocotools import mask as coco

from readers.pictures import brief

# Groups of 5 bits a run length after the first: more than any image has pixels, far less than 64
# bits hold.
MAX_DIGITS = 7


def to_runs(mask: np.ndarray) -> dict:
    """(H, W) bool -> {"size": [H, W], "counts": text}, as it is written to JSON."""
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def from_runs(rle, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool, of run lengths from a JSON: a list, or compressed to a text.

    size: (H, W) of the image.   Raises: ValueError if it is none, of another size, or does not fill
    it.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
        raise ValueError("expected an object with size and counts")
    stated, counts = rle["size"], rle["counts"]
    if not isinstance(stated, list) or list(stated) != list(size):
        raise ValueError(f"size {brief(stated)}")
    whole, (height, width) = {"size": list(size), "counts": counts}, size
    if isinstance(counts, str):
        lengths = _lengths(counts)
        whole["counts"] = counts.encode("ascii")
    elif isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts):
        lengths = counts
    else:
        raise ValueError(f"counts {brief(counts)}, neither text nor a list of whole numbers")
    if sum(lengths) != height * width:
        raise ValueError(f"{sum(lengths)} pixels of {height * width}, so they do not fill it")
    if isinstance(counts, list):
        whole = coco.frPyObjects(whole, height, width)
    return coco.decode(whole).view(bool)


def _lengths(text: str) -> list[int]:
    """The run lengths of a text. Each is stored as its difference from the last but one, in groups
    of 5 bits, lowest first, with a bit that says whether more follow, shifted into printable
    characters.
    """
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("the text ends in the middle of a number, or is none")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.append(0, ends[:-1] + 1)
    digits = ends - starts + 1
    if digits.max() > MAX_DIGITS:
        raise ValueError("it holds a number that no image needs")
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    lengths = np.add.reduceat((codes & 31) << (5 * place), starts)
    lengths -= np.where(codes[ends] & 16, 1 << (5 * digits), 0)
    for first in (1, 2):  # run 0 stands alone
        lengths[first::2] = np.cumsum(lengths[first::2])
    if (lengths < 0).any():
        raise ValueError("a run is shorter than nothing")
    return lengths.tolist()
