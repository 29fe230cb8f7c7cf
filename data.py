"""Images, taxonomies and splits; weak and strong views; batches.

Every random choice is drawn from (seed, step, slot), so a batch does not depend on workers, on what came before it or on
where a run was resumed.
Differs from the paper: short sides are 0.5 to 2.0 of the crop (official code; the paper says 0.1 to 2.0), and labelled
images also get the SSD colour augmentation (official code only).
Axes: H W pixels, N segments, B images.    Sources: Mask2Former (arXiv:2112.01527); SSD (arXiv:1512.02325); CutMix (arXiv:1905.04899).
Try: `python dearli.py --stage sup --steps 250 --scale-min 1 --scale-max 1 --out runs/try-scale`: training images of one size only.
"""

import collections
import contextlib
import functools
import json
import os
import random
import re
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import identity
import ranks
from colours import palette
from config import Config, UserError, refuse
from matcher import Target

PAD_VALUE = 128  # grey levels; images are padded right and bottom to the crop
IGNORE = -1  # semantic ground truth: no class
CUTMIX_AREA, CUTMIX_ASPECT = (
    (0.02, 0.4),
    (0.3, 1 / 0.3),
)  # share of the crop; height / width, uniform
CUTMIX_TRIES = 1000  # before the boxes that fit are listed; in an ordinary view a few will do
GRACE = 10  # seconds that a loader process outlives a SIGTERM
MAX_LONG_SIDE = 4  # long side of a training view, in crops (2560 of 640)
MAX_PIXELS = (
    89_000_000  # of an image or a map; Pillow warns from here on and refuses only twice as much
)
# What Pillow may decode: among its other formats are some that run programs (EPS) or follow links.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
DEEP_FORMATS = ("PNG", "TIFF", "PPM", "JPEG2000")  # those of them that can have 16 bits a channel
WHITE = 65535  # of 16 bits; becomes 255 where no other white point is known
MEASURED = 1000  # files, at most, from which a white point is measured
LITTLE = (
    16  # grey levels of 256: an image whose values differ by less uses less than 1/16 of its range
)
MAX_NAME = 255  # bytes of a file name, characters of a path are at most 4 times as many
MAX_ID = 1 << 24  # segment ids have 24 bits: R + 256 G + 65536 B
MAX_AREA = 1 << 31  # pixels
TURN = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        2,
    )
)  # by EXIF orientation, 1 = none
warnings.simplefilter(
    "ignore", Image.DecompressionBombWarning
)  # MAX_PIXELS refuses what it warns of


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
    train: "MiniImages | PanopticFolder"
    val: "MiniImages | PanopticFolder"
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


class MiniImages:
    """Scenes of one collection of the miniature world, each drawn when it is first asked for and kept in memory for all stages of a process."""

    white = WHITE  # they have 8 bits

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


@functools.lru_cache(maxsize=None)
def _scene(collection: str, i: int):
    import microcosm

    return microcosm.scene(collection, i)


class PanopticFolder:
    """Images and ground truth in COCO panoptic format: a JSON, a folder of images, a folder of RGB-coded PNG maps.

    The index is a few flat arrays: loader processes share them, and reading never makes them grow.
    semantic: folder of class maps that mIoU is measured against, where the data set has its own: uint8, class `semantic_first` + k
        for class k, anything else is no class (ADE20K counts from 1, COCO-Objects from 0).
    hidden: segments may lie wholly below others, and stated areas count what is hidden (ADE20K's rule); else a segment without a pixel is a fault.
    complain: called with every fault that allows to read on; what is at fault is left out.
    Images without annotation come after the `annotated` first ones; they serve as unlabelled
    images. A validation set has none of them (`unused`).
    An image is turned as its EXIF block says, as detectron2 does; maps have none, and `_upright` turns them along where it must.
    white: of the images, as in `open_image`; `see` settles it.
    Raises: UserError where a file or a key is missing, a file is a link out of the data root, or map, JSON and image disagree.
    """

    white = WHITE

    def __init__(
        self,
        annotations: Path,
        images: Path,
        maps: Path,
        taxonomy: Taxonomy,
        semantic: Path | None = None,
        semantic_first: int = 1,
        validation: bool = False,
        hidden: bool = False,
        complain: Callable[[UserError], None] = refuse,
    ):
        self.annotations, self.images, self.maps, self.taxonomy = (
            annotations,
            images,
            maps,
            taxonomy,
        )
        self.semantic, self.semantic_first, self.hidden, self.order = (
            semantic,
            semantic_first,
            hidden,
            None,
        )
        inside = (
            os.path.commonpath([annotations, images, maps]),
            images,
            maps,
            *([semantic] if semantic else []),
        )  # a folder itself may be a link
        self.inside = tuple(os.path.join(os.path.realpath(folder), "") for folder in inside)
        content = read_json(annotations)
        index = {category: k for k, category in enumerate(taxonomy.ids) if category >= 0}

        def wrong(kind, text):
            complain(UserError(f"{annotations}: {text}", kind))

        files = _image_names(content["images"], wrong)
        listed = {name for name in files.values() if name is not None}
        names, maps_of, counts, rows, self.refused, self.without_crowd = [], [], [], [], set(), 0
        for place, a in enumerate(content["annotations"]):
            try:
                key = a["image_id"]
                if key not in files:
                    wrong(
                        "malformed",
                        f"no entry for {brief(key)}, or two annotations: annotations[{place}] names it as its image_id, expected an image of "
                        f"images that no other annotation names",
                    )
                    continue
                file, segments = a["file_name"], list(a["segments_info"])
                fault = name_fault(file)
            except (KeyError, TypeError):
                wrong(
                    "malformed",
                    f"annotations[{place}] is {brief(a)}, expected an object with image_id, file_name and segments_info",
                )
                continue
            name = files.pop(key)
            if fault:
                wrong("name", f"map of image {brief(key)}: file_name {brief(file)} {fault}")
            if fault or name is None:
                continue
            sound, without = _sound_segments(segments, index, name, wrong)
            if len(sound) < len(segments):
                self.refused.add(len(names))
            self.without_crowd += without
            rows += sound
            names.append(name)
            maps_of.append(file)
            counts.append(len(sound))
        self.annotated = len(names)
        names += [] if validation else [name for name in files.values() if name is not None]
        self.unused = sorted(listed.difference(names))  # few or none
        self.names, self.files = np.array(names, str), np.array(maps_of, str)
        self.segments = np.array(rows, np.int64).reshape(-1, 4)  # id, class, area, crowd
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return str(self.names[i])

    def path(self, i: int) -> Path:
        return self.file(self.images, self.name(i))

    def image(self, i: int) -> Image.Image:
        return open_image(self.path(i), white=self.white)

    def follow(self, order: np.ndarray) -> None:
        """Class k becomes class order[k]."""
        self.segments[:, 1] = order[self.segments[:, 1]]
        self.order, mine, place = order, self.taxonomy, np.argsort(order)
        columns = (mine.names, mine.things, mine.ids, mine.palette)
        self.taxonomy = Taxonomy(*(c and tuple(c[k] for k in place) for c in columns))

    def digest(self, i: int) -> str:
        """As `image_digest`."""
        return image_digest(self.path(i), self.white)

    def fingerprint(self, indices=None) -> str:
        """Of all training images, or of some (`identity.of_files`); the folder that they are in
        does not matter."""
        return _fingerprint(self, self.images, range(len(self)) if indices is None else indices)

    def segments_text(self, i: int, names: list[str]) -> str:
        """The segments of an image, as a line: id, class, crowd."""
        rows = sorted(self.segments[self.starts[i] : self.starts[i + 1]].tolist())
        return " ".join(f"{number} {names[k]} {crowd}" for number, k, _, crowd in rows)

    def truth_digest(self, i: int) -> str:
        """SHA-256 of the file of its panoptic map."""
        return file_digest(self.file(self.maps, str(self.files[i])))

    def file(self, folder: Path, name: str) -> Path:
        """folder/name, which may be a link to another place in the data root, but not out of it."""
        path = folder / name
        real = os.path.realpath(path)
        if not real.startswith(self.inside):
            raise UserError(
                f"{path}: is a link that leads out of the data root, to {real}; expected a file (a whole folder may be a link)",
                "name",
            )
        return path

    def truth(self, i: int, complain: Callable[[UserError], None] = refuse) -> Truth:
        path, segments = (
            self.file(self.maps, str(self.files[i])),
            self.segments[self.starts[i] : self.starts[i + 1]],
        )
        coded = self._upright(segment_ids(path), i, path)
        # Pixels come in runs of one id, so only the first of each run is looked up.
        flat = coded.ravel()
        first = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
        runs, lengths, order = (
            flat[first],
            np.diff(first, append=flat.size),
            np.argsort(segments[:, 0]),
        )
        known = np.append(segments[order, 0], MAX_ID)  # no id is so large
        place = np.searchsorted(known, runs)
        found = known[place] == runs
        for unknown in np.unique(runs[~found & (runs > 0)]):
            complain(
                UserError(
                    f"{path}: segment {unknown} has pixels but is not in segments_info",
                    "not in json",
                )
            )
        number = np.where(found, np.append(order + 1, 0)[place], 0).astype(np.int32)
        if not self.hidden:
            for empty in segments[np.bincount(number, minlength=len(segments) + 1)[1:] == 0, 0]:
                complain(
                    UserError(
                        f"{path}: segment {empty} is in segments_info but has no pixel", "no pixel"
                    )
                )
        return Truth(
            np.repeat(number, lengths).reshape(coded.shape),
            segments[:, 1],
            segments[:, 2],
            segments[:, 3].astype(bool),
            self.semantic and (lambda: self.class_map(i)),
        )

    def class_file(self, i: int) -> Path:
        return self.semantic / f"{Path(self.name(i)).stem}.png"

    def class_map(self, i: int) -> np.ndarray:
        """(H, W) class index of image i by the data set's own semantic ground truth, IGNORE where there is none."""
        path = self.file(self.semantic, self.class_file(i).name)
        stored = np.asarray(open_image(path, None))
        if stored.ndim != 2:
            raise UserError(
                f"{path}: expected a map of class numbers with one channel, got {stored.shape}",
                "unreadable",
            )
        classes = self._upright(stored, i, path).astype(np.int32) - self.semantic_first
        classes[(classes < 0) | (classes >= len(self.taxonomy))] = IGNORE
        return (
            classes
            if self.order is None
            else np.append(self.order, IGNORE)[classes].astype(np.int32)
        )

    def _upright(self, stored: np.ndarray, i: int, path: Path) -> np.ndarray:
        """A map (H, W) as image i is shown. Raises UserError if it has another size.

        Annotators see an image turned by its EXIF block, so a map of that size is taken as it is (of a square image, too). Only a map that has
        the size of the pixels as stored, and not of the image as shown, was drawn without looking at EXIF, and is turned along.
        """
        shown, turn = image_header(self.file(self.images, self.name(i)))
        if stored.shape == shown[::-1]:
            return stored
        if turn is not None and stored.shape == shown:
            return np.asarray(Image.fromarray(stored).transpose(turn))
        raise UserError(
            f"{path}: {stored.shape[1]} x {stored.shape[0]} pixels, but its image {self.name(i)} has {shown[0]} x {shown[1]}; "
            f"expected one size",
            "size",
        )


