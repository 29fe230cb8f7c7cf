"""Images and class maps: a class for every pixel, and no segments.

A folder of one's own holds images/ and labels/ with maps of the same names (PNG, the number of a
class at every pixel, 255 for none), and classes.txt or classes.json; what these call void is none.
Training and validation are folders below both (train, val), or val.txt names the validation images.
An image without a map is unlabelled.
"""

import collections
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

from ground.errors import UserError, refuse
from readers.ground_truth import IGNORE, VOID_NAMES, DataSet, Taxonomy, Truth
from readers.name_lists import lines_of, numbered
from readers.palettes import require_one_palette
from readers.panoptic import PanopticFolder
from readers.pictures import LOSSY, Images, brief, file_digest, open_image, pictures
from readers.splits import read_split

NONE = 255  # value of a pixel without class
UNKNOWN = -2  # of a value that stands for no class and not for none
CLASSES = ("classes.txt", "classes.json")
LAYOUT = (
    "expected images/ and labels/ (class maps, PNG) with folders train and val in them, or val.txt "
    "with the names of the validation images; and classes.txt"
)
SAVE = (
    "save all maps with one palette, or without one if the numbers count; --stage import --from "
    "masks reads them by their colours"
)


@dataclass(frozen=True)
class Row:
    """An image: its file and its map, None without; paths below the two folders."""

    image: str
    labels: str | None


class ClassMaps(Images):
    """Images with a class map each, those `annotated` first, and others without.

    values: (256,) or longer: class of a stored value, IGNORE or UNKNOWN.   taxonomy: without
    things.
    """

    def __init__(
        self, folder: Path, labels: Path, rows: list[Row], values: np.ndarray, taxonomy: Taxonomy
    ):
        self.folder, self.labels, self.values, self.taxonomy = folder, labels, values, taxonomy
        rows = sorted(rows, key=lambda row: row.labels is None)
        self.names = np.array([row.image for row in rows], str)
        self.files = np.array([row.labels for row in rows if row.labels is not None], str)
        self.annotated, self.order = len(self.files), None

    def map_file(self, i: int) -> Path:
        return self.labels / str(self.files[i])

    def truth(self, i: int, complain=refuse) -> Truth:
        """Ground truth of image i, one of the annotated ones: a segment a class.

        Raises: UserError if the map cannot be read, has another size, or a value without class.
        """
        path = self.map_file(i)
        if path.suffix.lower() in LOSSY:
            raise UserError(
                f"{path}: JPEG keeps no exact values; expected a class map as PNG", "unreadable"
            )
        stored = np.asarray(open_image(path, None))
        if stored.ndim != 2 or stored.dtype.kind not in "ui":
            raise UserError(
                f"{path}: expected one channel of class numbers, got {stored.shape} {stored.dtype} "
                "(colours are read by --stage import --from masks)",
                "unreadable",
            )
        stored = PanopticFolder._upright(self, stored, i, path)
        classes = self.values[np.minimum(stored.astype(np.int64), len(self.values) - 1)]
        if (classes == UNKNOWN).any():
            value = stored[classes == UNKNOWN][0]
            complain(
                UserError(
                    f"{path}: value {value} is no class; expected one of "
                    f"{len(self.taxonomy)} classes (see classes.txt, which may call it void), or "
                    f"{NONE} for none",
                    "value",
                )
            )
            classes = np.where(classes == UNKNOWN, IGNORE, classes)
        if self.order is not None:
            classes = np.append(self.order, IGNORE)[classes]
        nothing = np.zeros(0, np.int64)
        return Truth(stored, nothing, nothing, nothing, lambda: classes).by_class()

    def follow(self, order: np.ndarray) -> None:
        """Class k becomes class order[k]."""
        self.order, self.taxonomy = order, self.taxonomy.select(np.argsort(order))

    def segments_text(self, i: int, names: list[str]) -> str:
        return str(self.files[i])

    def truth_digest(self, i: int) -> str:
        """SHA-256 of the file of its map."""
        return file_digest(self.map_file(i))


def is_one(root: Path) -> bool:
    """Whether a folder holds class maps, and not COCO panoptic format."""
    return any((Path(root) / name).is_file() for name in CLASSES)


def load(root: Path, split: str, seed: int = 0, complain: Callable = refuse) -> DataSet:
    """A folder of one's own. split: as in `readers.splits.read_split`.

    Raises: UserError for what is missing, or does not fit together.
    """
    root = Path(root).expanduser()
    taxonomy, values = read_classes(root)
    parts = {
        part: ClassMaps(*_found(root, part, complain), values, taxonomy)
        for part in ("train", "val")
    }
    train, val = parts["train"], parts["val"]
    val.names = val.names[: val.annotated]  # an image without a map measures nothing
    for part, images in parts.items():
        if not images.annotated:
            raise UserError(f"{images.labels}: no map of a {part} image is there; {LAYOUT}")
    maps = [images.map_file(i) for images in (train, val) for i in range(images.annotated)]
    try:
        require_one_palette(maps, SAVE, lambda v: v < len(values) and values[v] >= 0)
    except UserError as error:
        complain(UserError(str(error), error.kind or "palette"))
    return DataSet(root.name, taxonomy, train, val, *read_split(root, split, train, seed, complain))


