"""Mask AP: average precision of instances, as COCO counts it.

pycocotools does the counting: its COCOeval matches the instances of an image at IoUs from 0.5 to
0.95, and its `accumulate` makes precision and recall of all images. Here an image is matched as
soon as it is there, and only what the sums need is kept: no mask, and nothing of a class that is
neither there nor found.
Differs from COCOeval: a figure over nothing is None ("n/a"), and not -1.
Axes: N instances, H W pixels, T IoU thresholds, D detections, A ranges of area.
Source: github.com/cocodataset/cocoapi.
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

        prediction: has instances() -> (N, H, W) bool, labels, scores;  truth: instances(), labels,
            areas, crowd. A crowd swallows what lies in it; areas of the truth are as stated.
        Raises: ValueError if the two are of different sizes.
        """
        found, true = prediction.instances(), truth.instances()
        if found.shape[1:] != true.shape[1:]:
            raise ValueError(
                f"prediction and truth: expected one size, got {found.shape[1:]} and "
                f"{true.shape[1:]}"
            )
        masks, runs = run_lengths(found), run_lengths(true)
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


def run_lengths(masks: np.ndarray) -> list[dict]:
    """(N, H, W) bool -> N times {"size": [H, W], "counts": bytes}, as pycocotools has them."""
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
