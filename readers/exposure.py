"""How bright a set of images is seen: the grey value of 16 bits that becomes 255, or stretched."""

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image

from ground.errors import UserError
from readers.pictures import endings, opened, values_of
from readers.sixteen_bit import DEEP_FORMATS, WHITE, sixteen_bits
from readers.stretch import beyond, counts

MEASURED = 1000  # files, at most, from which a white point is measured
# Grey levels of 256: an image whose values differ by less uses less than 1/16 of its range.
LITTLE = 16
# Shares of the values of an image from which it is said: above the white point; or, where it is
# stretched, far darker or brighter than nearly all of it.
CUT_OFF, STRAY = 0.01, 0.001


def white_point(images) -> int:
    """The white point of a set of images: the least of 2^k - 1, k = 8 ... 16, that no 16-bit image
    exceeds; WHITE if there is none.

    A camera of 12 bits stores 0 to 4095 in 16. Only files that can have 16 bits are opened (by
    their endings, so no JPEG), MEASURED of them at most, evenly spread, and only 16-bit ones are
    decoded. What cannot be read is passed over, and what of its bits cannot be known counts as 16.
    """
    if not hasattr(images, "path"):  # made, not read
        return WHITE
    deep = tuple(endings(DEEP_FORMATS))
    able = [i for i in range(len(images)) if images.name(i).lower().endswith(deep)]
    count, largest = min(len(able), MEASURED), -1
    for k in range(count):
        with contextlib.suppress(UserError):
            largest = max(largest, _largest(images.path(able[k * len(able) // count])))
        if largest > WHITE // 2:  # no need to look any further
            break
    return WHITE if largest < 0 else max(255, (1 << largest.bit_length()) - 1)


def _largest(path: Path) -> int:
    """The largest value of a 16-bit image; -1 of one of 8 bits."""
    with opened(path) as image:
        try:
            values = sixteen_bits(image)
        except ValueError:
            return WHITE
        return -1 if values is None else int(values.max())


def above_white(path: Path, white: int) -> float:
    """The share of the values of a 16-bit image that are above the white point, and are cut off; 0
    of one of 8 bits."""
    if white == WHITE:
        return 0.0
    with opened(path) as image:
        values = sixteen_bits(image)
        return 0.0 if values is None else float((values > white).mean())


def see(white: int, stretch: bool, *sets) -> None:
    """Settle the white point of sets of images: the number given, or (0) the one of the first set,
    which are those of training. Images that are stretched have none."""
    white = WHITE if stretch else white or white_point(sets[0])
    for images in sets:
        images.white, images.stretch = white, stretch


def doubts(path: Path, image: Image.Image, white: int, stretch: bool) -> dict[str, str]:
    """What may be wrong with how an image is seen: "little" and its range, "cut off" and the share
    of its values. image: as it is seen; a stretched one always uses all of its range, so what is
    stored is asked, of 16 bits by as many of them as it uses."""
    if not stretch:
        share = above_white(path, white)
        return little(image) | ({"cut off": f"{100 * share:.0f}%"} if share > CUT_OFF else {})
    with opened(path) as stored:
        how_often = counts(values_of(stored))
    low, high = np.flatnonzero(how_often)[[0, -1]].tolist()
    levels = max(256, 1 << high.bit_length())
    found = {"little": f"{low} to {high}"} if high - low < LITTLE * levels / 256 else {}
    share = beyond(how_often)
    return found | ({"cut off": f"{100 * share:.1f}%"} if share > STRAY else {})


def little(image: Image.Image) -> dict[str, str]:
    """The first of them, of an RGB image whose values lie within LITTLE grey levels: black, white,
    or a scan with few of its bits."""
    lows, highs = zip(*image.getextrema())
    low, high = min(lows), max(highs)
    return {"little": f"{low} to {high}"} if high - low < LITTLE else {}


def meaning(white: int, stretch: bool) -> dict[str, str]:
    """What `doubts` mean, to be said after a number of images."""
    by = f"0 to 255; 16-bit ones become that by --white, here {white}; 4095 is that of 12 bits"
    cut_off = f"of 16 bits that lose what is brighter than --white {white}"
    if stretch:
        by = "stretched, their noise is seen; not so with --no-stretch"
        cut_off = (
            "with something far darker or brighter than nearly all of their pixels, as which "
            "--stretch makes it black or white; --no-stretch does not"
        )
    little = f"that use less than 1/16 of their range and show next to nothing ({by})"
    return {"little": little, "cut off": cut_off}