def _found(root: Path, part: str, complain: Callable) -> tuple[Path, Path, list[Row]]:
    """The folders of a part, and its images."""
    images, labels = root / "images", root / "labels"
    for folder in (images, labels):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; {LAYOUT}")
    if (images / part).is_dir():
        images, labels = images / part, labels / part
        names = pictures(images)
    else:
        listed = root / "val.txt"
        if not listed.is_file():
            raise UserError(f"{listed}: no such file; {LAYOUT}")
        chosen = {line.strip() for line in listed.read_text("utf-8-sig").splitlines()} - {""}
        every = pictures(images)
        known = {*every, *(_stem(name) for name in every)}
        for name in sorted(chosen - known):
            complain(UserError(f"{listed}: {brief(name)} is no image of {images}", "split"))
        is_val = {name: name in chosen or _stem(name) in chosen for name in every}
        names = [name for name in every if is_val[name] == (part == "val")]
    return images, labels, rows(images, labels, names, complain, alone=names == pictures(images))


def rows(
    images: Path, labels: Path, names: list[str], complain: Callable, alone: bool
) -> list[Row]:
    """Images with their maps, by name without ending.

    alone: these are all images of the folder: a map that belongs to none of them is a fault.
    """
    maps = {_stem(name): name for name in (pictures(labels) if labels.is_dir() else ())}
    found = [Row(name, maps.get(_stem(name))) for name in names]
    stems = collections.Counter(map(_stem, names))
    twice = [name for name in names if stems[_stem(name)] > 1]
    if twice:
        raise UserError(
            f"{images}: {brief(twice[0])} and {brief(twice[1])} would have one map; expected "
            "images that differ in more than their endings"
        )
    astray = sorted(maps.keys() - set(stems)) if alone else []
    if astray:
        complain(
            UserError(
                f"{labels / maps[astray[0]]}: no image in {images} is called {brief(astray[0])}; "
                f"expected maps with the names of their images ({len(astray)} have none)",
                "astray",
            )
        )
    return found


def _stem(name: str) -> str:
    return str(Path(name).with_suffix("").as_posix())


def read_classes(root: Path) -> tuple[Taxonomy, np.ndarray]:
    """Classes of a folder, and the class of every value.

    classes.txt: a name a line for the values 0, 1, ..., or lines VALUE:NAME.   classes.json: a list
    of names, an object {"VALUE": "NAME"}, or COCO's list of categories with id and name. Those of
    VOID_NAMES are no classes.
    """
    path = next(root / name for name in CLASSES if (root / name).is_file())
    try:
        text = path.read_text(encoding="utf-8-sig")
        named = _of_json(json.loads(text)) if path.suffix == ".json" else _of_lines(text, path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not a list of classes ({str(error)[:80]}); expected a name a line, or "
            "VALUE:NAME (JSON: a list of names, or an object of them by value)"
        ) from None
    listed, void = [*named], [k for k, name in named.items() if name.lower() in VOID_NAMES]
    named = {value: name for value, name in named.items() if value not in void}
    firsts = [name.split(",")[0].strip() for name in named.values()]
    if not named or "" in firsts or len(set(firsts)) < len(firsts):
        twice = [name for name in firsts if firsts.count(name) > 1]
        found = f"{brief(twice[0])} is there {len(twice)} times; " if twice else ""
        raise UserError(
            f"{path}: {found}expected at least one name, all of them distinct, none empty"
        )
    if not all(0 <= value < 65536 for value in listed) or NONE in named:
        raise UserError(f"{path}: expected values from 0 to 65535 without {NONE}, which is none")
    values = np.full(max(256, max(listed) + 1) + 1, UNKNOWN, np.int32)  # the last: all larger ones
    values[NONE] = IGNORE
    values[void] = IGNORE
    values[list(named)] = np.arange(len(named))
    return Taxonomy(tuple(named.values()), (False,) * len(named), tuple(named)), values


def _of_lines(text: str, where: Path) -> dict[int, str]:
    lines = lines_of(text)
    pairs = numbered(lines, str(where))
    return dict(enumerate(lines)) if pairs is None else _distinct(pairs)


def _of_json(content) -> dict[int, str]:
    if isinstance(content, dict) and "categories" in content:
        content = content["categories"]
    if isinstance(content, dict):
        return _distinct([(int(value), str(name)) for value, name in content.items()])
    if all(isinstance(entry, str) for entry in content):
        return dict(enumerate(content))
    return _distinct([(int(entry["id"]), str(entry["name"])) for entry in content])


def _distinct(pairs: list[tuple[int, str]]) -> dict[int, str]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a value is listed twice")
    return dict(pairs)