def _image_names(entries: list, wrong: Callable[[str, str], None]) -> dict:
    """File names by image id, None where a fault was found (then that is one fault, and its annotation is no second one)."""
    files, taken = {}, set()
    for place, entry in enumerate(entries):
        try:
            key, name = entry["id"], entry["file_name"]
            twice = key in files or name in taken
        except (KeyError, TypeError):
            wrong(
                "malformed",
                f"images[{place}] is {brief(entry)}, expected an object with id and file_name",
            )
            continue
        fault = "is listed twice" if twice else name_fault(name)
        if fault:
            wrong(
                "image twice" if twice else "name",
                f"image {brief(key)}: file_name {brief(name)} {fault}",
            )
            files.setdefault(key, None)
        else:
            files[key] = name
            taken.add(name)
    return files


def _sound_segments(
    segments: list, index: dict[int, int], name: str, wrong: Callable[[str, str], None]
) -> tuple[list[tuple], int]:
    """(id, class, area, crowd) of the segments of an image without a fault, and how many of them do not say whether they are crowd."""
    rows, used, without_crowd = [], set(), 0
    for s in segments:
        try:
            number, category, area, crowd = s["id"], s["category_id"], s["area"], s.get("iscrowd")
            k, twice = index.get(category), number in used
            sound = (
                _whole(number)
                and 0 < number < MAX_ID
                and _whole(area)
                and 0 <= area < MAX_AREA
                and crowd in (None, 0, 1)
            )
        except (KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            wrong(
                "malformed",
                f"segment {brief(s)} of image {name}: expected id (1 to {MAX_ID - 1}), category_id, area (pixels) and iscrowd (0 or 1)",
            )
        elif k is None:
            wrong(
                "category",
                f"segment {number} of image {name} has category {brief(category)}, which is not among the categories",
            )
        elif twice:
            wrong("segment twice", f"segment {number} of image {name} is listed twice")
        else:
            used.add(number)
            rows.append((number, k, area, crowd or 0))
            without_crowd += crowd is None
    return rows, without_crowd


class ImageFolder:
    """All pictures of a folder, without ground truth: for SAM and the warm-up (SA-1B, where masks
    lie beside them).
    """

    white = WHITE

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder of images")
        passed = collections.Counter()

        def passed_over(name):
            passed[os.path.splitext(name)[1].lower() or name] += 1

        self.names = np.array(pictures(self.folder, passed_over), str)
        passed.pop(".json", 0)  # masks beside the images
        if passed:
            print(
                f"{folder}: {passed.total()} files passed over, by their names no images: "
                + ", ".join(f"{count} x {brief(kind)}" for kind, count in passed.most_common(5))
            )
        if not len(self.names):
            raise UserError(
                f"{folder}: no images in this folder; expected files that end in "
                f"{', '.join(endings())}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return str(self.names[i])

    def path(self, i: int) -> Path:
        return self.folder / self.name(i)

    def image(self, i: int) -> Image.Image:
        return open_image(self.path(i), white=self.white)

    def digest(self, i: int) -> str:
        """As `image_digest`."""
        return image_digest(self.path(i), self.white)

    def fingerprint(self, indices=None) -> str:
        """As `PanopticFolder.fingerprint`."""
        return _fingerprint(self, self.folder, range(len(self)) if indices is None else indices)


def pictures(
    folder: Path, others: Callable[[str], object] | None = None, without: set[str] = frozenset()
) -> list[str]:
    """The pictures of a folder and of the folders in it: paths below it, with slashes, sorted.

    This is what a picture is, for every stage: a file that ends as one of FORMATS does. Hidden
    files and folders (their names begin with a dot) and `__MACOSX`, which holds macOS's shadows of
    the pictures beside it, are passed over. Links to folders are followed, but not to one that
    they lie in.

    Args:
        others: called with the files that are no pictures, and with the folders that are passed
            over, with a slash.
        without: real paths of folders that are left out.
    Raises: UserError if a folder cannot be listed.
    """
    found, known = [], set(endings())

    def walk(place: str, below: str, above: tuple[str, ...]) -> None:
        with os.scandir(place) as entries:
            for entry in entries:
                name, hidden = (
                    below + entry.name,
                    entry.name.startswith(".") or entry.name == "__MACOSX",
                )
                real = os.path.realpath(entry.path) if entry.is_dir() else ""
                if real and not hidden and real not in above and real not in without:
                    walk(entry.path, f"{name}/", (*above, real))
                elif not real and not hidden and os.path.splitext(entry.name)[1].lower() in known:
                    found.append(name)
                elif others is not None and real not in without:
                    others(f"{name}/" if real else name)

    try:
        walk(str(folder), "", (os.path.realpath(folder),))
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be listed ({error.strerror})"
        ) from None
    return sorted(found)


def endings(formats: tuple[str, ...] = FORMATS) -> list[str]:
    """The endings of pictures, in small letters, with their dots."""
    return sorted(
        ending for ending, kind in Image.registered_extensions().items() if kind in formats
    )


def _fingerprint(images, folder: Path, indices) -> str:
    """What is not there counts as such; whoever needs it will say so."""
    names = [images.name(i) for i in indices]

    def digest(k: int) -> str:
        return images.digest(indices[k]) if identity.bytes_of(folder / names[k]) >= 0 else "absent"

    return identity.of_files(names, lambda k: identity.bytes_of(folder / names[k]), digest)


def image_digest(path: Path, white: int) -> str:
    """SHA-256 of the file of an image, and of its white point where one is known: with another one
    it is another image."""
    digest = file_digest(path)
    return digest if white == WHITE else identity.of_text(digest, f"white {white}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises: UserError if it cannot be read."""
    try:
        return identity.of_bytes(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "absent") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "unreadable") from None


def segment_ids(path: Path) -> np.ndarray:
    """(H, W) int32 ids of a panoptic PNG: R + 256 G + 65536 B."""
    image = open_image(path)
    coded = np.frombuffer(
        image.tobytes("raw", "RGBX"), "<i4"
    )  # four bytes a pixel, as Pillow keeps them: an integer, but for the fourth
    return (coded & 0xFFFFFF).reshape(image.height, image.width)


def open_image(path: Path, mode: str | None = "RGB", white: int = WHITE) -> Image.Image:
    """An image as 8-bit RGB, turned as EXIF says; with another mode a map, not turned; None: as it is stored (no palette is applied).

    Of several frames the first; an alpha channel is dropped. Of 16 bits a channel, 0 to `white`
    become 0 to 255, the same in every image of a data set, so that images stay comparable
    (`white_point`); what is above is 255, too.
    Raises: UserError with the path if it cannot be read, or is larger than MAX_PIXELS.
    """
    with _opened(path) as image:
        if mode != "RGB":
            return image.convert(mode) if mode else image.copy()
        turn = _turn(image)
        image = as_rgb(image, white)
        return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image, white: int = WHITE) -> Image.Image:
    """Any image as 8-bit RGB, as `open_image` says; it is not turned. Raises: ValueError if it has
    32 bits a channel, or a sign.
    """
    values = sixteen_bits(image) if white != WHITE or image.mode.startswith(("I", "F")) else None
    if values is not None:
        image = Image.fromarray(_scaled(white)[values])
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # before its file is closed; convert() would copy every pixel
    return image


