"""Panoptic quality (PQ, SQ, RQ) and mean IoU, numpy only.

PQ is the metric of Kirillov et al., "Panoptic Segmentation" (arXiv:1801.00868, section 4). Of one
class:

    PQ = sum of IoU over matches / (TP + FP/2 + FN/2) = SQ * RQ,   SQ = that sum / TP,   RQ = TP /
    (TP + FP/2 + FN/2)

Counts are summed over all images first, PQ is formed once per class, and classes are averaged last.
The rules are those of the COCO panoptic API, written afresh; several surprise:
* A match needs the same class and IoU > 0.5, strictly, which makes it unique: there is nothing to
assign.
* Void (truth id 0) is no mistake: a prediction's pixels on it leave the union, and an unmatched
  prediction with more than half of its pixels (strictly) on void is no false positive.
* Crowd truth is never matched and never missed. An unmatched prediction is forgiven as above for
  void and crowd of ITS class together, but crowd, unlike void, stays in the union of a prediction
  that does match another segment.
* One crowd region a class and image: of several, only the last listed forgives.
* The truth's area is the one stated in the data set's JSON, the prediction's is counted. Where JSON
  and map disagree, IoU may exceed 1 and a segment may match twice, as in the API.
* A class that occurs nowhere (TP + FP + FN = 0) is left out of the mean; one that is only wrongly
predicted counts as 0.
Differs from the API: results are never inf, NaN or a division by zero, and what it refuses by
KeyError is a ValueError here.

Axes: H W image, P predicted segments, T true segments, C classes (contiguous), M pairs of segments
that overlap.
Try, after the demo: `python dearli.py --stage eval --weights runs/mini-sup-16
--object-mask-threshold 0.9 --out runs/try-sure`: what is not sure is missed.
"""

import numpy as np

MATCH_IOU = 0.5  # a match has more, arXiv:1801.00868 section 4.1
VOID = -1  # of a semantic map: no class
# share of void and crowd pixels above which an unmatched prediction is no false positive, section
# 4.2
FORGIVEN = 0.5


