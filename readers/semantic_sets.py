"""PASCAL VOC 2012 and Cityscapes with class maps, as downloaded; partitions are U2PL's.

VOC: JPEGImages, and SegmentationClassAug (10 582 training images with the SBD's) or, for the
classic partitions, SegmentationClass: PNG with palette, whose indices are the classes; 255 is none.
Cityscapes: leftImg8bit and gtFine, whose `labelIds` become the 19 classes that are evaluated.
"""

from pathlib import Path
from typing import Callable

import numpy as np

from ground.errors import refuse
from readers.class_maps import NONE, UNKNOWN, ClassMaps, Row
from readers.downloads import require, voc_maps
from readers.ground_truth import IGNORE, DataSet, Taxonomy
from readers.splits import lines, read_split

VOC_NAMES = """background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining
table, dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor"""
CITYSCAPES = """7:road 8:sidewalk 11:building 12:wall 13:fence 17:pole 19:traffic_light
20:traffic_sign 21:vegetation 22:terrain 23:sky 24:person 25:rider 26:car 27:truck 28:bus 31:train
32:motorcycle 33:bicycle"""
LAST_LABEL = 33  # of Cityscapes: ids up to it that are no class are none, as is -1, stored as 255


def load(name: str, root: Path, split: str, seed: int = 0, complain: Callable = refuse) -> DataSet:
    """A data set whose lists `--stage prepare` has fetched. split: as in `readers.papers.load`."""
    base = require(name, root)
    official = base / "dearli" / name
    classes = voc_classes() if name == "voc" else cityscapes_classes()
    folders = (base / "JPEGImages", voc_maps(base)) if name == "voc" else (base, base)
    row = voc_row if name == "voc" else cityscapes_row
    whole = official / ("1464" if name == "voc" else "1488")
    train = [*lines(whole / "labeled.txt"), *lines(whole / "unlabeled.txt")]
    sets = []
    for names in (train, lines(official / "val.txt")):
        rows = [row(line) for line in names]
        there = {path.name for path in folders[1].glob("*.png")} if name == "voc" else None
        if there is not None:  # SegmentationClass alone has 1464 of them
            rows = [r if r.labels in there else Row(r.image, None) for r in rows]
        sets.append(ClassMaps(*folders, rows, classes[1], classes[0]))
    labeled, unlabeled = read_split(base, split, sets[0], seed, complain, official)
    sets[1].names = sets[1].names[: sets[1].annotated]
    return DataSet(name, classes[0], *sets, labeled, unlabeled)


def voc_row(line: str) -> Row:
    return Row(f"{line}.jpg", f"{line}.png")


def cityscapes_row(line: str) -> Row:
    """leftImg8bit/train/CITY/..._leftImg8bit.png and its map below gtFine."""
    labels = line.replace("leftImg8bit/", "gtFine/", 1)
    return Row(line, labels.replace("_leftImg8bit.png", "_gtFine_labelIds.png"))


def voc_classes() -> tuple[Taxonomy, np.ndarray]:
    names = tuple(" ".join(name.split()) for name in VOC_NAMES.split(","))
    values = np.full(257, UNKNOWN, np.int32)
    values[NONE] = IGNORE
    values[: len(names)] = np.arange(len(names))
    return Taxonomy(names, (False,) * len(names), tuple(range(len(names)))), values


def cityscapes_classes() -> tuple[Taxonomy, np.ndarray]:
    ids, names = zip(*(word.split(":") for word in CITYSCAPES.split()))
    ids = tuple(map(int, ids))
    values = np.full(257, UNKNOWN, np.int32)
    values[[*range(LAST_LABEL + 1), NONE]] = IGNORE
    values[list(ids)] = np.arange(len(ids))
    names = tuple(name.replace("_", " ") for name in names)
    return Taxonomy(names, (False,) * len(names), ids), values
