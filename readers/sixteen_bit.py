"""Images of 16 bits a channel: their stored values, and how they become 8 bits.

Pillow keeps 16 bits of grey, but of colour only the upper 8; here they are read in full.
"""

import contextlib
import functools
import sys

import numpy as np
from PIL import Image

DEEP_FORMATS = ("PNG", "TIFF", "PPM", "JPEG2000")  # those that can have 16 bits a channel
DEEP_MODES = ("RGB", "RGBA", "LA")  # of Pillow, that may be the upper 8 of 16 bits
WHITE = 65535  # of 16 bits; becomes 255 where no other white point is known
# How Pillow calls pixels of 16 bits a channel, and those with the bytes in the other order (N: the
# machine's own).
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
EXCHANGED = {"LA;16B": "RGBA"} | {
    f"{kind};16{order}": f"{kind};16{other}"
    for kind in ("RGB", "RGBA")
    for order, other in OTHER_ORDER.items()
}


@functools.lru_cache(maxsize=4)
def scaled(white: int) -> np.ndarray:
    """(65536,) uint8, what becomes of 16 bits. With the white point 2^k - 1 it is a shift: no value
    is rounded up.
    """
    return (np.arange(WHITE + 1) * 256 // (white + 1)).clip(0, 255).astype(np.uint8)


def sixteen_bits(image: Image.Image) -> np.ndarray | None:
    """The stored values of an image of 16 bits a channel, (H, W) or (H, W, 3) uint16, without
    alpha; None if it has 8.

    Of colour, Pillow keeps the upper 8 bits of 16 alone; here its file is decoded a second time,
    with the two bytes of each value exchanged.
    Raises: ValueError if it has 32 bits a channel or a sign, or its lower bits cannot be had.
    """
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError(
            "values with a sign, or of 32 bits a channel, whose range only you know; expected 8 or "
            "16 bits"
        )
    if image.mode.startswith("I"):
        return np.asarray(image).clip(0, WHITE).astype(np.uint16)
    tiles, path = getattr(image, "tile", ()), getattr(image, "filename", "")
    if not tiles and path and image.format in DEEP_FORMATS and image.mode in DEEP_MODES:
        # Once read, an image no longer knows how it was stored; nobody does where its file is gone.
        with contextlib.suppress(OSError, EOFError), _file_of(image) as again:
            tiles = again.tile
    stored = {t[3] if isinstance(t[3], str) else str(t[3][0]) for t in tiles if t[3]}
    bits = image.tag_v2.get(258, ()) if image.format == "TIFF" else ()
    if not any(";16" in kind for kind in stored) and 16 not in bits:
        return None
    (order,) = stored if len(stored) == 1 else ("",)
    if order not in EXCHANGED or not path:
        raise ValueError(
            f"16 bits a channel, stored as {order or 'planes'}, of which only the upper 8 can be "
            f"had; expected RGB or grey, by the path of its file"
        )
    with _file_of(image) as low:
        low.tile = [_stored_as(EXCHANGED[order], tile) for tile in low.tile]
        low, high = np.asarray(low), np.asarray(image)
    if low.shape != high.shape:
        raise ValueError("16 bits a channel, and no longer as large as in its file")
    # Taken for four bytes a pixel: the upper and the lower one of grey, then those of alpha.
    if order == "LA;16B":
        return low[..., 0].astype(np.uint16) << 8 | low[..., 1]
    return high[..., :3].astype(np.uint16) << 8 | low[..., :3]


def _file_of(image: Image.Image) -> Image.Image:
    """The same image of the same file, not yet read."""
    again = Image.open(image.filename, formats=(image.format,))
    again.seek(image.tell())
    return again


def _stored_as(order: str, tile: tuple) -> tuple:
    """A tile of an image file (codec, part, place, how pixels are stored) with another order of the
    bytes of its pixels.
    """
    stored = order if isinstance(tile[3], str) else (order, *tile[3][1:])
    if hasattr(tile, "_replace"):
        return tile._replace(args=stored)
    return (*tile[:3], stored)  # a plain tuple up to Pillow 10