class PanopticQuality:
    """Sums of IoU, TP, FP and FN per class, over images (`add`) and over processes (`merge`)."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.iou = np.zeros(num_classes, np.float64)  # (C,) summed over true positives
        self.tp, self.fp, self.fn = (np.zeros(num_classes, np.int64) for _ in range(3))

    def add(
        self, pred_map, pred_labels, true_map, true_labels, true_areas=None, true_crowd=None
    ) -> None:
        """Count one image.

        Args:
            pred_map, true_map: (H, W) integers, 0 = void, k = k-th segment.
            pred_labels: (P,) classes in [0, C).        true_labels: (T,) likewise, in the order of
            the JSON (see crowd above).
            true_areas: (T,) pixels, as the JSON states them; None: counted from true_map.
            true_crowd: (T,) bool; None: no crowd.
        A true segment without a pixel is a false negative. A predicted one is refused: it could be
        neither right nor wrong.
        Raises: ValueError, before anything is counted, if a map holds an id without a label, a
            predicted segment has no pixel, a label is not in [0, C), or shapes disagree.
        """
        # 1 overlaps: every pair of segments that share a pixel, with the number of pixels
        pred_class = _classes("pred_labels", pred_labels, self.num_classes)  # (P,)
        true_class = _classes("true_labels", true_labels, self.num_classes)  # (T,)
        num_pred, num_true = len(pred_class), len(true_class)
        p, t, overlap = _overlaps(pred_map, num_pred, true_map, num_true)  # (M,) each; id 0 is void
        pred_area = np.bincount(p, overlap, num_pred + 1)  # (P+1,)
        true_area = np.bincount(t, overlap, num_true + 1)  # (T+1,)
        if not pred_area[1:].all():
            raise ValueError(
                f"pred_map: segment {1 + np.argmin(pred_area[1:])} of {num_pred} has a label but "
                "no pixel"
            )
        if true_areas is not None:
            true_area[1:] = _one_each("true_areas", true_areas, num_true)
        crowd = np.zeros(num_true, bool)
        if true_crowd is not None:
            crowd[:] = _one_each("true_crowd", true_crowd, num_true)
        void = np.bincount(p[t == 0], overlap[t == 0], num_pred + 1)  # (P+1,) pixels on void

        # 2 matches: same class, no crowd, IoU > 0.5
        pair = (p > 0) & (t > 0)
        p, t, overlap = p[pair], t[pair], overlap[pair]
        union = pred_area[p] + true_area[t] - overlap - void[p]
        candidate = (pred_class[p - 1] == true_class[t - 1]) & ~crowd[t - 1]
        candidate &= union > 0  # else the JSON states no area
        iou = np.divide(overlap, union, out=np.zeros(len(p)), where=candidate)
        match = iou > MATCH_IOU
        missed, unmatched = ~crowd, np.ones(num_pred, bool)  # (T,), (P,)
        missed[t[match] - 1] = False
        unmatched[p[match] - 1] = False

        # 3 false positives: unmatched, less those that lie mostly on void or on the crowd region of
        # their class
        crowd_of_class = np.zeros(self.num_classes, np.int64)  # (C,) true id, 0 = none
        crowd_of_class[true_class[crowd]] = 1 + np.flatnonzero(crowd)  # the last listed remains
        on_crowd = crowd_of_class[pred_class[p - 1]] == t
        forgiven = void + np.bincount(p[on_crowd], overlap[on_crowd], num_pred + 1)  # (P+1,)
        false = unmatched & ~(forgiven[1:] / pred_area[1:] > FORGIVEN)

        matched_class = pred_class[p[match] - 1]
        self.iou += np.bincount(matched_class, iou[match], self.num_classes)
        self.tp += np.bincount(matched_class, minlength=self.num_classes)
        self.fp += np.bincount(pred_class[false], minlength=self.num_classes)
        self.fn += np.bincount(true_class[missed], minlength=self.num_classes)

    def merge(self, other: "PanopticQuality") -> None:
        """Add the counts of another process, in any order (but for rounding)."""
        _same_classes(self, other)
        for name in ("iou", "tp", "fp", "fn"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def result(self, things, names=None) -> dict:
        """PQ, SQ and RQ in [0, 1], of plain Python numbers, ready for JSON.

        Args: things: (C,) bool.        names: C distinct class names; None: the keys of per_class
            are indices.
        Returns: {"all" | "things" | "stuff": {"pq", "sq", "rq", "n"}, "per_class": {name: {"pq",
            "sq", "rq", "iou", "tp", "fp", "fn"}}}; n classes are in the mean, n = 0 gives zeros;
            "iou" is the sum over the class's true positives.
        """
        things = _one_each("things", things, self.num_classes).astype(bool)
        seen = self.tp + self.fp + self.fn > 0
        weight = self.tp + 0.5 * self.fp + 0.5 * self.fn
        table = {
            "pq": _ratio(self.iou, weight),
            "sq": _ratio(self.iou, self.tp),
            "rq": _ratio(self.tp, weight),
            "iou": self.iou,
            "tp": self.tp,
            "fp": self.fp,
            "fn": self.fn,
        }
        groups = {"all": seen, "things": seen & things, "stuff": seen & ~things}
        result = {
            group: {key: _mean(table[key][chosen]) for key in ("pq", "sq", "rq")}
            | {"n": int(chosen.sum())}
            for group, chosen in groups.items()
        }
        return result | {"per_class": _per_class(table, names)}


class MeanIoU:
    """Pixel confusion between classes, over images (`add`) and processes (`merge`).

    As in detectron2's SemSegEvaluator: void pixels count nowhere, and the mean is over the classes
    that occur in the truth.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.confusion = np.zeros(
            (num_classes, num_classes), np.int64
        )  # (C, C) pixels, [truth, prediction]

    def add(self, pred, true, ignore: int = 255) -> None:
        """Count one image. pred: (H, W) in [0, C).    true: (H, W) in [0, C) or `ignore`, which
        itself is no class.
        """
        if 0 <= ignore < self.num_classes:
            raise ValueError(
                f"ignore: {ignore} is also one of the {self.num_classes} classes; choose another "
                "value for void"
            )
        pred = _integers("pred", pred, self.num_classes)
        true = _integers("true", true, self.num_classes, ignore)
        _same_shape("pred", pred, "true", true)
        valid = true != ignore
        pair = _pair_ids(true[valid], pred[valid], self.num_classes)
        self.confusion += np.bincount(pair, minlength=self.confusion.size).reshape(
            self.confusion.shape
        )

    def merge(self, other: "MeanIoU") -> None:
        """Add the counts of another process."""
        _same_classes(self, other)
        self.confusion = self.confusion + other.confusion

    def result(self, names=None) -> dict:
        """{"miou": [0, 1], "n": classes in the mean, "per_class": {name: {"iou", "tp", "fp",
        "fn"}}}, counts in pixels.

        A class with tp + fn = 0 is not in the mean; its iou is given as 0. names: as in
        PanopticQuality.result.
        """
        tp = self.confusion.diagonal()
        fp, fn = self.confusion.sum(0) - tp, self.confusion.sum(1) - tp
        table = {"iou": _ratio(tp, tp + fp + fn), "tp": tp, "fp": fp, "fn": fn}
        seen = tp + fn > 0
        return {
            "miou": _mean(table["iou"][seen]),
            "n": int(seen.sum()),
            "per_class": _per_class(table, names),
        }


class PanopticScore:
    """PanopticQuality as the frame measures with: `add`, `merge`, `result` of predictions and
    truths.

    columns: of tables: heading, and where the figure is in the result.
    """

    columns = (
        ("PQ", ("all", "pq")),
        ("PQ things", ("things", "pq")),
        ("PQ stuff", ("stuff", "pq")),
        ("SQ", ("all", "sq")),
        ("RQ", ("all", "rq")),
    )

    def __init__(self, taxonomy):
        self.taxonomy, self.quality = taxonomy, PanopticQuality(len(taxonomy))

    def add(self, prediction, truth) -> None:
        """prediction: has segment_map, labels;  truth: also areas and crowd
        (`PanopticQuality.add`).
        """
        self.quality.add(
            prediction.segment_map,
            prediction.labels,
            truth.segment_map,
            truth.labels,
            truth.areas,
            truth.crowd,
        )

    def merge(self, other: "PanopticScore") -> None:
        self.quality.merge(other.quality)

    def result(self) -> dict:
        return self.quality.result(self.taxonomy.things, self.taxonomy.short_names)


