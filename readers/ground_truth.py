"""Classes, ground truth of one image, and data sets: what the method sees of any source of data."""

from dataclasses import dataclass, field, replace
from typing import Any, Callable

import numpy as np

from ground import identity
from ground.colours import palette
from ground.errors import UserError
from readers.pictures import brief

READ = 5000  # labelled images, at most, that are read whole to know them again
IGNORE = -1  # semantic ground truth: no class
# What people call pixels of no class, in lists of classes.
VOID_NAMES = frozenset("__ignore__ void unlabeled unlabelled ignore".split())


@dataclass(frozen=True)
class Taxonomy:
    """K classes. names: each with its synonyms, separated by commas.   things: flags.
    ids: category ids of the data set.

    palette: RGB, 0 to 255, where the data set has colours of its own.   groups: of similar classes
    (COCO's supercategories), where it has some; no part of what a run stores.
    """

    names: tuple[str, ...]
    things: tuple[bool, ...]
    ids: tuple[int, ...]
    palette: tuple[tuple[int, int, int], ...] | None = None
    groups: tuple[str, ...] | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_config(cls, stored, source) -> "Taxonomy":
        """The inverse of `to_config`, for what a file holds. Raises: UserError if that is no
        taxonomy."""
        try:
            columns = [tuple(stored[key]) for key in ("names", "things", "ids")]
            colours = stored["palette"]
            colours = colours and tuple(tuple(bytes([r, g, b])) for r, g, b in colours)
            kinds = zip(columns, (str, bool, int))
            if any(type(value) is not kind for column, kind in kinds for value in column):
                raise ValueError
            lengths = {len(column) for column in (*columns, colours or columns[0])}
            if len(lengths) > 1 or 0 in lengths:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{source}: its taxonomy is {brief(stored)}, expected names, things, ids and "
                "palette, one of each for every class"
            ) from None
        return cls(*columns, colours)

    def to_config(self) -> dict:
        """As plain lists: a run stores its classes, so that it can be used where the data set is
        not."""
        return {
            "names": [*self.names],
            "things": [*self.things],
            "ids": [*self.ids],
            "palette": self.palette and [[*c] for c in self.palette],
        }

    def order_in(self, other: "Taxonomy", here: str, there: str) -> np.ndarray:
        """(K,) the place in `other` of each class of this taxonomy: joined by first name, never by
        place.

        here, there: what has them, for messages.   Raises: UserError if the sets of names differ,
        or a class is a thing in one and stuff in the other.
        """
        own, theirs = self.short_names, other.short_names
        only = [
            f"only in {what}: {identity.listed([name for name in a if name not in b])}"
            for what, a, b in ((there, theirs, own), (here, own, theirs))
            if set(a) - set(b)
        ]
        if only:
            raise UserError(
                f"{here}: its classes are not those of {there}; {'; '.join(only)}; choose the data "
                "set that belongs to it"
            )
        order = np.array([theirs.index(name) for name in own])
        kinds = zip(own, self.things, order)
        differs = {name: thing for name, thing, k in kinds if thing != other.things[k]}
        if differs:
            first = next(iter(differs.values()))
            raise UserError(
                f"{here}: {identity.listed([*differs])}: {'things' if first else 'stuff'} here, "
                f"but not in {there}; expected the same isthing"
            )
        return order

    def select(self, places: np.ndarray) -> "Taxonomy":
        """The classes at these places, in this order."""
        columns = (self.names, self.things, self.ids, self.palette, self.groups)
        return Taxonomy(*(c and tuple(c[k] for k in places) for c in columns))

    def categories(self) -> list[dict]:
        """As in COCO panoptic format, the inverse of `read_taxonomy`."""
        return [
            {"id": i, "name": name, "isthing": int(thing), "color": [*colour]}
            for i, name, thing, colour in zip(self.ids, self.names, self.things, self.colours)
        ]

    @property
    def synonyms(self) -> list[list[str]]:
        return [[name.strip() for name in names.split(",")] for names in self.names]

    @property
    def short_names(self) -> list[str]:
        return [names[0] for names in self.synonyms]

    @property
    def colours(self) -> list[tuple[int, int, int]]:
        """One RGB colour a class: the data set's own, if it has one for each, or else those of
        `ground.colours.palette`."""
        return list(self.palette or palette(len(self)))