@functools.lru_cache(maxsize=4)
def _scaled(white: int) -> np.ndarray:
    """(65536,) uint8, what becomes of 16 bits. With the white point 2^k - 1 it is a shift: no value
    is rounded up.
    """
    return (np.arange(WHITE + 1) * 256 // (white + 1)).clip(0, 255).astype(np.uint8)


def sixteen_bits(image: Image.Image) -> np.ndarray | None:
    """The stored values of an image of 16 bits a channel, (H, W) or (H, W, 3) uint16, without
    alpha; None if it has 8.

    Of colour, Pillow keeps the upper 8 bits of 16 alone; here its file is decoded a second time,
    with the two bytes of each value exchanged.
    Raises: ValueError if it has 32 bits a channel or a sign, or its lower bits cannot be had.
    """
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError(
            "values with a sign, or of 32 bits a channel, whose range only you know; expected 8 or "
            "16 bits"
        )
    if image.mode.startswith("I"):
        return np.asarray(image).clip(0, WHITE).astype(np.uint16)
    stored = {
        tile[3] if isinstance(tile[3], str) else str(tile[3][0])
        for tile in getattr(image, "tile", ())
        if tile[3]
    }
    bits = image.tag_v2.get(258, ()) if image.format == "TIFF" else ()
    if not any(";16" in kind for kind in stored) and 16 not in bits:
        return None
    (order,) = stored if len(stored) == 1 else ("",)
    if order not in _EXCHANGED or not image.filename:
        raise ValueError(
            f"16 bits a channel, stored as {order or 'planes'}, of which only the upper 8 can be "
            f"had; expected RGB or grey"
        )
    with Image.open(image.filename, formats=(image.format,)) as low:
        low.tile = [_stored_as(_EXCHANGED[order], tile) for tile in low.tile]
        low, high = np.asarray(low), np.asarray(image)
    if (
        order == "LA;16B"
    ):  # taken for four bytes a pixel: the upper and the lower one of grey, then those of alpha
        return low[..., 0].astype(np.uint16) << 8 | low[..., 1]
    return high[..., :3].astype(np.uint16) << 8 | low[..., :3]


def _stored_as(order: str, tile: tuple) -> tuple:
    """A tile of an image file (codec, part, place, how pixels are stored) with another order of the
    bytes of its pixels.
    """
    stored = order if isinstance(tile[3], str) else (order, *tile[3][1:])
    return (
        tile._replace(args=stored) if hasattr(tile, "_replace") else (*tile[:3], stored)
    )  # a plain tuple up to Pillow 10


# How Pillow calls pixels of 16 bits a channel, and those with the bytes in the other order (N: the
# machine's own).
_EXCHANGED = {
    "LA;16B": "RGBA",
    **{
        f"{kind};16{one}": f"{kind};16{other}"
        for kind in ("RGB", "RGBA")
        for one, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
    },
}


def white_point(images) -> int:
    """The white point of a set of images: the least of 2^k - 1, k = 8 ... 16, that no 16-bit image
    exceeds; WHITE if there is none.

    A camera of 12 bits stores 0 to 4095 in 16. Only files that can have 16 bits are opened (by
    their endings, so no JPEG), MEASURED of them at most, evenly spread, and only 16-bit ones are
    decoded. What cannot be read is passed over, and what of its bits cannot be known counts as 16.
    """
    if isinstance(images, MiniImages):
        return WHITE
    deep = tuple(endings(DEEP_FORMATS))
    able = [i for i in range(len(images)) if images.name(i).lower().endswith(deep)]
    count, largest = min(len(able), MEASURED), -1
    for k in range(count):
        with contextlib.suppress(UserError):
            largest = max(largest, _largest(images.path(able[k * len(able) // count])))
        if largest > WHITE // 2:  # no need to look any further
            break
    return WHITE if largest < 0 else max(255, (1 << largest.bit_length()) - 1)


def _largest(path: Path) -> int:
    """The largest value of a 16-bit image; -1 of one of 8 bits."""
    with _opened(path) as image:
        try:
            values = sixteen_bits(image)
        except ValueError:
            return WHITE
        return -1 if values is None else int(values.max())


def above_white(path: Path, white: int) -> float:
    """The share of the values of a 16-bit image that are above the white point, and are cut off; 0
    of one of 8 bits.
    """
    if white == WHITE:
        return 0.0
    with _opened(path) as image:
        values = sixteen_bits(image)
        return 0.0 if values is None else float((values > white).mean())


def see(white: int, *sets) -> None:
    """Settle the white point of sets of images: the number given, or (0) the one of the first set,
    which are those of training.
    """
    white = white or white_point(sets[0])
    for images in sets:
        images.white = white


def uses_little(image: Image.Image) -> bool:
    """An RGB image whose values lie within LITTLE grey levels: black, white, or a scan with few of
    its bits.
    """
    lows, highs = zip(*image.getextrema())
    return max(highs) - min(lows) < LITTLE


def image_header(path: Path) -> tuple[tuple[int, int], Image.Transpose | None]:
    """(width, height) of an image as `open_image` returns it, and how it will be turned; no pixel is read."""
    with _opened(path) as image:
        turn = _turn(image)
        swapped = turn in (
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        )
        return image.size[::-1] if swapped else image.size, turn


@contextlib.contextmanager
def _opened(path: Path):
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "absent") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{path}: its header states more than {MAX_PIXELS // 1_000_000} million pixels, which no stage reads; cut it into tiles",
            "large",
        ) from None
    except Exception as error:  # Pillow raises a dozen types for what is one thing to the user
        reason = (
            "of no known format, or no image at all"
            if isinstance(error, UnidentifiedImageError)
            else " ".join(str(error).split()) or type(error).__name__
        )
        reason = "empty file" if os.path.isfile(path) and not os.path.getsize(path) else reason
        raise UserError(f"{path}: not a readable image ({reason})", "unreadable") from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How EXIF wants an image turned that was opened but not read. A broken EXIF block wants nothing (as officially)."""
    if (
        image.format == "TIFF" or image.format == "PNG" and "exif" not in image.info
    ):  # Pillow turns a TIFF itself; asking a PNG would read it
        return None
    try:
        return TURN.get(image.getexif().get(0x0112))
    except Exception:  # struct.error, SyntaxError, ... from inside
        return None


def read_json(path: Path) -> dict:
    """A JSON in COCO panoptic format: an object with the lists images, annotations and categories. Raises: UserError if it is not."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        raise UserError(
            f"{path}: key '{missing[0]}' is missing or not a list; expected COCO panoptic format (images, annotations, categories)"
        )
    return content


def name_fault(name) -> str | None:
    """What is wrong with a file_name of a JSON; None if it is a path that stays in its folder."""
    if not isinstance(name, str) or not name.strip("./ "):
        return "is not a file name"
    if os.path.isabs(name) or ".." in name and ".." in Path(name).parts:
        return "leads out of its folder; expected a path below it"
    if (
        _UNPRINTABLE.search(name)
        or len(name) > 4 * MAX_NAME
        or max(len(part.encode()) for part in name.split("/")) > MAX_NAME
    ):
        return f"cannot be the name of a file; expected at most {MAX_NAME} bytes between slashes, without control characters"
    return None


_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f\ud800-\udfff]"
)  # would also break the one line of an error


def brief(value) -> str:
    """A value from a file, as a message can show it."""
    text = ascii(value) if not isinstance(value, str) else f"'{value}'"
    text = _UNPRINTABLE.sub("?", text)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _whole(value) -> bool:
    """True for 3 and 3.0; False for True, "3", NaN and 1e999."""
    return type(value) is int or type(value) is float and value.is_integer()


MINI_TRAIN, MINI_DEV, MINI_VAL = 288, 64, 200  # images


def load_mini(split: str, evaluate_on: str = "val") -> DataSet:
    """The miniature world: 288 training images of which the first N are labelled (split 16, 32: nested), dev 64, val 200."""
    if not split.isdecimal() or not 0 < int(split) < MINI_TRAIN:
        raise UserError(
            f"unknown split '{split}' of data set mini; available: 16, 32, or any number below {MINI_TRAIN}"
        )
    if evaluate_on not in ("dev", "val"):
        raise UserError(
            f"unknown evaluation set '{evaluate_on}' of data set mini; available: dev, val"
        )
    n, val = int(split), MiniImages(evaluate_on, MINI_VAL if evaluate_on == "val" else MINI_DEV)
    return DataSet(
        "mini",
        mini_taxonomy(),
        MiniImages("train", MINI_TRAIN),
        val,
        list(range(n)),
        list(range(n, MINI_TRAIN)),
    )


def mini_taxonomy() -> Taxonomy:
    import microcosm

    k = len(microcosm.CLASSES)
    return Taxonomy(
        microcosm.CLASSES,
        tuple(i < len(microcosm.THINGS) for i in range(k)),
        tuple(range(1, k + 1)),
    )


def load_folder(
    root: Path,
    split: str,
    seed: int = 0,
    variant: str = "",
    complain: Callable[[UserError], None] = refuse,
) -> DataSet:
    """Any folder in COCO panoptic format.

    Args:
        root: holds panoptic_train.json and panoptic_val.json (or annotations/panoptic_*.json), the images and the maps.
        split: which images are labelled, see `read_split`.
        variant: ending of the JSON names, as in panoptic_train_4class.json.
        complain: called with every fault that allows to read on (`PanopticFolder`).
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; --data-root names a folder in COCO panoptic format"
        )
    annotations = {
        part: _first(
            root,
            [
                f"panoptic_{part}{variant}.json",
                f"annotations/panoptic_{part}{variant}.json",
                f"annotations/panoptic_{part}2017{variant}.json",
            ],
            "the panoptic JSON",
        )
        for part in ("train", "val")
    }
    taxonomy = read_taxonomy(annotations["train"])
    by_part = {
        "train": taxonomy,
        "val": _by_name(taxonomy, annotations["train"], annotations["val"], complain),
    }
    parts = {}
    for part, path in annotations.items():
        base, stem = path.parent.relative_to(root), path.stem.removesuffix(variant)
        images = _first(
            root, [f"images/{part}", f"{part}2017", f"{part}", "images"], "the image folder"
        )
        candidates, missing = (
            [(base / stem).as_posix(), f"panoptic/{part}", f"panoptic_{part}", "panoptic"],
            None,
        )
        try:
            maps = _first(root, candidates, "the folder of panoptic PNG files")
        except UserError as error:
            maps, missing = root / candidates[0], error
        parts[part] = PanopticFolder(
            path, images, maps, by_part[part], validation=part == "val", complain=complain
        )
        if missing and parts[part].annotated:  # images without annotation need no maps
            raise missing
    labeled, unlabeled = read_split(root, split, parts["train"], seed, complain)
    return DataSet(root.name, taxonomy, parts["train"], parts["val"], labeled, unlabeled)


def _by_name(
    taxonomy: Taxonomy, train: Path, val: Path, complain: Callable[[UserError], None]
) -> Taxonomy:
    """The training JSON's classes with the ids that the validation JSON gives to these names; a
    class that it lacks has an id that nothing has."""
    other = read_taxonomy(val)
    names, theirs = taxonomy.short_names, dict(zip(other.short_names, zip(other.ids, other.things)))
    known = dict(zip(taxonomy.ids, names))
    ids = [theirs[name][0] if name in theirs else -1 - k for k, name in enumerate(names)]
    for category, name in zip(other.ids, other.short_names):
        if name not in names and category in known:
            complain(
                UserError(
                    f"{val}: category {category} is {brief(name)}, but {brief(known[category])} "
                    f"in {train.name}",
                    "category",
                )
            )
            k = taxonomy.ids.index(category)
            ids[k] = category if ids[k] < 0 else ids[k]
    for name, thing in zip(names, taxonomy.things):
        if name in theirs and theirs[name][1] != thing:
            complain(
                UserError(
                    f"{val}: {brief(name)} is {'stuff' if thing else 'a thing'}, but "
                    f"{'a thing' if thing else 'stuff'} in {train.name}",
                    "category",
                )
            )
    return Taxonomy(taxonomy.names, taxonomy.things, tuple(ids), taxonomy.palette)


def _first(root: Path, candidates, what: str) -> Path:
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise UserError(
        f"{root}: {what} is missing; looked for {', '.join(str(c) for c in candidates)}"
    )


def read_taxonomy(annotations: Path) -> Taxonomy:
    """Classes of a COCO panoptic JSON, in its order, and their colours if each has a `color`.

    Raises: UserError if ids or first names are not distinct, or something is missing.
    """
    rows, used, categories = [], set(), read_json(annotations)["categories"]
    for c in categories:
        missing = [
            key for key in ("id", "name", "isthing") if not isinstance(c, dict) or key not in c
        ]
        if missing:
            raise UserError(
                f"{annotations}: a category lacks '{missing[0]}' ({brief(c)}); expected id, name and isthing"
            )
        first = c["name"].split(",")[0].strip() if isinstance(c["name"], str) else ""
        if not (
            _whole(c["id"]) and 0 <= c["id"] < MAX_ID and first and c["isthing"] in (0, 1)
        ) or _UNPRINTABLE.search(c["name"]):
            raise UserError(
                f"{annotations}: category {brief(c)}: expected a whole number as id, a name, and isthing 0 or 1"
            )
        if c["id"] in used or first in used:
            raise UserError(
                f"{annotations}: category {brief(c['id'])} ({brief(c['name'])}) shares its id or its first name with another; expected distinct ones"
            )
        used |= {c["id"], first}
        rows.append((c["name"], bool(c["isthing"]), int(c["id"])))
    if not rows:
        raise UserError(
            f"{annotations}: categories is empty; expected at least one class with id, name and isthing"
        )
    colours = [c.get("color") for c in categories]
    sound = all(
        isinstance(c, list) and len(c) == 3 and all(type(v) is int and 0 <= v < 256 for v in c)
        for c in colours
    )
    return Taxonomy(*zip(*rows), palette=tuple(map(tuple, colours)) if sound else None)


def read_split(
    root: Path,
    split: str,
    images: PanopticFolder,
    seed: int,
    complain: Callable[[UserError], None] = refuse,
    official: Path | None = None,
) -> tuple[list[int], list[int]]:
    """Labelled and unlabelled indices: what --split means, for every data set in COCO panoptic
    format.

    split: in this order, whatever else has the same name: an official partition (a folder of
        `official`) or one of the data set's own (of root/splits), with labeled.txt, and
        unlabeled.txt if that is not all the rest; `all` (or empty), all images with annotation; a
        number of them, drawn by `seed`; a file of image names, one a line (./3 is the file 3).
    Raises: UserError if a list is empty, names an image twice or one that is not there, if a
    labelled image has no annotation, or is unlabelled, too.
    """
    path = split_list(root, split or "all", official)
    if path is None and split.isdecimal():
        if not 0 < int(split) <= images.annotated:
            complain(
                UserError(
                    f"--split {split}: expected 1 to {images.annotated} labelled images", "split"
                )
            )
        order = np.random.default_rng(seed).permutation(images.annotated).tolist()
        return sorted(order[: int(split)]), sorted(order[int(split) :]) + list(
            range(images.annotated, len(images))
        )
    if path is None:
        return list(range(images.annotated)), list(range(images.annotated, len(images)))
    everything = {images.name(i): i for i in range(len(images))}

    def read(file):
        found: dict[int, None] = {}  # in the order of the list
        for line in _lines(file):
            # Official lists have two columns and name files by their path; names of one's own may have spaces in them.
            names = [n for text in (line, line.split()[0]) for n in (text, text.split("/")[-1])]
            i = next((everything[n] for n in names if n in everything), None)
            if i is None:
                complain(
                    UserError(
                        f"{file}: {brief(names[2])} is not an image of the training set", "split"
                    )
                )
            elif i in found:
                complain(UserError(f"{file}: {brief(images.name(i))} is listed twice", "split"))
            else:
                found[i] = None
        if not found:
            complain(UserError(f"{file}: the list is empty", "split"))
        return list(found)

    labeled, other = read(path), path.with_name("unlabeled.txt")
    for i in labeled:
        if i >= images.annotated:
            complain(
                UserError(
                    f"{path}: {brief(images.name(i))} has no annotation; a labelled image needs one",
                    "split",
                )
            )
    known = set(labeled)
    unlabeled = read(other) if other.exists() else [i for i in range(len(images)) if i not in known]
    for i in unlabeled:
        if i in known:
            complain(
                UserError(
                    f"{other}: {brief(images.name(i))} is in {path.name}, too; expected no image in both",
                    "split",
                )
            )
    return [i for i in labeled if i < images.annotated], unlabeled


def split_list(root: Path, split: str, official: Path | None = None) -> Path | None:
    """The list of labelled images that --split names, in the order of `read_split`; None for a
    number, and for all.

    Raises: UserError if there is no such split, or its folder has no list.
    """
    for folder in (*([official] if official else []), root / "splits"):
        path = folder / split / "labeled.txt"
        if path.is_file():
            return path
        if path.parent.is_dir():
            raise UserError(
                f"{path}: no such file, though --split {split} names its folder; expected a list "
                f"of image names"
            )
    if split == "all" or split.isdecimal():
        return None
    if not Path(split).is_file():
        folders = [*([official] if official else []), root / "splits"]
        known = [
            path.parent.name for folder in folders for path in sorted(folder.glob("*/labeled.txt"))
        ]
        raise UserError(
            f"unknown split '{split}' of {root}; available: {', '.join(known) or 'none'}, a "
            f"number, or a file of image names"
        )
    return Path(split)


def _lines(path: Path) -> list[str]:
    """Lines of a text file that are not blank."""
    try:
        return [
            line.strip()
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None


def require_images(images) -> None:
    """Raise UserError if a set has no image at all: SAM has nothing to segment, and the warm-up
    nothing to learn from.
    """
    if not len(images):
        raise UserError(f"{images.annotations}: its list of images is empty; expected at least one")


def require_truth(
    dataset: DataSet,
    learn: bool = True,
    measure: bool = True,
    complain: Callable[[UserError], None] = refuse,
) -> None:
    """Raise UserError before a run begins if no image has what it could learn from, or be measured
    on. Read from the index, no file is opened.

    Segments of crowd do not count: they are neither learned nor found.
    """
    parts = (
        [(dataset.train, dataset.labeled, "labelled", "learned", "annotate some")] if learn else []
    )
    if measure:
        parts.append(
            (
                dataset.val,
                range(len(dataset.val)),
                "validation",
                "measured",
                "annotate some, or train with --no-eval",
            )
        )
    for images, indices, what, done, do in parts:
        if isinstance(images, PanopticFolder) and not objects(images, indices).any():
            why = f"none of the {len(indices)} {what} images has a segment (crowd does not count)"
            if not len(indices):
                why = f"no image is {what}" if images.annotated else "no image is annotated"
            complain(
                UserError(f"{images.annotations}: {why}, so nothing can be {done}; {do}", "nothing")
            )


def objects(images: PanopticFolder, indices) -> np.ndarray:
    """(n,) number of segments that are no crowd, of each of n annotated images, by the index."""
    before = np.append(0, np.cumsum(images.segments[:, 3] == 0))[images.starts]
    return np.diff(before)[np.asarray(indices, np.int64)]


def out_of_reach(dataset: DataSet, cfg: Config) -> list[str]:
    """How many objects cannot be found because their image has more segments than the model has
    queries, by the index: a line each, or none.
    """
    lines = []
    for images, what, counts in _counted(dataset, cfg):
        crowded = counts[counts > cfg.num_queries]
        if len(crowded):
            lines.append(
                f"{len(crowded):,} of {len(counts):,} {what} images have more than "
                f"{cfg.num_queries} segments (up to {crowded.max():,}): "
                f"{(crowded - cfg.num_queries).sum():,} of {counts.sum():,} objects cannot be "
                f"found; raise --num-queries"
            )
    return lines


def limits(dataset: DataSet, cfg: Config) -> list[str]:
    """Why full PQ is out of reach, whatever is learned: `out_of_reach`, and several segments of one
    stuff class, of which a model gives one.
    """
    lines = out_of_reach(dataset, cfg)
    for images, what, counts in _counted(dataset, cfg):
        chosen = set(dataset.labeled) if images is dataset.train else range(len(images))
        repeated = [row for row in repeated_stuff(images) if row[0] in chosen]
        if repeated:
            i, k, count = repeated[0]
            lines.append(
                f"{len({row[0] for row in repeated}):,} of {len(counts):,} {what} images have "
                f"several segments of one stuff class, as "
                f"{images.name(i)} {count} of {dataset.taxonomy.short_names[k]}, where a model "
                f"gives one: join them, or call the class a thing"
            )
    return lines


def _counted(dataset: DataSet, cfg: Config) -> list[tuple[PanopticFolder, str, np.ndarray]]:
    """The sets whose index can be counted, and the segments of their images (semantic labels are
    one segment a class, and never many).
    """
    parts = [(dataset.val, range(len(dataset.val)), "validation")]
    if cfg.labels == "panoptic":
        parts.insert(0, (dataset.train, dataset.labeled, "labelled"))
    return [
        (images, what, objects(images, indices))
        for images, indices, what in parts
        if isinstance(images, PanopticFolder)
    ]


def repeated_stuff(images: PanopticFolder) -> list[tuple[int, int, int]]:
    """(image, class, number of segments) where one image has several of a stuff class, which COCO
    panoptic format does not know. Crowd does not count.
    """
    owner, classes = (
        np.repeat(np.arange(images.annotated), np.diff(images.starts)),
        images.segments[:, 1],
    )
    stuff = ~np.array(images.taxonomy.things)[classes] & (images.segments[:, 3] == 0)
    pairs, counts = np.unique(
        np.stack([owner[stuff], classes[stuff]], -1), axis=0, return_counts=True
    )
    return [
        (*pair, count)
        for pair, count in zip(pairs[counts > 1].tolist(), counts[counts > 1].tolist())
    ]


def require_files(images, indices, what: str, maps: bool = True, classes: bool = False) -> None:
    """Raise UserError before a run begins if images that it will need are not there, or their panoptic maps, or (if the data set has
    its own) their class maps. Folders are listed, no file is opened."""
    if not isinstance(images, PanopticFolder):
        return
    listed: dict[Path, set[str]] = {}

    def there(path: Path) -> bool:
        if path.parent not in listed:
            listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        return path.name in listed[path.parent]

    kinds = [("image", lambda i: images.images / images.name(i))]
    kinds += [("panoptic map", lambda i: images.maps / str(images.files[i]))] if maps else []
    kinds += [("class map", images.class_file)] if classes and images.semantic is not None else []
    for kind, path_of in kinds:
        absent = [path for path in map(path_of, indices) if not there(path)]
        if absent:
            raise UserError(
                f"{absent[0]}: no such file; {len(absent)} of {len(indices)} {what} {kind}s are listed but absent: complete the download, "
                f"or take them from the list"
            )


# ---------------------------------------------------------------------------------------------- views of an image


@dataclass
class Sample:
    """An image on its way to a batch. image: PIL, RGB.   layers: maps that move along, each (H, W), nearest neighbour."""

    image: Image.Image
    layers: list[np.ndarray]


def weak_view(
    sample: Sample, cfg: Config, rng: random.Random, colour: bool = False
) -> tuple[Tensor, list[np.ndarray]]:
    """Random scale and crop, the SSD colour augmentation for labelled images, and a flip: (3, h, w) uint8, not padded, and its layers."""
    sizes = [
        int(0.1 * k * cfg.crop)
        for k in range(round(10 * cfg.scale_min), round(10 * cfg.scale_max) + 1)
    ]
    w, h = size = output_size(*sample.image.size, rng.choice(sizes), MAX_LONG_SIDE * cfg.crop)
    cw, ch = min(w, cfg.crop), min(h, cfg.crop)
    x, y = rng.randint(0, w - cw), rng.randint(0, h - ch)
    sample = resize_part(sample, size, (x, y, x + cw, y + ch))
    image = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1).contiguous()
    layers = sample.layers
    if colour:
        image = ssd_colour(image, rng)
    if rng.random() < 0.5:
        image, layers = image.flip(-1), [a[:, ::-1] for a in layers]
    return image, layers


def resize(sample: Sample, short_side: int, long_side: int) -> Sample:
    """To a short side, unless the long side then exceeds its limit."""
    size = output_size(*sample.image.size, short_side, long_side)
    return resize_part(sample, size, (0, 0, *size))


def resize_part(sample: Sample, size: tuple[int, int], part: tuple[int, int, int, int]) -> Sample:
    """Resize to size (w, h) and crop to part (left, top, right, bottom) of the result; what lies outside of it is never computed.

    Values differ by at most two grey levels from the whole, cropped: Pillow may take columns before rows for the one and not for the other.
    """
    (w, h), (nw, nh), (left, top, right, bottom) = sample.image.size, size, part
    source = left * w / nw, top * h / nh, right * w / nw, bottom * h / nh
    image = sample.image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, source)
    xs, ys = (
        ((np.arange(*ends) + 0.5) * old / new).astype(int)
        for ends, old, new in (((left, right), w, nw), ((top, bottom), h, nh))
    )
    return Sample(image, [a.take(ys, 0).take(xs, 1) for a in sample.layers])


def output_size(w: int, h: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(w, h) after scaling the short side to short_side, or less if the long side would exceed long_side."""
    scale = short_side / min(w, h)
    scale = min(scale, long_side / max(w, h))
    return max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))


