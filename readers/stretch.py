"""Contrast stretching: what is dark and what is bright in an image become black and white.

For images whose exposures differ from one to the next, as those of microscopes do: a network that
has seen few of them takes noise for objects where all is dark. Each image is stretched by its own
values, and as a whole, so its windows stay alike.
Source: the percentiles are those by which StarDist (arXiv:1806.03535) normalises images.
"""

import numpy as np

PIECE = 2**22  # values that are counted at once: numpy makes 8 bytes of each
DARK, BRIGHT = 0.01, 0.998  # shares of the values: what is below the first becomes 0


def counts(values: np.ndarray) -> np.ndarray:
    """(256,) or (65536,) int64, how often each value occurs. values: uint8 or uint16, any shape."""
    flat, levels = values.ravel(), np.iinfo(values.dtype).max + 1
    pieces = range(0, len(flat), PIECE)
    return sum(np.bincount(flat[k : k + PIECE], minlength=levels) for k in pieces)


def limits(counts: np.ndarray) -> tuple[int, int]:
    """The values that become 0 and 255: the shares DARK and BRIGHT of all reach them. Where both
    are one value, as on an empty ground, the least and the largest."""
    low, high = np.searchsorted(counts.cumsum(), counts.sum() * np.array([DARK, BRIGHT])).tolist()
    if low == high:
        low, high = np.flatnonzero(counts)[[0, -1]].tolist()
    return low, high


def ramp(counts: np.ndarray) -> np.ndarray:
    """What becomes of each value, uint8 of the shape of `counts`: 0 to 255 between the limits.

    What was stretched stays as it is, stretched once more.
    """
    low, high = limits(counts)
    values = (np.arange(len(counts)) - low) * (255 / max(high - low, 1))
    return values.clip(0, 255).round().astype(np.uint8)


def beyond(counts: np.ndarray) -> float:
    """The share of the values that lie farther outside of the limits than these are apart: objects
    of less than the shares, on an even ground."""
    low, high = limits(counts)
    values = np.arange(len(counts))
    outside = (values < 2 * low - high) | (values > 2 * high - low)
    return float(counts[outside].sum() / max(counts.sum(), 1))