class SemanticScore:
    """MeanIoU in the same shape. Its result has the pixels of every pair of classes, too."""

    columns = (("mIoU", ("miou",)),)

    def __init__(self, taxonomy):
        self.taxonomy, self.pixels = taxonomy, MeanIoU(len(taxonomy))

    def add(self, prediction, truth) -> None:
        """prediction: has semantic (H, W);  truth: semantic() -> (H, W), VOID for no class."""
        self.pixels.add(prediction.semantic, truth.semantic(), VOID)

    def merge(self, other: "SemanticScore") -> None:
        self.pixels.merge(other.pixels)

    def result(self) -> dict:
        """{"miou", "miou_classes": classes in the mean, "per_class": {name: {"semantic_iou"}},
        "confusion"}.

        confusion: a row of text for every true class: pixels taken for the first class, the second,
        ...; JSON with indentation would give every number a line.
        """
        result = self.pixels.result(self.taxonomy.short_names)
        per_class = {n: {"semantic_iou": row["iou"]} for n, row in result["per_class"].items()}
        return {
            "miou": result["miou"],
            "miou_classes": result["n"],
            "per_class": per_class,
            "confusion": [" ".join(map(str, row)) for row in self.pixels.confusion.tolist()],
        }


def _overlaps(pred_map, num_pred: int, true_map, num_true: int):
    """All (pred id, true id, pixels) with at least one pixel, void included: three arrays (M,)."""
    pred_map, true_map = (
        _integers("pred_map", pred_map, num_pred + 1),
        _integers("true_map", true_map, num_true + 1),
    )
    _same_shape("pred_map", pred_map, "true_map", true_map)
    # Pixels come in runs of one pair, so only the first of each run is looked up.
    p, t = pred_map.ravel(), true_map.ravel()
    first = np.flatnonzero(np.append(p.size > 0, (p[1:] != p[:-1]) | (t[1:] != t[:-1])))
    pair, length = _pair_ids(p[first], t[first], num_true + 1), np.diff(first, append=p.size)
    if (num_pred + 1) * (num_true + 1) <= max(p.size, 1 << 16):
        count = np.bincount(pair, length)
        pair = np.flatnonzero(count)
        count = count[pair]
    # thousands of segments on both sides: the full table would be larger than the image, so sort
    # instead
    else:
        pair, run = np.unique(pair, return_inverse=True)
        count = np.bincount(run, length)
    return pair // (num_true + 1), pair % (num_true + 1), count


def _pair_ids(a, b, num_b):
    """a * num_b + b in int64 whatever the types (8 or 16 bits would overflow), with one temporary
    of their size.
    """
    pair = a.astype(np.int64)
    pair *= num_b
    return np.add(pair, b, out=pair, casting="unsafe")


def _integers(name, array, end, ignore=None, dims=2):
    """The array as numpy's, or ValueError if it does not hold integers in [0, end)."""
    array = np.asarray(array)
    if array.ndim != dims or (array.dtype.kind not in "iub" and array.size):
        raise ValueError(
            f"{name}: expected {'(H, W)' if dims == 2 else '(N,)'} integers, got {array.shape} "
            f"{array.dtype}"
        )
    values = array if ignore is None else array[array != ignore]
    if values.size and (values.min() < 0 or values.max() >= end):
        raise ValueError(
            f"{name}: expected values in [0, {end - 1}], got {values.min()} to {values.max()}"
        )
    return array


def _classes(name, labels, num_classes):
    """(N,) int64, or ValueError."""
    return _integers(name, labels, num_classes, dims=1).astype(np.int64)


def _same_shape(name, array, other_name, other):
    if array.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name}: expected one shape, got {array.shape} and {other.shape}"
        )


def _same_classes(one, other):
    if one.num_classes != other.num_classes:
        raise ValueError(f"merge: expected {one.num_classes} classes, got {other.num_classes}")


def _one_each(name, array, number):
    array = np.asarray(array)
    if array.shape != (number,):
        raise ValueError(f"{name}: expected ({number},), got {array.shape}")
    return array


def _ratio(a, b):
    return np.divide(a, b, out=np.zeros(len(b)), where=b > 0)


def _mean(values):
    return float(values.mean()) if len(values) else 0.0


def _per_class(table, names):
    number = len(table["iou"])
    names = range(number) if names is None else names
    if len(names) != number or len(set(names)) != number:
        raise ValueError(
            f"names: expected {number} distinct names, got {len(names)}, {len(set(names))} distinct"
        )
    return {
        name: {key: column[c].item() for key, column in table.items()}
        for c, name in enumerate(names)
    }