def ssd_colour(image: Tensor, rng: random.Random) -> Tensor:
    """Brightness +-32 grey levels, contrast and saturation 0.5 to 1.5, hue +-36 degrees, each with probability 0.5. (3, h, w) uint8."""
    x = image.float() / 255
    if rng.random() < 0.5:
        x = (x + rng.uniform(-32, 32) / 255).clamp(0, 1)
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    contrast_first = rng.random() < 0.5
    if contrast_first:
        x = (x * contrast).clamp(0, 1)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.randint(-18, 18) if rng.random() < 0.5 else 0  # in OpenCV's units of 2 degrees
    if saturation != 1.0 or hue:
        x = shift_hsv(x, hue / 180, saturation)
    if not contrast_first:
        x = (x * contrast).clamp(0, 1)
    return to_bytes(x)


def strong_view(image: Tensor, cfg: Config, rng: random.Random) -> Tensor:
    """Colour jitter (always, in random order), sometimes grayscale, sometimes Gaussian blur. (3, h, w) uint8."""
    # takes two seconds to import: only who needs it waits
    from torchvision.transforms.v2 import functional as TF

    factor, hue = (1 - cfg.jitter, 1 + cfg.jitter), (-cfg.jitter_hue, cfg.jitter_hue)
    steps = [
        (TF.adjust_brightness, factor),
        (TF.adjust_contrast, factor),
        (TF.adjust_saturation, factor),
        (shift_hsv, hue),
    ]
    rng.shuffle(steps)
    x = image.float() / 255
    for adjust, interval in steps:
        x = adjust(x, rng.uniform(*interval))
    if rng.random() < cfg.grayscale_prob:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if rng.random() < cfg.blur_prob:
        x = gaussian_blur(x, rng.uniform(0.1, cfg.blur_radius))
    return to_bytes(x)


