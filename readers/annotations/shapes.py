"""Pixels of instances as patches of an image; and points to patches, for labelme and COCO.

Polygons are filled by pycocotools: a pixel belongs to a shape if its centre does, as nearly as
COCO's own tools say. Coordinates count from the corner of the image, so that a square from 2 to 5
has three pixels a side. Axes: H W pixels of an image, h w of a patch of it, N points.
"""

import math
from typing import Callable

import numpy as np
from pycocotools import mask as coco

from ground.errors import UserError
from readers.pictures import brief

Size = tuple[int, int]  # height, width
Patch = tuple[int, int, np.ndarray]  # top, left, (h, w) bool: pixels of an instance, in the image
Draw = Callable[[], Patch]  # made anew at every call, so that one mask at a time is in memory


def nothing() -> Patch:
    return 0, 0, np.zeros((0, 0), bool)


def lay(canvas: np.ndarray, patch: Patch, value: int) -> None:
    """Write a value into (H, W), where a patch is."""
    top, left, mask = patch
    canvas[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = value


def require_size(stated: tuple, size: Size, claim: str, mend: str) -> None:
    """Raise UserError if an annotation states another (height, width) than that of its image."""
    if stated not in ((None, None), size):
        raise UserError(f"{claim}, but it is {size} (height, width, turned as EXIF says); {mend}")


def read_points(
    value, size: Size, where: str, flat: bool = False, number: int | None = None
) -> np.ndarray:
    """(N, 2) x, y in pixels, from pairs or, if flat, from x, y, x, y, ...; they may lie outside of
    the image, but not by more than its size. Raises: UserError if they are none, or not N."""
    middle = np.array(size[::-1]) / 2
    try:
        points = np.array(value, np.float64)
        points = points.reshape(-1, 2) if flat else points
        near = np.abs(points - middle) <= 3 * middle  # not so is NaN
        sound = points.shape[1:] == (2,) and number in (None, len(points)) and near.all()
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise UserError(
            f"{where}: points {brief(value)}, expected pairs of numbers, x and y in pixels of an "
            f"image of {size[1]} x {size[0]}"
        )
    return points


def box(points: np.ndarray, size: Size) -> tuple[int, int, int, int]:
    """top, left, height, width of the pixels of an image that the box around points touches."""
    if not len(points):
        return 0, 0, 0, 0
    left, top = (max(0, math.floor(v)) for v in points.min(0))
    right, bottom = (min(end, math.ceil(v)) for v, end in zip(points.max(0), size[::-1]))
    return top, left, max(0, bottom - top), max(0, right - left)


def filled(points: np.ndarray, size: Size) -> Patch:
    """All pixels of the box."""
    top, left, *extent = box(points, size)
    return top, left, np.ones(extent, bool)


def polygon(points: np.ndarray, size: Size) -> Patch:
    """Filled by pycocotools, in its box alone: bit for bit what it fills in the whole image."""
    top, left, *extent = box(points, size)
    if len(points) < 3 or 0 in extent:
        return nothing()
    shift = np.array([left, top])
    # It rounds to fifths of a pixel. Done before the shift, so that the shift moves no vertex to
    # another fifth.
    moved = np.where(shift > 0, np.trunc(5 * points + 0.5) / 5 - shift, points)
    (runs,) = coco.frPyObjects([moved.ravel().tolist()], *extent)
    return top, left, coco.decode(runs).view(bool)


def join(draws: list[Draw], size: Size) -> Patch:
    """The union of several patches."""
    patches = [patch for patch in (draw() for draw in draws) if patch[2].size]
    if len(patches) < 2:
        return patches[0] if patches else nothing()
    union = np.zeros(size, bool)
    for patch in patches:
        lay(union, patch, True)
    return 0, 0, union
