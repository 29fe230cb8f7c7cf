"""Mask AP: average precision of instances, as COCO counts it; and what kinds of mistakes they are.

pycocotools does the counting: its COCOeval matches the instances of an image at IoUs from 0.5 to
0.95, and its `accumulate` makes precision and recall of all images. Here an image is matched as
soon as it is there, and only what the sums need is kept: no mask, and nothing of a class that is
neither there nor found.
`ErrorTypes` is Figure 5 of PL-DC.
Differs from COCOeval: a figure over nothing is None ("n/a"), and not -1.
Axes: N instances, H W pixels, T IoU thresholds, D detections, A ranges of area.
Sources: github.com/cocodataset/cocoapi; PL-DC (arXiv:2505.11075).
"""

import contextlib
import io
from collections import defaultdict

import numpy as np
from pycocotools import mask as coco
from pycocotools.cocoeval import COCOeval

from ground import ranks

AREAS = ("all", "small", "medium", "large")  # in the order of COCOeval: up to 32 ** 2, 96 ** 2
FIFTY, SEVENTY_FIVE = 0, 5  # places of these IoUs, in hundredths, among its thresholds
SHOWN = 0.5  # least score of an instance that `ErrorTypes` looks at; the paper names none
# Of what COCOeval says of an image, class and range of areas: what `accumulate` reads.
KEPT = ("dtScores", "dtMatches", "dtIgnore", "gtIgnore")


class MaskAP:
    """AP of instances over many images (`engine.method.Metric`).

    columns: of tables: heading, and where the figure is in the result.
    """

    columns = (
        ("AP", ("ap",)),
        ("AP50", ("ap50",)),
        ("AP75", ("ap75",)),
        ("APs", ("aps",)),
        ("APm", ("apm",)),
        ("APl", ("apl",)),
    )

    def __init__(self, taxonomy):
        self.taxonomy = taxonomy
        self.rank, self.added = ranks.rank(), 0
        # By (how many images this process had before, process): ranks take images in turn, so that
        # this is the order of one process. {(class, area): {name: array}} of each.
        self.images: dict[tuple[int, int], dict] = {}

    def add(self, prediction, truth) -> None:
        """Match the instances of one image, at its original size.

        prediction: has mask(k) -> (H, W) bool, segment_map, labels, scores;  truth: mask(k),
            segment_map, labels, areas (as stated, not counted), crowd (swallows what lies in it).
        Raises: ValueError if the two are of different sizes.
        """
        found, true = prediction.segment_map.shape, truth.segment_map.shape
        if found != true:
            raise ValueError(f"prediction and truth: expected one size, got {found} and {true}")
        masks, runs = run_lengths(prediction), run_lengths(truth)
        judge = _judge(1)
        judge._dts, judge._gts = defaultdict(list), defaultdict(list)
        for k, label in enumerate(prediction.labels.tolist()):
            judge._dts[0, label].append(
                {
                    "id": k + 1,  # 0 is COCOeval's word for none
                    "segmentation": masks[k],
                    "score": float(prediction.scores[k]),
                    "area": float(coco.area(masks[k])),
                }
            )
        for k, label in enumerate(truth.labels.tolist()):
            crowd = int(truth.crowd[k])
            judge._gts[0, label].append(
                {
                    "id": k + 1,
                    "segmentation": runs[k],
                    "area": float(truth.areas[k]),
                    "iscrowd": crowd,
                    "ignore": crowd,
                }
            )
        self.images[self.added, self.rank] = _matched(judge)
        self.added += 1

    def merge(self, other: "MaskAP") -> None:
        """Add the images of another process."""
        if len(self.taxonomy) != len(other.taxonomy):
            raise ValueError(
                f"merge: expected {len(self.taxonomy)} classes, got {len(other.taxonomy)}"
            )
        common = self.images.keys() & other.images.keys()
        if common:  # not of another process: they come after those of this one
            shift = self.added
            moved = {(k + shift, rank): image for (k, rank), image in other.images.items()}
            self.images |= moved
            self.added += other.added
        else:
            self.images |= other.images

    def result(self) -> dict:
        """{"ap", "ap50", "ap75", "aps", "apm", "apl", "instances": true ones without crowd,
        "per_class": {name: {"ap", "ap50", "ap75", "instances"}}}, 0 to 1.

        None where there is no true instance to find. A mean over classes is over those that have
        some.
        """
        precision = self._precision()  # (T, R, K, A)
        counts = np.zeros(len(self.taxonomy), np.int64)
        for image in self.images.values():
            for (k, area), row in image.items():
                counts[k] += np.count_nonzero(row["gtIgnore"] == 0) if area == 0 else 0
        thresholds = {"ap": slice(None), "ap50": FIFTY, "ap75": SEVENTY_FIVE}
        result = {name: _mean(precision[t, ..., 0]) for name, t in thresholds.items()}
        for name, area in (("aps", 1), ("apm", 2), ("apl", 3)):
            result[name] = _mean(precision[..., area])
        result["instances"] = int(counts.sum())
        result["per_class"] = {
            name: {
                **{key: _mean(precision[t][..., k, 0]) for key, t in thresholds.items()},
                "instances": int(counts[k]),
            }
            for k, name in enumerate(self.taxonomy.short_names)
        }
        return result

    def _precision(self) -> np.ndarray:
        """(T, R, K, A): precision at each recall, -1 where there is nothing to find."""
        images = [self.images[key] for key in sorted(self.images)]
        judge = _judge(len(images), len(self.taxonomy))
        judge._paramsEval = judge.params
        classes, areas = range(len(self.taxonomy)), range(len(AREAS))
        judge.evalImgs = [image.get((k, a)) for k in classes for a in areas for image in images]
        _silently(judge.accumulate)
        return judge.eval["precision"][..., -1]