def shift_hsv(x: Tensor, turn: float, saturation: float = 1.0) -> Tensor:
    """Turn the hue by a share of the circle and multiply the saturation, as in HSV. (3, h, w) RGB in [0, 1].

    Torchvision's goes through six cases a pixel, Pillow's through 8 bits of hue; on the circle one rule serves the three channels: full up to
    one sixth of a turn from its own hue, none from two sixths on, linear between.
    """
    r, g, b = x
    top, low = x.amax(0), x.amin(0)
    hue = (
        torch.copysign(1 + (g + b - r - low) / (top - low).clamp(min=1e-6), g - b) + 6 * turn
    )  # sixths of a turn, red = 0
    chroma = ((top - low) * saturation).minimum(top)
    low = top - chroma
    shifted = torch.empty_like(x)
    for channel, own in zip(shifted, (0, 2, 4)):
        distance = hue - own
        distance -= 6 * torch.round(distance / 6)  # the short way round: -3 to 3
        torch.addcmul(low, chroma, (2 - distance.abs()).clamp_(0, 1), out=channel)
    return shifted


def gaussian_blur(x: Tensor, radius: float) -> Tensor:
    """As Pillow's: three equal box blurs whose variances add up to radius ** 2, here as one kernel. (3, h, w); pixels of the edge repeat."""
    variance = radius**2 / 3
    n = int(
        ((12 * variance + 1) ** 0.5 - 1) / 2
    )  # a box has weight 1 at -n to n and less at either end
    end = (2 * n + 1) * (variance - n * (n + 1) / 3) / 2 / ((n + 1) ** 2 - variance)
    box = np.array([end, *[1] * (2 * n + 1), end]) / (2 * n + 1 + 2 * end)
    kernel = np.convolve(box, np.convolve(box, box)).tolist()
    reach = len(kernel) // 2
    x = F.pad(x[None], (reach, reach, reach, reach), mode="replicate")[0]
    for axis in (1, 2):
        moved = [x.narrow(axis, k, x.shape[axis] - 2 * reach) for k in range(len(kernel))]
        x = torch.zeros_like(moved[0])
        for weight, image in zip(kernel, moved):
            x.add_(image, alpha=weight)
    return x


