"""Stable regions: masks for images on which no SAM at hand was trained (microscopy, depth, x-ray).

An image is cut at many grey levels; what hangs together above (or below) a level is a region, and a
region that hardly changes from one level to the next has a real border. Regions nest, as SAM's
parts and wholes do, and no label is looked at. `--sam regions` makes the masks of `--stage masks`
this way; the rest of the method does not know.
Source: maximally stable extremal regions, Matas et al., BMVC 2002, without the component tree.
Axes: H W pixels, N regions.
Try: `python dearli.py --stage masks --sam regions --out runs/try-regions`: masks of all training
images without any network, for --stage dewa --masks.
"""

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

LEVELS = 32  # grey levels at which an image is cut, evenly between its 0.5 and 99.8 percentiles
STEP = 2  # levels between the cuts that are compared
STABLE = 0.5  # least area(level + STEP) / area(level - STEP)
MIN_AREA = 24  # pixels
MAX_SHARE = 0.97  # of the image
SAME = 0.75  # IoU from which two regions are one
FILLED = 0.25  # of the image: smaller regions lose their holes


class StableRegions:
    """Has the interface of `pretrained.sam.MaskGenerator`."""

    about = dict(
        kind="regions",
        levels=LEVELS,
        step=STEP,
        stable=STABLE,
        min_area=MIN_AREA,
        max_share=MAX_SHARE,
        same=SAME,
        filled=FILLED,
    )

    def generate(self, image: np.ndarray) -> list[dict]:
        """Image (H, W, 3) uint8 RGB -> records, the most stable first; no two alike.

        A record has: segmentation (H, W) bool, area, predicted_iou and stability_score (both the
        stability, 0 to 1), crop_box and point_coords.
        """
        grey = Image.fromarray(image).convert("L").filter(ImageFilter.GaussianBlur(1))
        grey = np.asarray(grey).astype(np.float32)
        regions = [region for side in (grey, -grey) for region in _one_side(side)]
        regions.sort(key=lambda region: -region[0])
        distinct: list[tuple[float, tuple[slice, slice], np.ndarray]] = []
        bounds = np.zeros((len(regions), 5))  # of the distinct ones: top, left, bottom, right, area
        for stability, box, inside in regions:
            (top, bottom), (left, right) = ((side.start, side.stop) for side in box)
            area = inside.sum()
            others = bounds[: len(distinct)]
            overlap = ((others[:, :2] < (bottom, right)) & ((top, left) < others[:, 2:4])).all(1)
            areas = others[:, 4]
            alike = overlap & (np.minimum(areas, area) >= SAME * np.maximum(areas, area))
            if all(_iou(box, inside, *distinct[k][1:]) < SAME for k in np.flatnonzero(alike)):
                bounds[len(distinct)] = top, left, bottom, right, area
                distinct.append((stability, box, inside))
        return [_record(grey.shape, *region) for region in distinct]


def _iou(box_a, a: np.ndarray, box_b, b: np.ndarray) -> float:
    """IoU of two masks, each given by the part inside its box."""
    rows, columns = (
        slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(box_a, box_b)
    )

    def shared(box, mask):
        top, left = box[0].start, box[1].start
        return mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    both = (shared(box_a, a) & shared(box_b, b)).sum()
    return both / (a.sum() + b.sum() - both)


def _record(shape: tuple[int, int], stability: float, box, inside: np.ndarray) -> dict:
    mask = np.zeros(shape, bool)
    mask[box] = inside
    y, x = np.argwhere(mask)[inside.sum() // 2]
    return {
        "segmentation": mask,
        "area": int(inside.sum()),
        "predicted_iou": stability,
        "stability_score": stability,
        "crop_box": [0, 0, shape[1], shape[0]],
        "point_coords": [[int(x), int(y)]],
    }


def _one_side(grey: np.ndarray):
    """(stability, box, mask inside the box) of the stable regions brighter than a level."""
    low, high = np.percentile(grey, 0.5), np.percentile(grey, 99.8)
    levels = np.linspace(low, high, LEVELS + 2)[1:-1]
    labels = [ndimage.label(grey > level)[0] for level in levels]
    areas = [np.bincount(label.ravel()) for label in labels]
    for k in range(STEP, len(levels) - STEP):
        outer, inner = labels[k - STEP], grey > levels[k + STEP]
        # pixels that survive the next cut
        left = np.bincount(labels[k].ravel(), inner.ravel(), len(areas[k]))
        for c, box in enumerate(ndimage.find_objects(labels[k]), 1):
            if not MIN_AREA <= areas[k][c] <= MAX_SHARE * grey.size:
                continue
            inside = labels[k][box] == c
            around = areas[k - STEP][outer[box][inside][0]]  # the region it came from
            stability = float(left[c] / around)
            if stability >= STABLE:
                if areas[k][c] < FILLED * grey.size:
                    inside = ndimage.binary_fill_holes(inside)
                yield stability, box, inside