@dataclass
class Truth:
    """Ground truth of one image. segment_map: (H, W) int32, 0 = void, k = k-th segment.

    labels, areas (pixels), crowd: (N,).   classes: reads the (H, W) semantic ground truth, where
    the data set has one of its own.   masks: (N, H, W) bool, of instances that overlap; None: those
    of the segment map, which is a partition.
    """

    segment_map: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    classes: Callable[[], np.ndarray] | None = None
    masks: np.ndarray | None = None

    def mask(self, k: int) -> np.ndarray:
        """(H, W) bool, of instance k from 0, whichever way they are kept."""
        return self.segment_map == k + 1 if self.masks is None else self.masks[k]

    def only(self, places: np.ndarray) -> "Truth":
        """Without the segments of some classes, whose pixels become void. places: (K,) the new
        place of each class, -1 = it goes.
        """
        labels = places[self.labels]
        keep = labels >= 0
        lut = np.append(0, np.cumsum(keep) * keep).astype(np.int32)
        columns = labels[keep], self.areas[keep], self.crowd[keep]
        masks = None if self.masks is None else self.masks[keep]
        return Truth(lut[self.segment_map], *columns, masks=masks)

    def semantic(self) -> np.ndarray:
        """(H, W) class index, IGNORE where void."""
        if self.classes is not None:
            return self.classes()
        return np.append(IGNORE, self.labels)[self.segment_map]

    def by_class(self) -> "Truth":
        """The semantic ground truth as a partition: one segment a class."""
        classes = self.semantic() - IGNORE  # 0 = void, class + 1
        areas = np.bincount(classes.ravel())
        areas[0] = 0
        labels, lut = np.flatnonzero(areas), np.zeros(len(areas), np.int32)
        lut[labels] = np.arange(1, len(labels) + 1)
        return Truth(lut[classes], labels + IGNORE, areas[labels], np.zeros(len(labels), bool))


@dataclass
class DataSet:
    """What a stage sees: training images with labelled and unlabelled indices, and validation
    images."""

    name: str
    taxonomy: Taxonomy
    train: Any  # `readers.panoptic.PanopticFolder`, or what has its methods
    val: Any
    labeled: list[int]
    unlabeled: list[int]

    def follow(self, taxonomy: Taxonomy, source) -> None:
        """Take the order and the names of the classes of a run, by name; ids and colours stay
        those of the data set.

        source: the run, for messages.   Raises: UserError if it has other classes
        (`Taxonomy.order_in`).
        """
        order = self.taxonomy.order_in(taxonomy, self.name, str(source))
        mine = self.taxonomy.select(np.argsort(order))
        palette = mine.palette or taxonomy.palette
        self.taxonomy = replace(mine, names=taxonomy.names, palette=palette)
        self.train.follow(order)
        self.val.follow(order)

    def truth_fingerprint(self, unlabeled: bool = True) -> str:
        """Of what training is told: which images are labelled, their ground truth, and which
        images are unlabelled (if they are looked at)."""
        names, train = self.taxonomy.short_names, self.train
        parts = [f"labelled {train.name(i)} {train.segments_text(i, names)}" for i in self.labeled]
        parts += [f"unlabelled {train.name(i)}" for i in self.unlabeled if unlabeled]
        sampled = identity.sample(sorted(self.labeled, key=train.name))
        return identity.of_text(*sorted(parts), *(train.truth_digest(i) for i in sampled))

    def labeled_fingerprint(self) -> str:
        """Of the contents of all labelled images and their ground truth, of which the other
        fingerprints only take a sample; empty if they are more than READ."""
        if len(self.labeled) > READ:
            return ""
        train, those = self.train, sorted(self.labeled, key=self.train.name)
        return identity.of_text(*(f"{train.digest(i)} {train.truth_digest(i)}" for i in those))

    def measure_fingerprint(self) -> str:
        """Of what runs are measured by: the validation images and their ground truth."""
        names, val = self.taxonomy.short_names, self.val
        parts = [f"{val.name(i)} {val.segments_text(i, names)}" for i in range(len(val))]
        sampled = identity.sample(sorted(range(len(val)), key=val.name))
        truth = (val.truth_digest(i) for i in sampled)
        return identity.of_text(val.fingerprint(), *sorted(parts), *truth)