def to_bytes(x: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return torch.from_numpy(
        (x * 255).round_().numpy().astype(np.uint8)
    )  # torch's own conversion takes twice as long


def cutmix_box(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a CutMix box, in pixels of the view that it is cut from.

    Of the area that is drawn, aspect and corner are drawn until the box fits. Where it hardly ever does, in a long and thin view, the box is
    drawn from those that fit, each with its chance; where none fits, it is the largest that does.
    """
    area = rng.uniform(*CUTMIX_AREA) * height * width
    for _ in range(CUTMIX_TRIES):
        aspect = rng.uniform(*CUTMIX_ASPECT)
        w, h = int((area / aspect) ** 0.5), int((area * aspect) ** 0.5)
        x, y = rng.randrange(width), rng.randrange(height)
        if x + w <= width and y + h <= height:
            return y, y + h, x, x + w
    w, h = _fitting_box(area, height, width, rng)
    x, y = rng.randrange(max(1, width - w + 1)), rng.randrange(max(1, height - h + 1))
    return y, y + h, x, x + w


def _fitting_box(area: float, height: int, width: int, rng: random.Random) -> tuple[int, int]:
    """(w, h) as the tries of `cutmix_box` would end with, however many it takes."""
    least, most = CUTMIX_ASPECT
    ends = {
        least,
        most,
        *(area / k**2 for k in range(1, width + 2)),
        *(k**2 / area for k in range(1, height + 2)),
    }
    ends = sorted(
        end for end in ends if least <= end <= most
    )  # between two of them w and h do not change
    boxes, chances = [], []
    for first, last in zip(ends, ends[1:]):
        aspect = (first + last) / 2
        w, h = int((area / aspect) ** 0.5), int((area * aspect) ** 0.5)
        if w <= width and h <= height:
            boxes.append((w, h))
            chances.append((last - first) * min(width, width - w + 1) * min(height, height - h + 1))
    if not boxes:
        aspect = min(max(height / width, least), most)
        return min(width, int(height / aspect)), min(height, int(width * aspect))
    return rng.choices(boxes, chances)[0]


def to_target(segment_map: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> Target:
    """Training target: crowd regions become void, segments without a pixel are dropped, ids are made consecutive."""
    areas = np.bincount(segment_map.ravel(), minlength=len(labels) + 1)[1:]
    keep = (areas > 0) & ~crowd
    lut = np.zeros(len(labels) + 1, np.int32)
    lut[1:][keep] = np.arange(1, keep.sum() + 1)
    return Target(
        torch.as_tensor(labels[keep], dtype=torch.int64), torch.from_numpy(lut[segment_map])
    )


# ----------------------------------------------------------------------------------------------------- batches


@dataclass
class Labeled:
    """images (B, 3, S, S) uint8; B targets; names of the files."""

    images: Tensor
    targets: list[Target]
    names: list[str]

    def to(self, device) -> "Labeled":
        return Labeled(
            self.images.to(device, non_blocking=True),
            [t.to(device) for t in self.targets],
            self.names,
        )


@dataclass
class Unlabeled:
    """Two views of B images, and for images with a CutMix box the two views of the partner.

    weak, strong: (B, 3, S, S) uint8.   boxes: B boxes (top, bottom, left, right) or None.
    partner_weak, partner_strong: (M, 3, S, S) uint8, M = boxes that are not None, in their order.
    """

    weak: Tensor
    strong: Tensor
    boxes: list[tuple[int, int, int, int] | None]
    partner_weak: Tensor
    partner_strong: Tensor
    names: list[str]

    def to(self, device) -> "Unlabeled":
        move = lambda t: t.to(device, non_blocking=True)
        return Unlabeled(
            move(self.weak),
            move(self.strong),
            self.boxes,
            move(self.partner_weak),
            move(self.partner_strong),
            self.names,
        )


class Batches(torch.utils.data.Dataset):
    """Batch number `step` of a run: a map from step to batch, so that order and workers do not matter.

    Subclasses say what a batch is; `rng` is the only source of chance they may use.
    """

    def __init__(self, cfg: Config, steps: int):
        self.cfg, self.steps = cfg, steps
        self.rank, self.ranks = (
            ranks.rank(),
            ranks.count(),
        )  # a loader process could not ask any more
        self._order = (None, [])  # the pass that was shuffled last

    def __len__(self) -> int:
        return self.steps

    @property
    def parts(self) -> list[int]:
        """The first steps of parts of the run whose batches differ in kind."""
        return [0]

    def slots(self, batch: int) -> range:
        """The images of a batch that this rank takes. Raises UserError if some rank would have none."""
        if batch < self.ranks:
            raise UserError(
                f"{self.ranks} processes cannot share a batch of {batch}: start fewer with torchrun --nproc_per_node, or choose a larger batch"
            )
        return ranks.share(batch, self.rank, self.ranks)

    def rng(self, *key) -> random.Random:
        return random.Random(repr((self.cfg.seed, type(self).__name__, *key)))

    def pick(self, indices: list[int], step: int, slot: int, batch: int) -> int:
        """Endless shuffled passes over the indices."""
        epoch, position = divmod(step * batch + slot, len(indices))
        if self._order[0] != epoch:
            order = list(indices)
            self.rng("epoch", epoch).shuffle(order)
            self._order = epoch, order
        return self._order[1][position]


class LabeledBatches(Batches):
    """Labelled images with ground truth, for stages sup and ssl."""

    def __init__(self, dataset: DataSet, cfg: Config, steps: int):
        super().__init__(cfg, steps)
        self.dataset = dataset

    def __getitem__(self, step: int) -> Labeled:
        images, targets, names = [], [], []
        for slot in self.slots(self.cfg.labeled_batch):
            i = self.pick(self.dataset.labeled, step, slot, self.cfg.labeled_batch)
            truth = self.dataset.train.truth(i)
            truth = truth.by_class() if self.cfg.labels == "semantic" else truth
            image, (segment_map,) = weak_view(
                Sample(self.dataset.train.image(i), [truth.segment_map]),
                self.cfg,
                self.rng(step, slot),
                colour=True,
            )
            images.append(pad_image(image, self.cfg.crop))
            targets.append(to_target(pad(segment_map, self.cfg.crop, 0), truth.labels, truth.crowd))
            names.append(self.dataset.train.name(i))
        return Labeled(torch.stack(images), targets, names)


class SemiSupervisedBatches(Batches):
    """A labelled batch and an unlabelled one, drawn independently and with replacement. No unlabelled one during burn-in."""

    def __init__(self, dataset: DataSet, cfg: Config, steps: int, warm: bool = False):
        super().__init__(cfg, steps)
        self.dataset, self.labeled = dataset, LabeledBatches(dataset, cfg, steps)
        self.burn_in = cfg.burn_in_steps(warm)
        # of `strong_view`: here once, not in every loader process
        import torchvision.transforms.v2.functional  # noqa: F401

    @property
    def parts(self) -> list[int]:
        return [0, self.burn_in] if 0 < self.burn_in < self.steps else [0]

    def __getitem__(self, step: int) -> tuple[Labeled, Unlabeled | None]:
        if step < self.burn_in:
            return self.labeled[step], None
        views, partners, boxes, names = [], [], [], []
        for slot in self.slots(self.cfg.unlabeled_batch):
            rng = self.rng(step, slot)
            name, *pair = self._two_views(rng)
            views.append(pair)
            names.append(name)
            box = None
            if (
                rng.random() < self.cfg.cutmix_prob
            ):  # drawn first: an image without a box needs no partner
                _, *partner = self._two_views(rng)
                partners.append(partner)
                box = cutmix_box(*partner[0].shape[1:], rng)
            boxes.append(box)

        def stack(pairs, k):
            return (
                torch.stack([pad_image(p[k], self.cfg.crop) for p in pairs])
                if pairs
                else torch.empty(0, 3, self.cfg.crop, self.cfg.crop, dtype=torch.uint8)
            )

        return self.labeled[step], Unlabeled(
            stack(views, 0), stack(views, 1), boxes, stack(partners, 0), stack(partners, 1), names
        )

    def _two_views(self, rng: random.Random) -> tuple[str, Tensor, Tensor]:
        i = rng.choice(self.dataset.unlabeled)
        weak, _ = weak_view(Sample(self.dataset.train.image(i), []), self.cfg, rng)
        return self.dataset.train.name(i), weak, strong_view(weak, self.cfg, rng)


def pad_image(image: Tensor, side: int) -> Tensor:
    """(3, h, w) -> (3, side, side), grey at the right and at the bottom."""
    return F.pad(image, (0, side - image.shape[2], 0, side - image.shape[1]), value=PAD_VALUE)


def pad(a: np.ndarray, side: int, value: int) -> np.ndarray:
    """(h, w, ...) -> (side, side, ...)."""
    out = np.full((side, side, *a.shape[2:]), value, a.dtype)
    out[: a.shape[0], : a.shape[1]] = a
    return out


def loader(batches: Batches, start: int, workers: int):
    """Iterate over batches start, start + 1, ... with loader processes, which end when the generator is closed."""
    try:
        yield from torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=range(start, len(batches)),
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_await_the_parent,
        )
        return
    except UserError as error:  # a worker's error arrives with its traceback as text
        words = str(error).strip().splitlines()[-1].split("UserError: ")[-1]
    raise UserError(words)  # not from within: the first error would keep the loader processes alive


def _await_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group: a loader process ends a little later, when the parent knows as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def as_it_is(batch):
    """A collate function: torch's own would turn tuples into lists, and arrays into tensors."""
    return batch
