"""Instances as ground truth: the things of a data set alone, which may overlap.

Axes: N instances, H W pixels, K classes.
"""

from dataclasses import replace

import numpy as np

from ground.errors import UserError
from readers.ground_truth import DataSet, Truth
from readers.panoptic import PanopticFolder


def things_only(dataset: DataSet) -> DataSet:
    """The data set with its things as classes; stuff becomes void. One that has only things stays
    as it is. Raises: UserError if it has none.
    """
    things = np.array(dataset.taxonomy.things)
    if not things.any():
        raise UserError(
            f"--labels instances: {dataset.name} has no class that is a thing, so there is no "
            "instance to learn; expected a data set with things, or --labels panoptic"
        )
    if things.all():
        return dataset
    places = np.where(things, np.cumsum(things) - 1, -1)
    taxonomy = dataset.taxonomy.select(np.flatnonzero(things))
    train, val = (
        ThingsFolder(images, places)
        if isinstance(images, PanopticFolder)
        else Things(images, places)
        for images in (dataset.train, dataset.val)
    )
    return replace(dataset, taxonomy=taxonomy, train=train, val=val)


class Things:
    """Images whose ground truth is their things alone. images: `mini.scenes.MiniImages`, or what
    has its methods, all of which this has, too.

    places: (K,) the class of a thing among the things, -1 of stuff.
    """

    def __init__(self, images, places: np.ndarray):
        self.images, self.places = images, places

    def __len__(self) -> int:
        return len(self.images)

    def __getattr__(self, name: str):
        if name == "images":  # while a loader process unpacks this
            raise AttributeError(name)
        return getattr(self.images, name)

    def truth(self, i: int) -> Truth:
        return self.images.truth(i).only(self.places)

    def follow(self, order: np.ndarray) -> None:
        """Class k becomes class order[k]."""
        self.places = followed(self.places, order)


class ThingsFolder(PanopticFolder):
    """The same of a folder in COCO panoptic format; its index has the things alone, too."""

    def __init__(self, images: PanopticFolder, places: np.ndarray):
        self.__dict__.update(vars(images))
        self.whole, self.places, self.semantic = images, places, None
        classes = places[images.segments[:, 1]]
        kept = np.append(0, np.cumsum(classes >= 0))
        self.segments = images.segments[classes >= 0].copy()
        self.segments[:, 1] = classes[classes >= 0]
        self.starts = kept[images.starts]
        self.taxonomy = images.taxonomy.select(np.flatnonzero(places >= 0))

    def truth(self, i: int, complain=None) -> Truth:
        faults = () if complain is None else (complain,)
        return self.whole.truth(i, *faults).only(self.places)

    def follow(self, order: np.ndarray) -> None:
        super().follow(order)
        self.places = followed(self.places, order)


def followed(places: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.where(places >= 0, order[places], -1)
