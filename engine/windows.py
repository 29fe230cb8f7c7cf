"""Small objects and large images: an image seen in windows that overlap, and what they say of it,
stitched.

Mask2Former sees one view of one size and has so many queries: objects that are small in their
image, or many, are found in windows of it. Every object smaller than the overlap is whole in one of
them. What the windows say is joined so:

- with --merging masks, a mask that surer ones of its window cover by more than half is another
  view of what they show (`inference.lay_down`);
- an instance that an inner border of its window cuts yields to the window that shows it whole,
  whatever that one says of it;
- larger ones, which no window shows whole, are joined where two windows agree about the pixels that
  both show (IoU of at least AGREE);
- of what is left the surer one takes its pixels first, whole ones before parts (of instances,
  which may have any score, those of at least --least-score before all others); one that then keeps
  less than half of its pixels is another view of what is there already;
- the rest of the image is stuff: the class with the largest sum of posteriors over all windows.

Windows come row by row, and what no further one shows is written at once: beside the result only
two rows of windows are in memory, whatever the size of the image.
Differs from the paper: it knows whole images only.
Axes: H W pixels of the image, h w of a window in it, K classes, N segments.
Try: `python dearli.py --stage eval --weights runs/mini-sup-16 --window 64 --out runs/try-window`.
"""

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Protocol

import numpy as np
import torch
from scipy import ndimage

from config import Config
from data import Sample, magnified, output_size, resize_part
from engine.method import Method
from inference import KEPT, PSEUDO, Prediction

AGREE = 0.5  # least IoU of two parts of one object, in the pixels that both windows show
SAME = 0.9  # least IoU of a piece and of what its window shows of the whole object
CHUNK = 2**24  # pixels of an image that are looked at at once
FAINT = 0.01  # of the largest sum in a window: a class that is nowhere above it is not there


class Picture(Protocol):
    """An image that is read by parts: a PIL image, or `readers.large.LargeImage`."""

    size: tuple[int, int]  # (W, H)

    def crop(self, box: tuple[int, int, int, int]): ...


def shown_size(w: int, h: int, cfg: Config) -> tuple[int, int]:
    """(w, h) at which an image is shown at evaluation."""
    if cfg.magnification:
        return magnified(w, h, cfg.magnification)
    return output_size(w, h, cfg.test_size, cfg.test_max)


def in_windows(size: tuple[int, int], cfg: Config) -> bool:
    """Whether an image of size (W, H) is seen in windows: it is larger than one."""
    return 0 < cfg.window < max(shown_size(*size, cfg))


