"""."""

from dataclasses import dataclass
from typing import Any, Callable

import numpy as np

from ground import identity
from ground.colours import palette
from ground.errors import UserError
from readers.pictures import brief

IGNORE = -1  # semantic ground truth: no class


# ------------------------------------------------------------------------------------- taxonomies and data sets


@dataclass(frozen=True)
class Taxonomy:
    """K classes. names: each with its synonyms, separated by commas.   things: flags.   ids: category ids of the data set.

    palette: RGB, 0 to 255, where the data set has colours of its own.
    """

    names: tuple[str, ...]
    things: tuple[bool, ...]
    ids: tuple[int, ...]
    palette: tuple[tuple[int, int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_config(cls, stored, source) -> "Taxonomy":
        """The inverse of `to_config`, for what a file holds. Raises: UserError if that is no taxonomy."""
        try:
            columns = [tuple(stored[key]) for key in ("names", "things", "ids")]
            palette = stored["palette"] and tuple(
                (*bytes([r, g, b]),) for r, g, b in stored["palette"]
            )
            if any(
                type(value) is not kind
                for column, kind in zip(columns, (str, bool, int))
                for value in column
            ) or (
                len({len(column) for column in (*columns, palette or columns[0])}) > 1
                or not columns[0]
            ):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{source}: its taxonomy is {brief(stored)}, expected names, things, ids and palette, one of each for every class"
            ) from None
        return cls(*columns, palette)

    def to_config(self) -> dict:
        """As plain lists: a run stores its classes, so that it can be used where the data set is not."""
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
            (f"only in {what}: {identity.listed([name for name in a if name not in b])}")
            for what, a, b in ((there, theirs, own), (here, own, theirs))
            if set(a) - set(b)
        ]
        if only:
            raise UserError(
                f"{here}: its classes are not those of {there}; {'; '.join(only)}; choose the data "
                f"set that belongs to it"
            )
        order = np.array([theirs.index(name) for name in own])
        differs = [
            name for name, thing, k in zip(own, self.things, order) if thing != other.things[k]
        ]
        if differs:
            raise UserError(
                f"{here}: {identity.listed(differs)}: "
                f"{'things' if self.things[own.index(differs[0])] else 'stuff'} here, but not in "
                f"{there}; "
                f"expected the same isthing"
            )
        return order

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
        """One RGB colour a class: the data set's own, if it has one for each, or else those of `colours.palette`."""
        return list(self.palette or palette(len(self)))


@dataclass
class Truth:
    """Ground truth of one image: segment_map (H, W) int32, 0 = void, k = k-th segment; labels, areas, crowd (N,)."""

    segment_map: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    classes: Callable[[], np.ndarray] | None = (
        None  # reads the (H, W) semantic ground truth, where the data set has one of its own
    )

    def semantic(self) -> np.ndarray:
        """(H, W) class index, IGNORE where void."""
        return (
            np.append(IGNORE, self.labels)[self.segment_map]
            if self.classes is None
            else self.classes()
        )

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
    """What a stage sees: training images with labelled and unlabelled indices, and validation images."""

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
        place = np.argsort(order)  # of class k of the run in the data set
        mine = self.taxonomy
        colours = mine.palette and tuple(mine.palette[k] for k in place)
        self.taxonomy = Taxonomy(
            taxonomy.names,
            taxonomy.things,
            tuple(mine.ids[k] for k in place),
            colours or taxonomy.palette,
        )
        self.train.follow(order)
        self.val.follow(order)

    def truth_fingerprint(self, unlabeled: bool = True) -> str:
        """Of what training is told: which images are labelled, their ground truth, and which
        images are unlabelled (if they are looked at)."""
        names, train = self.taxonomy.short_names, self.train
        parts = [f"labelled {train.name(i)} {train.segments_text(i, names)}" for i in self.labeled]
        parts += [f"unlabelled {train.name(i)}" for i in self.unlabeled if unlabeled]
        return identity.of_text(
            *sorted(parts),
            *(train.truth_digest(i) for i in identity.sample(sorted(self.labeled, key=train.name))),
        )
