"""PQ of groups of classes, from rare to frequent (the paper's Figure 5)."""

import numpy as np

from readers.ground_truth import DataSet


def frequency_groups(dataset: DataSet, groups: int) -> list[list[int]]:
    """Classes by their share of the pixels of the labelled images, least to most frequent, in
    groups of one size (Figure 5).
    """
    pixels = class_pixels(dataset, dataset.labeled)
    return [part.tolist() for part in np.array_split(np.argsort(pixels, kind="stable"), groups)]


def class_pixels(dataset: DataSet, images: list[int]) -> np.ndarray:
    """(K,) pixels of every class in the ground truth of training images."""
    pixels = np.zeros(len(dataset.taxonomy), np.int64)
    for i in images:
        truth = dataset.train.truth(i)
        np.add.at(
            pixels,
            truth.labels,
            np.bincount(truth.segment_map.ravel(), minlength=len(truth.labels) + 1)[1:],
        )
    return pixels


def group_quality(result: dict, taxonomy, groups: list[list[int]]) -> list[dict]:
    """Mean PQ of each group of classes, over the n that are in the ground truth or predicted:
    [{"pq", "n", "classes"}].
    """
    rows = []
    for group in groups:
        names = [taxonomy.short_names[k] for k in group]
        per_class = [result["per_class"][name] for name in names]
        counted = [c["pq"] for c in per_class if c["tp"] + c["fp"] + c["fn"]]
        rows.append(
            {"pq": float(np.mean(counted)) if counted else 0.0, "n": len(counted), "classes": names}
        )
    return rows
