"""The miniature world as a data set: a scene is made when it is first asked for, and kept in memory
for all stages of a process."""

import functools

import numpy as np
from PIL import Image

from ground import identity
from ground.errors import UserError
from mini import microcosm
from readers.ground_truth import DataSet, Taxonomy, Truth
from readers.sixteen_bit import WHITE

MINI_TRAIN, MINI_DEV, MINI_VAL = 288, 64, 200  # images
# Of `microcosm.CLASSES`, as what they are: red tomatoes, blue water. --palette safe has those that
# people with colour blindness can tell apart.
COLOURS = (
    (215, 40, 40),
    (100, 165, 245),
    (255, 225, 0),
    (255, 160, 190),
    (125, 85, 195),
    (135, 225, 70),
    (190, 115, 85),
    (220, 60, 175),
    (245, 130, 45),
    (85, 60, 105),
    (0, 185, 160),
    (150, 150, 0),
    (50, 120, 45),
    (20, 75, 165),
    (140, 45, 40),
    (225, 205, 150),
    (150, 205, 250),
    (110, 80, 45),
    (150, 155, 160),
    (235, 240, 250),
)


class MiniImages:
    """Scenes of one collection of the miniature world."""

    white, stretch = WHITE, False  # they have 8 bits, and are drawn with one exposure

    def __init__(self, collection: str, count: int):
        self.collection, self.count, self.order = collection, count, None

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{self.collection}_{i:05d}.png"

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(_scene(self.collection, i).image)

    def truth(self, i: int) -> Truth:
        s = _scene(self.collection, i)
        areas = np.bincount(s.segment_map.ravel(), minlength=len(s.labels) + 1)[1:]
        labels = s.labels if self.order is None else self.order[s.labels]
        return Truth(s.segment_map, labels, areas, np.zeros(len(s.labels), bool))

    def follow(self, order: np.ndarray) -> None:
        """Class k becomes class order[k]."""
        self.order = order

    def digest(self, i: int) -> str:
        """SHA-256 of the pixels: there is no file."""
        return identity.of_bytes(_scene(self.collection, i).image.tobytes())

    def fingerprint(self, indices=None) -> str:
        """Of a collection and a number of images: these scenes are what their names say."""
        indices = range(self.count) if indices is None else indices
        return identity.of_text("mini", self.collection, *map(str, sorted(indices)))

    def segments_text(self, i: int, names: list[str]) -> str:
        return ""

    def truth_digest(self, i: int) -> str:
        return ""


_scene = functools.cache(microcosm.scene)


def load_mini(split: str, evaluate_on: str = "val") -> DataSet:
    """The miniature world: 288 training images of which the first N are labelled (split 16, 32:
    nested), dev 64, val 200."""
    if not split.isdecimal() or not 0 < int(split) < MINI_TRAIN:
        raise UserError(
            f"unknown split '{split}' of data set mini; available: 16, 32, or any number below "
            f"{MINI_TRAIN}"
        )
    if evaluate_on not in ("dev", "val"):
        raise UserError(
            f"unknown evaluation set '{evaluate_on}' of data set mini; available: dev, val"
        )
    train = MiniImages("train", MINI_TRAIN)
    val = MiniImages(evaluate_on, MINI_VAL if evaluate_on == "val" else MINI_DEV)
    labeled = range(int(split))
    unlabeled = range(int(split), MINI_TRAIN)
    return DataSet("mini", mini_taxonomy(), train, val, list(labeled), list(unlabeled))


def mini_taxonomy() -> Taxonomy:
    count = len(microcosm.CLASSES)
    things = tuple(k < len(microcosm.THINGS) for k in range(count))
    return Taxonomy(microcosm.CLASSES, things, tuple(range(1, count + 1)), COLOURS)