@dataclass(frozen=True)
class Grid:
    """Windows of an image. tops, lefts: of rows and columns of windows, pixels of the image;
    height, width: of a window in the image;  shown: (h, w) of a window as it is shown."""

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    height: int
    width: int
    shown: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], cfg: Config) -> "Grid":
        """size: (W, H) of the image."""
        starts, sides, shown = [], [], []
        for length, large in zip(size[::-1], shown_size(*size, cfg)[::-1]):
            side = min(length, max(1, round(cfg.window * length / large)))
            count = 1 if side == length else 1 + -(-(length - side) // max(1, side // 2))
            starts.append(tuple(np.linspace(0, length - side, count).round().astype(int).tolist()))
            sides.append(side)
            shown.append(min(cfg.window, large))
        return cls(*starts, *sides, tuple(shown))

    def border(self, y: int, x: int, size: tuple[int, int]) -> tuple[bool, bool, bool, bool]:
        """Which borders of the window at (y, x) are inner ones: top, bottom, left, right."""
        width, height = size
        return y > 0, y + self.height < height, x > 0, x + self.width < width

    def shows_whole(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> bool:
        """Whether a window shows all of a box (top, left, bottom, right) and no inner border of it
        touches the box."""
        top, left, bottom, right = box
        width, height = size
        rows = _inside(self.tops, self.height, top, bottom, height)
        return rows and _inside(self.lefts, self.width, left, right, width)


def _inside(starts: tuple[int, ...], side: int, first: int, end: int, length: int) -> bool:
    return any(
        (start < first or start == 0) and (end < start + side or start + side == length)
        for start in starts
    )


@dataclass
class Instance:
    """A thing that a window shows. box: (top, left, bottom, right) in the image;  mask: in the box;
    window: (top, left, bottom, right) of what shows it;  part: no window shows it whole."""

    label: int
    score: float
    box: tuple[int, int, int, int]
    mask: np.ndarray
    window: tuple[int, int, int, int]
    part: bool
    area: int


class Stitcher:
    """What all windows of one image say, by one reading.

    segment_map, semantic: (H, W) arrays that are filled, in memory or in files; zeros at first.
    least: score of an instance.   sure: score below which one gives way to all that have it.
    """

    def __init__(self, grid: Grid, things: np.ndarray, segment_map, semantic, least=0.0, sure=0.0):
        self.least, self.sure = least, sure
        self.grid, self.things = grid, things
        self.segment_map, self.semantic = segment_map, semantic
        self.size = segment_map.shape[::-1]
        self.waiting: list[Instance] = []  # of rows of windows that are not all there
        self.labels: list[int] = []
        self.scores: list[float] = []
        # Sums of posteriors from row `first` on, of the classes that windows show: of all K they
        # would fill the memory, and no softmax is ever 0.
        self.first, self.sums = 0, {}
        self.pixels, self.shares = np.zeros(len(things), np.int64), np.zeros(len(things))

    def add(self, y: int, x: int, prediction: Prediction) -> None:
        """What the window at (y, x) says: its things, and sums of its classes."""
        grid, boxes = self.grid, _boxes(prediction)
        inner = grid.border(y, x, self.size)
        window = y, x, y + grid.height, x + grid.width
        for k, place in enumerate(boxes):
            if place is None or not self.things[prediction.labels[k]]:
                continue
            if prediction.scores[k] < self.least:
                continue
            rows, columns = place
            edges = rows.start, grid.height - rows.stop, columns.start, grid.width - columns.stop
            cut = any(is_inner and not edge for is_inner, edge in zip(inner, edges))
            box = y + rows.start, x + columns.start, y + rows.stop, x + columns.stop
            if cut and grid.shows_whole(box, self.size):
                continue
            whole = prediction.masks
            mask = (
                prediction.segment_map[place] == k + 1 if whole is None else whole[k][place].copy()
            )
            label, score = int(prediction.labels[k]), float(prediction.scores[k])
            area = int(np.count_nonzero(mask))
            self.waiting.append(Instance(label, score, box, mask, window, cut, area))
        band = slice(y - self.first, y - self.first + grid.height), slice(x, x + grid.width)
        most = prediction.sums.max((1, 2))
        for k in np.flatnonzero((most > 0) & (most >= FAINT * most.max())):
            if k not in self.sums:
                self.sums[k] = np.zeros((grid.height, self.size[0]), np.float32)
            self.sums[k][band] += prediction.sums[k]

    def finish_row(self, end: int) -> None:
        """No further window shows pixels above row `end` of the image."""
        self._settle_classes(end)
        if not self.waiting:
            return
        groups, canvas, origin = self._compete()
        written, self.waiting = len(self.labels), []
        for number, group in enumerate(groups, written + 1):
            if not group:
                continue
            if max(member.box[2] for member in group) > end:
                self.waiting += group
                continue
            self.labels.append(group[0].label)
            self.scores.append(max(member.score for member in group))
            for member in group:
                top, left, bottom, right = member.box
                mine = canvas[_part(member.box, origin)] == number
                self.segment_map[top:bottom, left:right][mine] = len(self.labels)

    def _settle_classes(self, end: int) -> None:
        count = end - self.first
        classes = sorted(self.sums)
        if count and classes:
            sums = np.stack([self.sums[k][:count] for k in classes])
            best = sums.max(0)
            # 0 = no class, class + 1
            chosen = (np.array(classes)[sums.argmax(0)] + 1) * (best > 0)
            self.semantic[self.first : end] = chosen
            share = best / sums.sum(0).clip(1e-9)
            self.pixels += np.bincount(chosen.ravel(), minlength=len(self.things) + 1)[1:]
            weights = np.bincount(chosen.ravel(), share.ravel(), len(self.things) + 1)
            self.shares += weights[1:]
        for k in classes:
            rest = self.sums[k][count:]
            self.sums[k] = np.concatenate([rest, np.zeros_like(self.sums[k][:count])])
            if not rest.any():
                del self.sums[k]
        self.first = end

    def _compete(self) -> tuple[list[list[Instance]], np.ndarray, tuple[int, int]]:
        """What waits, as objects: lists of instances that are one.

        Returns: the objects;  canvas: what is written, and the k-th of these objects as number
            k + 1 + what is written;  origin: (top, left) of the canvas in the image.
        """
        mark_pieces(self.waiting)
        tops, lefts, bottoms, rights = zip(*(one.box for one in self.waiting))
        origin = top, left = min(tops), min(lefts)
        canvas = self.segment_map[top : max(bottoms), left : max(rights)].copy()
        written, groups = len(self.labels), []
        for one in sorted(self.waiting, key=self._order):
            below = canvas[_part(one.box, origin)]
            numbers, pixels = np.unique(below[one.mask], return_counts=True)
            free = int(pixels[numbers == 0].sum())
            rivals = (numbers[numbers > written] - written - 1).tolist()
            same = [
                k for k in rivals if _one_object(one, groups[k], canvas, origin, written + k + 1)
            ]
            if not same and free < KEPT * one.area:
                continue
            groups.append([one, *(member for k in same for member in groups[k])])
            below[one.mask & (below == 0)] = written + len(groups)
            for k in same:  # it is the bridge between them
                for member in groups[k]:
                    place = canvas[_part(member.box, origin)]
                    place[place == written + k + 1] = written + len(groups)
                groups[k] = []
        return groups, canvas, origin

    def _order(self, one: Instance):
        """Of those that are sure, and then of the others: whole ones before parts, surer ones
        first; the rest makes it one order."""
        return one.score < self.sure, one.part, -one.score, -one.area, one.box

    def result(self) -> Prediction:
        """When all rows are finished: what no thing has taken becomes stuff, a segment a class.

        semantic: the array that was given: 0 = no class, class + 1.
        """
        number = np.zeros(len(self.things) + 1, np.int32)  # by class + 1; 0: no segment
        rows = max(1, CHUNK // self.size[0])
        for top in range(0, self.size[1], rows):
            part = self.segment_map[top : top + rows]
            classes = np.where(part == 0, self.semantic[top : top + rows], 0)
            for k in np.unique(classes[classes > 0]) - 1:
                if not self.things[k] and not number[k + 1]:
                    self.labels.append(int(k))
                    self.scores.append(float(self.shares[k] / self.pixels[k]))
                    number[k + 1] = len(self.labels)
            part += number[classes]
        labels, scores = np.array(self.labels, np.int64), np.array(self.scores, np.float32)
        return Prediction(self.segment_map, labels, scores, self.semantic)


def _boxes(prediction: Prediction) -> list[tuple[slice, slice] | None]:
    """Where each segment is, rows and columns; None if it has no pixel."""
    if prediction.masks is None:
        return ndimage.find_objects(prediction.segment_map)
    return [(ndimage.find_objects(mask.view(np.uint8)) or [None])[0] for mask in prediction.masks]


def _part(box: tuple[int, int, int, int], origin: tuple[int, int]) -> tuple[slice, slice]:
    """A box of the image in an array that begins at origin."""
    (top, left, bottom, right), (y, x) = box, origin
    return slice(top - y, bottom - y), slice(left - x, right - x)


def mark_pieces(instances: list[Instance]) -> None:
    """Those are parts, too, that are a piece of an object whose other pieces their window does not
    show, as where something lies across it: no border cuts them."""
    boxes, windows = (np.array([getattr(one, n) for one in instances]) for n in ("box", "window"))
    labels = np.array([one.label for one in instances])
    for one in instances:
        if one.part:
            continue
        # of another window, on the box of this one, and going on outside of its window
        beside = (boxes[:, :2] < one.box[2:]).all(1) & (boxes[:, 2:] > one.box[:2]).all(1)
        beside &= (boxes[:, :2] < one.window[:2]).any(1) | (boxes[:, 2:] > one.window[2:]).any(1)
        for k in np.flatnonzero(beside & (labels == one.label) & (windows != one.window).any(1)):
            if _seen_in(instances[k], one) >= SAME:
                one.part = True
                break


def _seen_in(other: Instance, one: Instance) -> float:
    """IoU of an instance and of what its window shows of another one."""
    (top, left, *_), (y, x, end, last) = other.box, one.window
    rows, columns = slice(max(y - top, 0), end - top), slice(max(x - left, 0), last - left)
    shown = np.count_nonzero(other.mask[rows, columns])
    first = [max(pair) for pair in zip(one.box[:2], other.box[:2])]
    stop = [min(pair) for pair in zip(one.box[2:], other.box[2:])]
    mine, theirs = (
        m.mask[tuple(slice(a - o, b - o) for a, b, o in zip(first, stop, m.box))]
        for m in (one, other)
    )
    common = np.count_nonzero(mine & theirs)
    return common / (one.area + shown - common)


def _one_object(one: Instance, group: list[Instance], canvas, origin, number: int) -> bool:
    """Whether an instance is a part of the same object as a group, which the canvas has as number:
    they agree about the pixels that windows of both show."""
    if not one.part or not group[0].part or one.label != group[0].label:
        return False
    top, left, bottom, right = one.box
    shown = np.zeros(one.mask.shape, bool)  # by a window of the group
    for member in group:
        y, x, end, last = member.window
        rows = slice(max(y - top, 0), max(end - top, 0))
        shown[rows, max(x - left, 0) : max(last - left, 0)] = True
    mine = one.mask & shown
    (y, x), (y0, x0, y1, x1) = origin, one.window
    theirs = canvas[max(y0 - y, 0) : max(y1 - y, 0), max(x0 - x, 0) : max(x1 - x, 0)] == number
    common = np.count_nonzero(mine & (canvas[_part(one.box, origin)] == number))
    either = np.count_nonzero(mine) + np.count_nonzero(theirs) - common
    return common >= AGREE * either


@torch.no_grad()
def predict_in_windows(
    method: Method,
    picture: Picture,
    readings: Iterable[str],
    t: int | None = None,
    arrays: Callable[[str], tuple] | None = None,
    least: float = 0.0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Prediction]:
    """What readings say of an image, from windows of it.

    Args:
        picture: RGB.   t: as in `Method.predict`.
        arrays: of a reading (segment_map int32, semantic uint16), both (H, W) and zeros, that are
            to be filled; None: in memory.
        least: score of an instance that is stitched.   progress: wraps the rows of windows.
    Returns: by reading; `semantic` as `Stitcher.result` has it.
    """
    grid, readings = Grid.of(picture.size, method.cfg), list(readings)
    sure = method.cfg.least_score if method.cfg.labels == "instances" else 0.0
    shape = picture.size[::-1]
    stitchers = {}
    for reading in readings:
        maps = (
            arrays(reading) if arrays else (np.zeros(shape, np.int32), np.zeros(shape, np.uint16))
        )
        stitchers[reading] = Stitcher(grid, _things(method, reading), *maps, least, sure)
    for row in progress(range(len(grid.tops))):
        top = grid.tops[row]
        for lefts in _batches(grid.lefts, method.cfg.eval_batch):
            images = torch.stack([_window(picture, grid, top, left) for left in lefts])
            sizes = [(grid.shown, (grid.height, grid.width))] * len(lefts)
            images = images.to(method.device)
            answers = method.predict(images, sizes, readings, t, semantic=False, sums=True)
            for k, reading, prediction in answers:
                stitchers[reading].add(top, lefts[k], prediction)
        last = row + 1 == len(grid.tops)
        for stitcher in stitchers.values():
            stitcher.finish_row(shape[0] if last else grid.tops[row + 1])
    return {reading: stitcher.result() for reading, stitcher in stitchers.items()}


def _things(method: Method, reading: str) -> np.ndarray:
    """(K,) bool: the classes that a reading has as instances."""
    by_class = reading == PSEUDO and method.cfg.labels == "semantic"
    return np.array(method.taxonomy.things) & (not by_class)


def _batches(lefts: tuple[int, ...], count: int) -> Iterator[tuple[int, ...]]:
    for first in range(0, len(lefts), count):
        yield lefts[first : first + count]


def _window(picture: Picture, grid: Grid, top: int, left: int) -> torch.Tensor:
    """(3, h, w) uint8, as it is shown."""
    part = picture.crop((left, top, left + grid.width, top + grid.height))
    size = grid.shown[::-1]
    view = resize_part(Sample(part, []), size, (0, 0, *size)).image
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)
