"""Masks as polygons: outlines that a person can edit, and that fill the same pixels again.

A border is walked along the sides of its pixels, so that its corners are whole numbers and pixel
centres lie well inside or outside. Coordinates count from the corner of the image, x to the right
and y down, as in `readers.annotations.shapes`, which fills them. Polygons have no holes, so each
is joined to its outer border by a cut of no width, there and back, that takes no pixel away.
Axes: H W pixels of a map, h w of a mask, N points.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial.distance import cdist

from readers.annotations import shapes

# Simpler outlines, the simplest first: of which points, and by how many pixels they may be off.
TRIES = (("corners", 1.0), ("halves", 1.0), ("halves", 0.6))
LEAST = 0.975  # IoU of a simpler outline with its mask
TAKEN = 0.02  # share of a segment that all simpler outlines beside it may take together


def outlines(
    segment_map: np.ndarray, areas: np.ndarray, wanted: np.ndarray
) -> list[list[np.ndarray]]:
    """Polygons (N, 2) of every segment, one for each connected part of it; none if not wanted.

    Their IoU is at least 0.95 when all are read back, whichever is painted on top: each has LEAST
    with its own mask, and of a segment the others take at most TAKEN, together.

    Args:
        segment_map: (H, W), 0 = void, k = k-th segment.
        areas: (K,) pixels of the segments, at least 1.    wanted: (K,) bool.
    """
    room = np.concatenate([[np.inf], np.where(wanted, TAKEN * areas, np.inf)])  # pixels, of each
    found = [[] for _ in areas]
    for k, (ys, xs) in enumerate(ndimage.find_objects(segment_map), 1):
        if wanted[k - 1]:
            polygons = _simple(segment_map[ys, xs], k, room)
            found[k - 1] = [points + (xs.start, ys.start) for points in polygons]
    return found


def _simple(crop: np.ndarray, k: int, room: np.ndarray) -> list[np.ndarray]:
    """The simplest polygons that will do; what they take is taken out of `room`."""
    mask = crop == k
    exact = parts(mask)
    for points, tolerance in TRIES:
        borders = exact if points == "corners" else [[*map(_halves, lines)] for lines in exact]
        simple = [[simplified(line, tolerance) for line in lines] for lines in borders]
        simple = [
            [line for line in lines if len(line) > 2] for lines in simple if len(lines[0]) > 2
        ]
        polygons = [*map(_joined, simple)]
        filled = fill(polygons, mask.shape)
        taken, pixels = np.unique(crop[filled & ~mask], return_counts=True)
        alike = (filled & mask).sum() >= LEAST * (filled | mask).sum()
        if alike and (pixels <= room[taken]).all():
            room[taken] -= pixels
            return polygons
    return [*map(_joined, exact)]


def fill(polygons: list[np.ndarray], size: shapes.Size) -> np.ndarray:
    """(h, w) bool: the pixels of polygons as `--stage import` reads them."""
    mask = np.zeros(size, bool)
    for points in polygons:
        shapes.lay(mask, shapes.polygon(points, size), True)
    return mask


# -------------------------------------------------------------------------------------- borders


def parts(mask: np.ndarray) -> list[list[np.ndarray]]:
    """Of every part of a mask (h, w) bool, connected over corners, too: its outer border, and then
    those of its holes, each (N, 2) corners, the last one joined to the first."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    found = []
    for k, (ys, xs) in enumerate(ndimage.find_objects(labels), 1):
        borders = _walked(labels[ys, xs] == k)
        borders.sort(key=_area, reverse=True)  # those of holes turn the other way: below 0
        found.append([line + (xs.start, ys.start) for line in borders])
    return found


def _walked(mask: np.ndarray) -> list[np.ndarray]:
    """All borders of a mask, with its pixels on the right."""
    runs, todo, lines = _runs(mask), {}, []
    todo.update(dict.fromkeys(runs))
    while todo:
        key, line = next(iter(todo)), []
        while key in todo:
            del todo[key]
            line.append(key[:2])
            (x, y), direction = runs[key], key[2]
            # Where two pixels meet at a corner, to the left is the other one.
            left, right = (x, y, (direction - 1) % 4), (x, y, (direction + 1) % 4)
            key = left if left in runs else right
        lines.append(np.array(line))
    return lines


def _runs(mask: np.ndarray) -> dict[tuple[int, int, int], tuple[int, int]]:
    """Straight pieces of the borders: x, y of the start and direction (right, down, left, up) ->
    x, y of the end."""
    inside, runs = np.pad(mask, 1), {}
    here, above, before = inside[1:, 1:], inside[:-1, 1:], inside[1:, :-1]
    sides = here & ~above, (before & ~here).T, above & ~here, (here & ~before).T
    for direction, side in enumerate(sides):
        change = np.diff(side.astype(np.int8), prepend=0, append=0)  # along the direction
        low, high = np.argwhere(change == 1), np.argwhere(change == -1)
        if direction % 2 == 0:  # not transposed: y, x
            low, high = low[:, ::-1], high[:, ::-1]
        start, end = (low, high) if direction < 2 else (high, low)
        for (x, y), corner in zip(start.tolist(), end.tolist()):
            runs[x, y, direction] = tuple(corner)
    return runs


def _area(line: np.ndarray) -> float:
    """Twice the area inside a closed line; below 0 if it turns to the left."""
    x, y = line.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def _joined(borders: list[np.ndarray]) -> np.ndarray:
    """One polygon: the outer border, and cuts to the holes where they are shortest."""
    line, *holes = borders
    for hole in holes:
        distances = cdist(line, hole)
        k, first = np.unravel_index(distances.argmin(), distances.shape)
        hole = np.roll(hole, -first, axis=0)
        line = np.concatenate([line[: k + 1], hole, hole[:1], line[k:]])
    return _distinct(line)  # a hole may touch the border at a corner


# ----------------------------------------------------------------------------------- simpler ones


def _halves(line: np.ndarray) -> np.ndarray:
    """The same border from half side to half side of its pixels: corners lie on both sides of a
    slope, so that a line through some of them would be off to one."""
    following = np.roll(line, -1, axis=0)
    step = 0.5 * np.sign(following - line)
    return _distinct(np.stack([line + step, following - step], 1).reshape(-1, 2))


def _distinct(line: np.ndarray) -> np.ndarray:
    """Without points that are where the one before them is."""
    return line[(line != np.roll(line, 1, axis=0)).any(1)]


def simplified(line: np.ndarray, tolerance: float) -> np.ndarray:
    """Those points of a closed line (N, 2) that leave no other one off by more than a tolerance in
    pixels.

    Source: Douglas and Peucker, Cartographica 10 (1973), from the two points furthest apart, as
    nearly as one look from the first finds them.
    """
    last = len(line)
    ring = np.concatenate([line, line[:1]])
    keep, far = np.zeros(last + 1, bool), int(np.square(line - line[0]).sum(1).argmax())
    spans = [(0, far), (far, last)]
    while spans:
        start, end = spans.pop()
        keep[[start, end]] = True
        if end - start < 2:
            continue
        chord, points = ring[end] - ring[start], ring[start + 1 : end] - ring[start]
        across = np.abs(points[:, 0] * chord[1] - points[:, 1] * chord[0])
        worst = int(across.argmax())
        if across[worst] > tolerance * np.hypot(*chord):
            middle = start + 1 + worst
            spans += [(start, middle), (middle, end)]
    return line[keep[:last]]