class ErrorTypes:
    """Shares of the instances found, of score SHOWN at least, that are right, and wrong in each of
    four ways (`engine.method.Metric`).

    The first that holds: correct: its IoU with some true instance of its class is above 0.5;
    similar: with one of another class of the same group (COCO's supercategory); other: with one of
    another class; localisation: it touches one of its class; background: none of these. What lies
    in a crowd and is none of the first three is not counted.
    Differs from the paper: an instance that touches others of other classes alone, of which it has
    no type, is background.
    """

    columns = (
        ("Cor", ("types", "correct")),
        ("Loc", ("types", "localisation")),
        ("Sim", ("types", "similar")),
        ("Oth", ("types", "other")),
        ("BG", ("types", "background")),
    )

    def __init__(self, taxonomy):
        self.groups = taxonomy.groups
        self.counts = dict.fromkeys((keys[-1] for _, keys in self.columns), 0)

    def add(self, prediction, truth) -> None:
        """As `MaskAP.add`."""
        found = [k for k, score in enumerate(prediction.scores) if score >= SHOWN]
        labels, truths = np.asarray(truth.labels), run_lengths(truth)
        crowd = np.asarray(truth.crowd).astype(np.uint8)
        iou = np.zeros((len(found), len(labels)))
        if iou.size:  # with a crowd: the share of the instance that lies in it
            iou[:] = coco.iou(run_lengths(prediction, found), truths, crowd)
        inside = (iou * (crowd > 0) > 0.5).any(1)
        iou = iou * (crowd == 0)
        for k, row, hidden in zip(found, iou, inside):
            kind = self._kind(int(prediction.labels[k]), row, labels)
            if not hidden or kind in ("correct", "similar", "other"):
                self.counts[kind] += 1

    def _kind(self, label: int, iou: np.ndarray, labels: np.ndarray) -> str:
        covered = labels[iou > 0.5].tolist()
        if label in covered:
            return "correct"
        if self.groups and self.groups[label] in [self.groups[k] for k in covered]:
            return "similar"
        if covered:
            return "other"
        return "localisation" if iou[labels == label].any() else "background"

    def merge(self, other: "ErrorTypes") -> None:
        for kind, count in other.counts.items():
            self.counts[kind] += count

    def result(self) -> dict:
        """{"types": {"correct", "localisation", "similar", "other", "background": shares, 0 to 1;
        None for "similar" where the data set groups no classes; "n": instances}}."""
        n = sum(self.counts.values())
        shares = {kind: count / n if n else 0.0 for kind, count in self.counts.items()}
        return {"types": {**shares, **({} if self.groups else {"similar": None}), "n": n}}


def run_lengths(answer, which=None) -> list[dict]:
    """N times {"size": [H, W], "counts": bytes}, as pycocotools has them, a mask at a time: those
    of a large image would fill the memory. which: of the instances; None: all.
    """
    masks = map(answer.mask, range(len(answer.labels)) if which is None else which)
    return [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]


def _judge(images: int, classes: int = 0) -> COCOeval:
    judge = COCOeval(iouType="segm")
    judge.params.imgIds, judge.params.catIds = list(range(images)), list(range(classes))
    judge.params.maxDets = judge.params.maxDets[-1:]  # AP is of 100 an image; the rest is of AR
    return judge


def _matched(judge: COCOeval) -> dict:
    """{(class, area): what COCOeval says of it} of the one image that it holds."""
    rows, most = {}, judge.params.maxDets[-1]
    for _, k in sorted({*judge._dts, *judge._gts}):
        judge.ious = {(0, k): judge.computeIoU(0, k)}
        for a, area in enumerate(judge.params.areaRng):
            said = judge.evaluateImg(0, k, area, most)
            rows[k, a] = {name: np.asarray(said[name]) for name in KEPT}
    return rows


def _silently(work) -> None:
    """COCOeval speaks on standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        work()


def _mean(precision: np.ndarray) -> float | None:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else None
