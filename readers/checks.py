"""What stops a run before it begins, or keeps full PQ out of reach: read from the index of a data
set and from listed folders; no image is opened."""

import contextlib
import os
from pathlib import Path
from typing import Any, Callable

import numpy as np

from config import Config
from ground.errors import UserError, refuse
from readers.class_maps import ClassMaps
from readers.ground_truth import DataSet
from readers.panoptic import PanopticFolder
from readers.pictures import image_header


def require_images(images) -> None:
    """Raise UserError if a set has no image at all: SAM has nothing to segment, and the warm-up
    nothing to learn from."""
    if not len(images):
        raise UserError(f"{images.annotations}: its list of images is empty; expected at least one")


def require_truth(
    dataset: DataSet,
    learn: bool = True,
    measure: bool = True,
    complain: Callable[[UserError], None] = refuse,
) -> None:
    """Raise UserError before a run begins if no image has what it could learn from, or be measured
    on. Segments of crowd do not count: they are neither learned nor found."""

    def require(images, indices, what: str, use: str, remedy: str) -> None:
        if not isinstance(images, PanopticFolder) or objects(images, indices).any():
            return
        why = f"none of the {len(indices)} {what} images has a segment (crowd does not count)"
        if not len(indices):
            why = f"no image is {what}" if images.annotated else "no image is annotated"
        text = f"{images.annotations}: {why}, so nothing can be {use}; annotate some{remedy}"
        complain(UserError(text, "nothing"))

    train, val = dataset.train, dataset.val
    if learn:
        require(train, dataset.labeled, "labelled", "learned", "")
    if measure:
        require(val, range(len(val)), "validation", "measured", ", or train with --no-eval")


def objects(images: PanopticFolder, indices) -> np.ndarray:
    """(n,) number of segments that are no crowd, of each of n annotated images."""
    before = np.append(0, np.cumsum(images.segments[:, 3] == 0))[images.starts]
    return np.diff(before)[np.asarray(indices, np.int64)]


def out_of_reach(dataset: DataSet, cfg: Config) -> list[str]:
    """How many objects cannot be found because their image has more segments than the model has
    queries: a line each set, or none. Windows share them, as if they were evenly spread."""
    lines = []
    for images, indices, what, counts in _counted(dataset, cfg):
        if cfg.window and cfg.magnification:
            counts = _in_a_window(images, indices, counts, cfg)
        crowded = counts[counts > cfg.num_queries]
        if len(crowded):
            lines.append(
                f"{len(crowded):,} of {len(counts):,} {what} images have more than "
                f"{cfg.num_queries} segments (up to {crowded.max():,}): "
                f"{(crowded - cfg.num_queries).sum():,} of {counts.sum():,} objects cannot be "
                "found; raise --num-queries"
            )
    return lines


def _in_a_window(images: PanopticFolder, indices, counts: np.ndarray, cfg: Config) -> np.ndarray:
    """Segments of images -> of a window of them; those of an image that is no problem as a whole
    stay."""
    side, counts = cfg.window / cfg.magnification, counts.copy()
    for k in np.flatnonzero(counts > cfg.num_queries):
        with contextlib.suppress(UserError):  # who reads the image will say so
            width, height = image_header(images.path(indices[k]))[0]
            counts[k] = round(counts[k] * min(1, side / width) * min(1, side / height))
    return counts


def limits(dataset: DataSet, cfg: Config) -> list[str]:
    """Why full PQ is out of reach, whatever is learned: `out_of_reach`, and several segments of one
    stuff class, of which a model gives one."""
    lines = out_of_reach(dataset, cfg)
    for images, indices, what, counts in _counted(dataset, cfg):
        counted = set(indices)
        repeated = [row for row in repeated_stuff(images) if row[0] in counted]
        if repeated:
            i, k, count = repeated[0]
            lines.append(
                f"{len({row[0] for row in repeated}):,} of {len(counts):,} {what} images have "
                f"several segments of one stuff class, as {images.name(i)} {count} of "
                f"{dataset.taxonomy.short_names[k]}, where a model gives one: join them, or call "
                "the class a thing"
            )
    return lines


def _counted(dataset: DataSet, cfg: Config) -> list[tuple[PanopticFolder, Any, str, np.ndarray]]:
    """The sets whose index can be counted, with the indices that count, a word, and the segments
    of their images (semantic labels are one segment a class, and never many)."""
    parts = [(dataset.val, range(len(dataset.val)), "validation")]
    if cfg.labels == "panoptic":
        parts.insert(0, (dataset.train, dataset.labeled, "labelled"))
    return [
        (images, indices, what, objects(images, indices))
        for images, indices, what in parts
        if isinstance(images, PanopticFolder)
    ]


def repeated_stuff(images: PanopticFolder) -> list[tuple[int, int, int]]:
    """(image, class, number of segments) where one image has several of a stuff class, which COCO
    panoptic format does not know. Crowd does not count."""
    if all(images.taxonomy.things):
        return []
    owner = np.repeat(np.arange(images.annotated), np.diff(images.starts))
    classes, crowd = images.segments[:, 1], images.segments[:, 3]
    stuff = ~np.array(images.taxonomy.things)[classes] & (crowd == 0)
    pairs = np.stack([owner[stuff], classes[stuff]], -1)
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    return [(*pair, n) for pair, n in zip(pairs.tolist(), counts.tolist()) if n > 1]


def require_files(images, indices, what: str, maps: bool = True, classes: bool = False) -> None:
    """Raise UserError before a run begins if images that it will need are not there, or their
    panoptic maps, or (if the data set has its own) their class maps."""
    if not isinstance(images, PanopticFolder | ClassMaps):
        return
    listed: dict[Path, set[str]] = {}

    def there(path: Path) -> bool:
        if path.parent not in listed:
            listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        return path.name in listed[path.parent]

    kinds = {"image": [images.folder / images.name(i) for i in indices]}
    if maps and isinstance(images, ClassMaps):
        kinds["class map"] = [images.map_file(i) for i in indices]
    elif maps and images.maps is not None:
        kinds["panoptic map"] = [images.maps / str(images.files[i]) for i in indices]
    if classes and getattr(images, "semantic", None) is not None:
        kinds["class map"] = [images.class_file(i) for i in indices]
    for kind, paths in kinds.items():
        absent = [path for path in paths if not there(path)]
        if absent:
            raise UserError(
                f"{absent[0]}: no such file; {len(absent)} of {len(indices)} {what} {kind}s are "
                "listed but absent: complete the download, or take them from the list"
            )
