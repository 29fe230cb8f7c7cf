"""How wide the objects of a data set are, in pixels: what scale they are to be seen at."""

import numpy as np

from config import Config
from readers.ground_truth import DataSet
from readers.panoptic import PanopticFolder
from readers.pictures import image_header

# Percentile of the widths that counts. Small objects are what is missed, and a median swings with
# the images that happen to be labelled: on nuclei it is 14 pixels of 16 images and 21 of 64, where
# the lower quartile is 11 and 12.
SMALL = 25


def widths(dataset: DataSet) -> np.ndarray:
    """(n,) pixels: the equivalent diameters (of discs of their areas) of all labelled things. Crowd
    does not count; areas are those that the JSON states.
    """
    things, areas = np.array(dataset.taxonomy.things), [np.zeros(0)]
    for i in dataset.labeled:
        labels, area, crowd = _segments(dataset.train, i)
        areas.append(area[things[labels] & (crowd == 0) & (area > 0)])
    return np.sqrt(4 / np.pi * np.concatenate(areas))


def _segments(images, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, areas and crowd of an image; of a folder without opening its map."""
    if isinstance(images, PanopticFolder):
        return tuple(images.segments_of(i).T[1:])
    truth = images.truth(i)
    return truth.labels, truth.areas, truth.crowd


def _size(images, i: int) -> tuple[int, int]:
    """(W, H)"""
    if isinstance(images, PanopticFolder):
        return image_header(images.path(i))[0]
    return images.image(i).size


def object_width(dataset: DataSet, cfg: Config) -> float:
    """The `object_width` of a configuration, measured on the labelled images: the lower quartile of
    the things, but no more than lets the median image fill a window.

    Without things, where stuff wants to be seen in its surroundings, it is what shows the median
    image with the short side `test_size`. 0 without labelled images.
    """
    if not dataset.labeled:
        return 0.0
    sides = [_size(dataset.train, i) for i in dataset.labeled]
    found = widths(dataset)
    if not len(found):
        short = float(np.median([min(size) for size in sides]))
        return round(cfg.seen_width * short / cfg.test_size, 2)
    most = cfg.seen_width * float(np.median([max(size) for size in sides])) / max(cfg.window, 1)
    width = float(np.percentile(found, SMALL))
    return round(min(width, most) if cfg.window else width, 2)


def scale_text(dataset: DataSet, cfg: Config) -> str:
    """How wide the labelled objects are, and how they will be shown, in a line.

    cfg: with its `object_width`.
    """
    found = widths(dataset)
    shown = f"images are shown {cfg.magnification:.2g} times as large"
    if cfg.window:
        side = round(cfg.window / cfg.magnification)
        shown += f", in windows of {side} pixels ({cfg.window} as shown)"
    if not len(found):
        return f"no labelled object is a thing; {shown}"
    small, middle, high = np.percentile(found, (SMALL, 50, 90))
    return (
        f"labelled objects are {middle:.0f} pixels wide (the median; a quarter below {small:.0f}, "
        f"a tenth above {high:.0f}), and those of {small:.0f} are seen "
        f"{small * cfg.magnification:.0f} wide: {shown}; "
        f"--object-width and --seen-width change it"
    )
